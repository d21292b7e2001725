// SPDX-License-Identifier: GPL-2.0

//! Finishing entries, on whatever thread that happens, showing the guest how far they are, and waiting for that.

use dlh_abi::{Operation, Status};
use kernel::prelude::*;
use kvm_hooks::{inline_atomic::Ordering, Killed};
use kvm_vm::{Absent, Vcpu};

use super::{state::State, Detached, Ring, Stopped};
use crate::{
    patience::{GivenUp, Patience},
    queue::Completes,
};

/// A call that was completed where its end could not be shown to the guest.
#[derive(Clone, Copy)]
pub(super) struct Late {
    pub(super) position: u32,
    pub(super) op: Operation,
    pub(super) status: Status,
}

impl Completes for Ring {
    /// Pending entries are finished. Where the guest's memory can be reached this is shown at once; otherwise
    /// by the next drain, or whoever waits. May sleep, but not for the VMM.
    fn complete_all(
        &self,
        op: Operation,
        mut positions: impl Iterator<Item = u32>,
        status: Status,
    ) {
        // What is outstanding holds the VM, so there is one; the indices must agree all the same.
        let foreign = self.unfinished.is_foreign();
        let mut next = if !foreign && status.is_ok() {
            self.end_unseen(op, &mut positions)
        } else {
            positions.next()
        };
        while let Some(position) = next {
            let call = Late { position, op, status };
            next = positions.next();
            if foreign && self.leave_to_vmm(call) {
                continue;
            }
            let held = self.unfinished.held(|_| true);
            if self.end(held.as_deref(), call).is_err() && !self.leave_to_vmm(call) {
                // The ring was detached a moment ago: now its memory is left alone.
                let _ = self.end(None, call);
            }
            drop(held);
        }
    }
}

impl Ring {
    /// Ends the first of some entries, which were executed, for as long as the guest sees nothing of that yet: one
    /// before them is pending still. Returns the one that it would see.
    fn end_unseen(&self, op: Operation, positions: &mut impl Iterator<Item = u32>) -> Option<u32> {
        let (mut ended, mut next) = (0, None);
        {
            let mut state = self.state.lock();
            let Some(first) = state.first_pending() else { return positions.next() };
            for position in positions {
                if position == first {
                    next = Some(position);
                    break;
                }
                state.finish(position);
                ended += 1;
            }
            // Before the lock goes: who shows that they ended may be waiting for it.
            self.queue.stats().executed_all(op, ended);
        }
        self.unfinished.ended(ended);
        next
    }

    /// Makes room for as many late calls as are outstanding, and `more`. On a thread of the VMM that drains; may
    /// sleep.
    pub(super) fn reserve_late(&self, more: u32) -> Result {
        let needed = self.unfinished.outstanding().saturating_add(more) as usize;
        if self.late.lock().capacity() >= needed {
            return Ok(());
        }
        let mut larger = KVec::with_capacity(needed.next_power_of_two(), GFP_KERNEL_ACCOUNT)?;
        {
            let mut late = self.late.lock();
            for call in late.drain_all() {
                // There is room for all that are outstanding.
                let _ = larger.push_within_capacity(call);
            }
            core::mem::swap(&mut *late, &mut larger);
        }
        Ok(())
    }

    /// Leaves it to a thread of the VMM to end an entry. False if the ring is detached: nobody would.
    pub(super) fn leave_to_vmm(&self, call: Late) -> bool {
        {
            let mut late = self.late.lock();
            // Room was made before the entry was handed over.
            if !self.is_live() || late.push_within_capacity(call).is_err() {
                return false;
            }
            // The count changes with the list: whoever takes from it finds it counted.
            self.unfinished.late();
        }
        self.watch.look_again();
        true
    }

    fn next_late(&self) -> Option<Late> {
        let mut late = self.late.lock();
        let next = late.pop()?;
        self.unfinished.not_late();
        Some(next)
    }

    /// Ends the late entries, as far as memory is there. On a thread of the VMM.
    pub(super) fn end_late(&self, vcpu: &Vcpu) -> Result<(), Absent> {
        while let Some(call) = self.next_late() {
            if let Err(absent) = self.end(Some(vcpu), call) {
                if self.leave_to_vmm(call) {
                    return Err(absent);
                }
                let _ = self.end(None, call);
            }
        }
        Ok(())
    }

    /// Ends the late entries of a ring that is detached. Any thread.
    pub(super) fn end_late_unshown(&self) {
        while let Some(call) = self.next_late() {
            let _ = self.end(None, call);
        }
    }

