// SPDX-License-Identifier: GPL-2.0

//! Draining a ring: what the guest made visible is copied once, checked, and executed.

use core::mem::MaybeUninit;

use dlh_abi::{header, Collected, RawEntry};
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
        let tail = window.read(header::TAIL)?;
        // Pairs with the guest's barrier between filling a slot and moving tail.
        smp_mb(Full);
        // The word is ours; another value means the memory went back in time or to another use.
        {
            let shown = self.publish.lock();
            if window.read::<u32>(header::DONE)? != shown.done {
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
        let mut written = Ok(());
        for place in &mut taken {
            let Some(collected) = place else { break };
            if let Outcome::Finished(status) = self.execute(vm, collected) {
                if !status.is_ok() && broken.is_none() && written.is_ok() {
                    written = self.write_status(window, collected.position, status);
                }
                self.queue.stats().ended(status);
            } else {
                *place = None;
            }
        }
        // Whatever happened, what was taken comes to its end.
        let mut progress = self.progress.lock();
        for collected in taken[..count as usize].iter().flatten() {
            progress.finish(collected.position);
            progress.ended(1);
        }
        drop(progress);
        written?;
        broken.map_or(Ok(count), |e| Err(e.into()))
    }

    fn execute(&self, vm: &Vm, collected: &Collected) -> Outcome {
        match collected.call {
            Ok(call) => self.queue.execute(vm, &call, self.id, collected.position),
            Err(e) => Outcome::Finished(e.into()),
        }
    }
}
