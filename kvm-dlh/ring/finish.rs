// SPDX-License-Identifier: GPL-2.0

//! Finishing entries, on whatever thread that happens, and showing the guest how far they are.

use dlh_abi::{header, RawEntry, Status};
use kernel::{
    prelude::*,
    sync::{
        atomic::ordering::{Acquire, Relaxed},
        barrier::{smp_mb, Full},
    },
};
use kvm_vm::{GuestWindow, Memslots, Vcpu};

use super::{Detached, Ring};

impl Ring {
    pub(super) fn write_status(
        &self,
        window: &GuestWindow<'_>,
        position: u32,
        status: Status,
    ) -> Result {
        let slot = self.size.slot_offset(self.size.slot(position)) as usize;
        self.publish.lock().declined += 1;
        window.write_u32(slot + RawEntry::STATUS_OFFSET, status.0 as u32)
    }

    /// Stores `done`, and the count of declined entries, where the guest sees them.
    pub(super) fn show(&self, window: &GuestWindow<'_>) -> Result {
        let mut shown = self.publish.lock();
        let done = self.progress.lock().consumer().done();
        if shown.declined != shown.declined_shown {
            window.write_u64(header::DECLINED, shown.declined)?;
            shown.declined_shown = shown.declined;
        }
        if done != shown.done {
            // Pairs with the guest's barrier after it reads done: statuses come first.
            smp_mb(Full);
            window.write_u32(header::DONE, done)?;
            shown.done = done;
        }
        Ok(())
    }

    /// A pending entry is finished. On a thread of the VMM this is shown at once; otherwise by the next
    /// drain, or whoever waits. May sleep.
    pub(crate) fn complete(&self, position: u32, status: Status) {
        let held = self.progress.lock().held().and_then(|vcpu| vcpu.try_get());
        let foreign = held.as_ref().is_some_and(|vcpu| !vcpu.vm().is_current());
        if foreign && self.leave_to_vmm(position, status) {
            return;
        }
        // What is outstanding holds the VM, so there is one; the indices must agree all the same.
        self.end(held.as_deref(), position, status);
        drop(held);
    }

    /// Leaves it to a thread of the VMM to end an entry. False if there is no memory to note it.
    fn leave_to_vmm(&self, position: u32, status: Status) -> bool {
        let mut late = self.late.lock();
        if late.push((position, status), GFP_KERNEL_ACCOUNT).is_err() {
            return false;
        }
        self.progress.lock().late += 1;
        self.generation.store(u64::MAX, Relaxed);
        self.settled.notify_all();
        true
    }

    fn next_late(&self) -> Option<(u32, Status)> {
        let mut late = self.late.lock();
        let next = late.pop()?;
        self.progress.lock().late -= 1;
        Some(next)
    }

    /// Ends an entry: stores its status, lets `done` pass it, shows that, and only then counts it as
    /// settled. Without a vCPU the guest's memory is left alone. May sleep.
    fn end(&self, vcpu: Option<&Vcpu>, position: u32, status: Status) {
        self.queue.stats().ended(status);
        let shown = match vcpu {
            Some(vcpu) => {
                let slots = vcpu.vm().memslots();
                self.show_end(&slots, position, status)
            }
            None => {
                self.progress.lock().finish(position);
                Ok(())
            }
        };
        if shown.is_err() {
            // The next exit of the vCPU looks properly.
            self.generation.store(u64::MAX, Relaxed);
        }
        let unneeded = {
            let mut progress = self.progress.lock();
            progress.ended(1);
            if progress.outstanding() == 0 {
                self.settled.notify_all();
            }
            progress.release()
        };
        drop(unneeded);
    }

    fn show_end(
        &self,
        slots: &Memslots<'_>,
        position: u32,
        status: Status,
    ) -> Result<(), Detached> {
        let window = GuestWindow::open(slots, self.gpa, self.size.bytes())
            .map_err(Detached::from)
            .and_then(|window| self.still_ours(window));
        let written = match &window {
            Ok(window) if !status.is_ok() => self.write_status(window, position, status),
            _ => Ok(()),
        };
        self.progress.lock().finish(position);
        written?;
        self.show(&window?)?;
        Ok(())
    }

    /// Whether entries of the ring may still be written to.
    fn still_ours<'a>(&self, window: GuestWindow<'a>) -> Result<GuestWindow<'a>, Detached> {
        if window.hva() == self.hva && self.live.load(Acquire) {
            Ok(window)
        } else {
            Err(Detached::Memory)
        }
    }

    /// Ends the entries that were completed on other threads. May sleep.
    pub(super) fn end_late(&self, vcpu: Option<&Vcpu>) {
        while let Some((position, status)) = self.next_late() {
            self.end(vcpu, position, status);
        }
    }

    /// Waits until nothing that was taken is unfinished, or not shown yet. May sleep.
    pub(super) fn settle(&self, vcpu: Option<&Vcpu>) {
        loop {
            self.end_late(vcpu);
            let mut progress = self.progress.lock();
            if progress.outstanding() == 0 {
                break;
            }
            if progress.late == 0 {
                self.settled.wait(&mut progress);
            }
        }
    }
}