    /// Ends an entry: stores its status, lets `done` pass it, shows that, and only then counts it as settled.
    /// Without a vCPU, and if the ring is detached, the guest's memory is left alone. On a thread of the VMM, or
    /// without a vCPU; may take mutexes.
    ///
    /// # Errors
    ///
    /// The memory for its status is not there; the entry is pending as before.
    fn end(&self, vcpu: Option<&Vcpu>, call: Late) -> Result<(), Absent> {
        match vcpu {
            Some(vcpu) => match self.show_end(vcpu, call) {
                Ok(()) => {}
                Err(Stopped::Absent(absent)) => return Err(absent),
                // The next exit of the vCPU looks properly.
                Err(Stopped::Detached(_)) => self.watch.look_again(),
            },
            None => self.finish(&mut self.state.lock(), call),
        }
        self.unfinished.ended(1);
        Ok(())
    }

    /// Lets `done` pass an entry, and counts that: before it is shown, so that who has seen it counts none pending.
    fn finish(&self, state: &mut State, Late { position, op, status }: Late) {
        state.finish(position);
        self.queue.stats().ended(op, status);
    }

    /// Finishes an entry. An error but for [`Stopped::Absent`] says that nothing was shown.
    fn show_end(&self, vcpu: &Vcpu, call: Late) -> Result<(), Stopped> {
        let Late { position, status, .. } = call;
        let slots = vcpu.vm().memslots();
        let mut place = self.place;
        let mut state = self.state.lock();
        // A ring that was let go of may be written to no more. What is not as it was left is another's by
        // now, even if no drain has noticed yet.
        let ours = if self.is_live() {
            place.open(&slots).map_err(Stopped::from)
        } else {
            Err(Detached::Memory.into())
        };
        let window = match ours {
            Ok(window) => window,
            Err(e) => {
                self.finish(&mut state, call);
                // Who waits sees that the ring has lost its memory, and detaches it.
                self.unshown.store(true, Ordering::Release);
                return Err(e);
            }
        };
        if let Err(e) = state.check(&window.read_ring_words()?) {
            self.finish(&mut state, call);
            self.unshown.store(true, Ordering::Release);
            return Err(e.into());
        }
        if !status.is_ok() {
            state.write_status(&window, position, status)?;
        }
        self.finish(&mut state, call);
        match state.show(&window) {
            Ok(()) => self.note_shown(&state),
            Err(_) => {
                // The entry has ended all the same, and is shown later: at the next exit, or by who waits.
                self.unshown.store(true, Ordering::Release);
                self.watch.look_again();
            }
        }
        Ok(())
    }

    /// Shows what has come to its end and could not be shown then. On a thread of the VMM.
    fn publish(&self, vcpu: &Vcpu) -> Result<(), Stopped> {
        let slots = vcpu.vm().memslots();
        let mut place = self.place;
        let mut state = self.state.lock();
        if !self.is_live() {
            return Ok(());
        }
        if state.is_shown() {
            self.note_shown(&state);
            return Ok(());
        }
        let window = place.open(&slots)?;
        state.check(&window.read_ring_words()?)?;
        state.show(&window)?;
        self.note_shown(&state);
        Ok(())
    }

    /// Whether every entry before `goal` has come to its end, and the guest has been shown that. Of a ring that
    /// is detached, whether none is worked on any more.
    fn has_settled(&self, goal: u32) -> bool {
        if self.is_live() {
            goal.wrapping_sub(self.shown.load(Ordering::Acquire)) as i32 <= 0
        } else {
            self.unfinished.outstanding() == 0
        }
    }

    /// Waits until every entry before `goal`, all of which are taken, has come to its end, and the guest has been
    /// shown that. What is taken later does not make it longer. On a vCPU thread of the VM; may sleep, and be
    /// frozen.
    pub(super) fn settle(&self, vcpu: &Vcpu, goal: u32) -> Result<(), Killed> {
        let mut patience = Patience::new();
        while !self.has_settled(goal) {
            let shown = match self.end_late(vcpu) {
                Ok(()) => self.publish(vcpu),
                Err(absent) => Err(absent.into()),
            };
            match shown {
                Ok(()) => self.unfinished.wait_killable(|| {
                    self.has_settled(goal)
                        || self.unfinished.has_late()
                        || self.is_live() && self.unshown.load(Ordering::Acquire)
                })?,
                Err(Stopped::Absent(absent)) => match patience.ask(absent, vcpu.vm()) {
                    Ok(()) => {}
                    Err(GivenUp::Never) => self.detach(Detached::Memory),
                    Err(GivenUp::Killed) => return Err(Killed),
                },
                Err(Stopped::Detached(why)) => self.detach(why),
            }
        }
        Ok(())
    }

    /// Waits until nothing of a ring that is detached is worked on. May sleep, and be frozen.
    pub(super) fn settle_detached(&self, killable: bool) -> Result<(), Killed> {
        self.end_late_unshown();
        let none = || self.unfinished.outstanding() == 0;
        if killable {
            return self.unfinished.wait_killable(none);
        }
        self.unfinished.wait_until(none);
        Ok(())
    }
}
