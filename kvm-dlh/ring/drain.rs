// SPDX-License-Identifier: GPL-2.0

//! Draining a ring: what the guest made visible is copied once, checked, and executed.

use core::mem::MaybeUninit;

use dlh_abi::{header, Collected, Operation, RawEntry, Status};
use kernel::{
    prelude::*,
    sync::{
        atomic::ordering::Relaxed,
        barrier::{smp_mb, Full},
    },
};
use kvm_registry::Outcome;
use kvm_vm::{GuestWindow, Memslots, Vcpu, Vm};

use super::{Detached, Ring};
use crate::stats::Event;

/// Entries copied at a time: 1 KiB of stack.
const BATCH: usize = 32;

impl Ring {
    /// Takes and executes up to `budget` entries. On a thread of the VMM; may sleep.
    pub(crate) fn drain(&self, vcpu: &Vcpu, budget: u32) {
        let drain = self.drain.lock();
        if !self.progress.lock().begin_drain(vcpu) {
            return;
        }
        self.queue.stats().count(Event::Drain);
        let vm = vcpu.vm();
        // Before all else: a change, or a call to look again, is noticed at the next exit.
        self.generation.store(vm.generation(), Relaxed);
        let slots = vm.memslots();
        self.end_late(Some(vcpu));
        let left_behind = match self.look(vm, &slots, budget) {
            Ok(left_behind) => left_behind,
            Err(why) => {
                self.detach(why);
                false
            }
        };
        drop(slots);
        let unneeded = self.progress.lock().end_drain(left_behind);
        drop(drain);
        drop(unneeded);
    }

    /// Looks through the memslots and the VMM's page tables. Returns whether entries were left.
    fn look(&self, vm: &Vm, slots: &Memslots<'_>, budget: u32) -> Result<bool, Detached> {
        let window = GuestWindow::open(slots, self.gpa, self.size.bytes())?;
        if window.hva() != self.hva {
            return Err(Detached::Memory);
        }
        if self.doorbell.read().is_none() {
            self.doorbell.rearm(&window)?;
        }
        let tail = window.read_u32(header::TAIL)?;
        // Pairs with the guest's barrier between filling a slot and moving tail.
        smp_mb(Full);
        // Both words are ours; others mean that the memory went back in time or to another use.
        {
            let shown = self.publish.lock();
            if window.read_u32(header::DONE)? != shown.done
                || window.read_u64(header::COOKIE)? != shown.cookie.0
            {
                return Err(Detached::Broken);
            }
        }
        let waiting = self.progress.lock().consumer().visible(tail)?;
        let mut to_take = waiting.min(budget);
        while to_take > 0 {
            match self.take_run(vm, &window, to_take) {
                Ok(taken) => to_take -= taken,
                Err(why) => {
                    let lost = tail.wrapping_sub(self.progress.lock().consumer().collected());
                    self.queue.stats().submitted(lost);
                    self.queue.stats().dropped(lost);
                    return Err(why);
                }
            }
        }
        self.show(&window)?;
        self.seen.store(self.progress.lock().consumer().collected(), Relaxed);
        Ok(waiting > budget)
    }

    /// Takes and executes the entries that lie side by side, at most `want` and [`BATCH`] of them.
    fn take_run(&self, vm: &Vm, window: &GuestWindow<'_>, want: u32) -> Result<u32, Detached> {
        let run = self.progress.lock().consumer().next_run(want.min(BATCH as u32));
        let mut buffer = [const { MaybeUninit::<RawEntry>::uninit() }; BATCH];
        let offset = self.size.slot_offset(run.slot) as usize;
        let entries = window.read_entries(offset, &mut buffer[..run.len as usize])?;

        let mut taken = [None::<Collected>; BATCH];
        let mut count = 0;
        let mut broken = None;
        {
            let mut progress = self.progress.lock();
            for (place, raw) in taken.iter_mut().zip(entries) {
                match progress.take(raw) {
                    Ok(collected) => *place = Some(collected),
                    Err(e) => {
                        broken = Some(e);
                        break;
                    }
                }
                count += 1;
            }
        }
        self.queue.stats().submitted(count);
        let mut at_once = 0;
        let mut written = Ok(());
        for collected in taken.iter().flatten() {
            let Some(status) = self.execute(vm, collected) else { continue };
            if status.is_ok() {
                at_once += 1;
                continue;
            }
            self.queue.stats().ended(status);
            // After a bad entry nothing more is written there: it may not be a ring any more.
            if broken.is_none() && written.is_ok() {
                written = self.write_status(window, collected.position, status);
            }
        }
        self.queue.stats().executed(at_once);
        self.progress.lock().executed_all();
        written?;
        broken.map_or(Ok(count), |e| Err(e.into()))
    }

    /// Executes one entry; `None` if it is pending, or has ended meanwhile.
    fn execute(&self, vm: &Vm, collected: &Collected) -> Option<Status> {
        let call = match collected.call {
            Ok(call) => call,
            Err(e) => return Some(e.into()),
        };
        if call.op == Operation::NOP {
            return Some(Status::OK);
        }
        self.progress.lock().begin(collected.position);
        match self.queue.execute(vm, &call, self.id, collected.position) {
            Outcome::Finished(status) => {
                let mut progress = self.progress.lock();
                progress.finish(collected.position);
                progress.ended(1);
                Some(status)
            }
            Outcome::Pending => None,
        }
    }
}
