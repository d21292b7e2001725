// SPDX-License-Identifier: GPL-2.0

//! Finishing entries, on whatever thread that happens, and showing the guest how far they are.

use core::iter::Peekable;

use dlh_abi::{Operation, Status};
use kernel::prelude::*;
use kvm_vm::{Memslots, Vcpu};

use super::{Detached, Ring};

/// A call that was completed on a thread that is not the VMM's.
#[derive(Clone, Copy)]
pub(super) struct Late {
    position: u32,
    op: Operation,
    status: Status,
}

impl Ring {
    /// Pending entries are finished. On a thread of the VMM this is shown at once; otherwise by the next
    /// drain, or whoever waits. May sleep.
    pub(crate) fn complete_all(
        &self,
        calls: impl Iterator<Item = (u32, Operation)>,
        status: Status,
    ) {
        // What is outstanding holds the VM, so there is one; the indices must agree all the same.
        let foreign = self.unfinished.is_foreign();
        let mut calls = calls.peekable();
        if !foreign && status.is_ok() {
            self.end_unseen(&mut calls);
        }
        for (position, op) in calls {
            if foreign && self.leave_to_vmm(Late { position, op, status }) {
                continue;
            }
            let held = self.unfinished.held(|_| true);
            self.end(held.as_deref(), position, op, status);
            drop(held);
        }
    }

    /// Ends the first of the entries, which were executed, for as long as the guest sees nothing of that yet:
    /// one before them is pending still.
    fn end_unseen(&self, calls: &mut Peekable<impl Iterator<Item = (u32, Operation)>>) {
        let Some((_, op)) = calls.peek().copied() else { return };
        let mut ended = 0;
        {
            let mut state = self.state.lock();
            let Some(first) = state.first_pending() else { return };
            while let Some((position, _)) = calls.next_if(|call| call.0 != first && call.1 == op) {
                state.finish(position);
                ended += 1;
            }
        }
        self.queue.stats().executed_all(op, ended);
        self.unfinished.ended(ended);
    }

    /// Leaves it to a thread of the VMM to end an entry. False if there is no memory to note it.
    fn leave_to_vmm(&self, call: Late) -> bool {
        // The count changes with the list: whoever takes from it finds it counted.
        let mut late = self.late.lock();
        if late.push(call, GFP_KERNEL_ACCOUNT).is_err() {
            return false;
        }
        self.watch.look_again();
        self.unfinished.late();
        true
    }

    /// Ends the entries that were completed on other threads. May sleep.
    pub(super) fn end_late(&self, vcpu: Option<&Vcpu>) {
        while let Some(Late { position, op, status }) = self.next_late() {
            self.end(vcpu, position, op, status);
        }
    }

    fn next_late(&self) -> Option<Late> {
        let mut late = self.late.lock();
        let next = late.pop()?;
        self.unfinished.not_late();
        Some(next)
    }

    /// Ends an entry: stores its status, lets `done` pass it, shows that, and only then counts it as
    /// settled. Without a vCPU the guest's memory is left alone. May sleep.
    fn end(&self, vcpu: Option<&Vcpu>, position: u32, op: Operation, status: Status) {
        self.queue.stats().ended(op, status);
        let shown = match vcpu {
            Some(vcpu) => {
                let slots = vcpu.vm().memslots();
                self.show_end(&slots, position, status)
            }
            None => {
                self.state.lock().finish(position);
                Ok(())
            }
        };
        if shown.is_err() {
            // The next exit of the vCPU looks properly.
            self.watch.look_again();
        }
        self.unfinished.ended(1);
    }

    fn show_end(
        &self,
        slots: &Memslots<'_>,
        position: u32,
        status: Status,
    ) -> Result<(), Detached> {
        let mut place = self.place;
        let mut state = self.state.lock();
        state.finish(position);
        // A ring that was let go of may be written to no more.
        if !self.is_live() {
            return Err(Detached::Memory);
        }
        let window = place.open(slots)?;
        // What is not as it was left is another's by now, even if no drain has noticed yet.
        state.check(&window.read_ring_words()?)?;
        if !status.is_ok() {
            state.write_status(&window, position, status)?;
        }
        state.show(&window)?;
        Ok(())
    }

    /// Waits until nothing that was taken is unfinished, or not shown yet. May sleep, and be frozen.
    pub(super) fn settle(&self, vcpu: Option<&Vcpu>) {
        loop {
            self.end_late(vcpu);
            if self.unfinished.is_none() || self.unfinished.wait() {
                break;
            }
        }
    }
}
