// SPDX-License-Identifier: GPL-2.0

//! Draining a ring: what the guest made visible is copied once, checked, and executed.

use core::mem::MaybeUninit;

use dlh_abi::{Call, Operation, RawEntry, Status};
use kernel::{
    prelude::*,
    sync::lock::{mutex::MutexBackend, Guard},
};
use kvm_hooks::may_go_on;
use kvm_registry::{Calls, Outcome};
use kvm_vm::{GuestWindow, Memslots, Place, Vcpu};

use super::{state::State, Detached, Ring};
use crate::{
    budget::{Budget, Clock},
    queue::{Caller, VmQueue},
    stats::Event,
};

/// Entries copied at a time: 1 KiB of stack.
const BATCH: usize = 32;

/// Entries that are more than a NOP, between two looks at the clock.
const CLOCK_ENTRIES: u32 = 8;

/// What a drain came to.
#[derive(Clone, Copy, Default)]
pub(super) struct Drained {
    /// Entries taken.
    taken: u32,
    /// Visible entries that were not.
    left: u32,
}

impl Drained {
    /// Whether visible entries were left in the ring.
    pub(super) fn is_partial(self) -> bool {
        self.left > 0
    }
}

/// The lock on the indices, given up while operations execute: they may complete calls.
type Locked<'a> = Guard<'a, State, MutexBackend>;

impl Ring {
    /// Takes and executes what is visible, in as many drains as it takes, others getting their turn in
    /// between. What becomes visible meanwhile may be left. On a thread of the VMM; may sleep.
    pub(super) fn drain_all(&self, vcpu: &Vcpu) {
        let budget = self.queue.host().budget();
        let mut left = self.drain(vcpu, budget).left;
        while left > 0 && may_go_on() {
            let some = Budget { entries: budget.entries.min(left), ..*budget };
            let Drained { taken, .. } = self.drain(vcpu, &some);
            if taken == 0 {
                break;
            }
            left = left.saturating_sub(taken);
        }
    }

    /// Takes and executes what is visible, up to `budget`. On a thread of the VMM; may sleep.
    pub(super) fn drain(&self, vcpu: &Vcpu, budget: &Budget) -> Drained {
        let mut place = self.drain.lock();
        if !self.is_live() {
            return Drained::default();
        }
        self.queue.stats().count(Event::Drain);
        let vm = vcpu.vm();
        self.watch.begin_look(vm);
        let slots = vm.memslots();
        if !self.unfinished.is_none() {
            self.end_late(Some(vcpu));
        }
        let drained = match self.look(vcpu, &slots, &mut place, budget) {
            Ok(drained) => drained,
            Err(why) => {
                self.detach(why);
                Drained::default()
            }
        };
        drop(slots);
        if drained.left > 0 || !self.unfinished.is_none() {
            // Only the thread that runs the ring's vCPU comes by here again before the VMM runs.
            let comes_back = vcpu.key() == self.vcpu && vcpu.is_in_run() && self.is_live();
            self.unfinished.leave_behind(vcpu, drained.left > 0 && comes_back);
        }
        drained
    }

    /// Looks through the memslots and the VMM's page tables.
    #[inline]
    fn look(
        &self,
        vcpu: &Vcpu,
        slots: &Memslots<'_>,
        place: &mut Place,
        budget: &Budget,
    ) -> Result<Drained, Detached> {
        let window = place.open(slots)?;
        self.watch.keep_armed(&window)?;
        let mut state = self.state.lock();
        let words = window.read_ring_words()?;
        let waiting = state.waiting(&words)?;
        let mut to_take = waiting.min(budget.entries);
        let mut clock = budget.clock();
        if to_take as usize > BATCH {
            clock.start();
        }
        while to_take > 0 {
            let (taken, result);
            (state, taken, result) = self.take_run(vcpu, &window, state, to_take, &mut clock);
            to_take -= taken;
            if let Err(why) = result {
                let lost = words.tail.wrapping_sub(state.consumer().collected());
                self.queue.stats().lost(lost);
                return Err(why);
            }
            if to_take > 0 && clock.is_over() {
                break;
            }
        }
        state.show(&window)?;
        let collected = state.consumer().collected();
        self.watch.end_look(collected);
        let left = words.tail.wrapping_sub(collected);
        Ok(Drained { taken: waiting - left, left })
    }

    /// Takes and executes entries that lie side by side, at most `want` and [`BATCH`] of them; returns how
    /// many, and what was wrong with the one after them.
    #[inline]
    fn take_run<'a>(
        &'a self,
        vcpu: &Vcpu,
        window: &GuestWindow<'_>,
        mut state: Locked<'a>,
        want: u32,
        clock: &mut Clock,
    ) -> (Locked<'a>, u32, Result<(), Detached>) {
        let run = state.consumer().next_run(want.min(BATCH as u32));
        let offset = state.consumer().size().slot_offset(run.slot) as usize;
        let mut buffer = [const { MaybeUninit::<RawEntry>::uninit() }; BATCH];
        let entries = match window.read_entries(offset, &mut buffer[..run.len as usize]) {
            Ok(entries) => entries,
            Err(e) => return (state, 0, Err(e.into())),
        };
        let nops = state.take_nops(entries);
        state.executed_all();
        self.queue.stats().executed_nops(nops);
        match entries.get(nops as usize..) {
            None | Some([]) => (state, nops, Ok(())),
            Some(others) => {
                let (state, taken, result) = self.take_others(vcpu, window, state, others, clock);
                (state, nops + taken, result)
            }
        }
    }

    /// Takes and executes entries one by one.
    #[inline(never)]
    fn take_others<'a>(
        &'a self,
        vcpu: &Vcpu,
        window: &GuestWindow<'_>,
        mut state: Locked<'a>,
        entries: &[RawEntry],
        clock: &mut Clock,
    ) -> (Locked<'a>, u32, Result<(), Detached>) {
        clock.start();
        // With something else among them, this may not be a ring any more: nothing is written then.
        let intact = state.consumer().are_next(entries);
        let mut caller = Caller { vcpu, vcpu_id: self.vcpu_id, feed: self.id, time: None };
        let mut operations = Operations::enter(self, vcpu, entries.len() as u32);
        for (taken, raw) in (1..).zip(entries) {
            let collected = match state.take(raw) {
                Ok(collected) => collected,
                Err(e) => return (state, taken - 1, Err(e.into())),
            };
            self.queue.stats().submitted(1);
            caller.time = Some(raw.time());
            let ended;
            (state, ended) = match collected.call {
                Err(e) => (state, Some(e.into())),
                Ok(call) => match self.queue.execute_builtin(&caller, &call) {
                    Some(status) => (state, Some(status)),
                    None => operations.execute(&caller, state, collected.position, &call),
                },
            };
            state.executed_all();
            if let Some(status) = ended {
                self.queue.stats().ended(Operation(raw.op), status);
                if intact && raw.wants_status(status) {
                    operations.pause();
                    if let Err(e) = state.write_status(window, collected.position, status) {
                        return (state, taken, Err(e.into()));
                    }
                }
            }
            if taken % CLOCK_ENTRIES == 0 && clock.is_over() {
                return (state, taken, Ok(()));
            }
        }
        (state, entries.len() as u32, Ok(()))
    }
}

/// The way from some entries of a ring to their operations, entered once for all of them.
struct Operations<'a> {
    ring: &'a Ring,
    /// The way, once it has been entered.
    calls: Option<Calls<'a, VmQueue>>,
    /// How many entries may still be handed over; `None` if the VM is being destroyed. They are counted as
    /// outstanding already.
    begun: Option<u32>,
}

impl<'a> Operations<'a> {
    /// For `entries` entries. On a thread of the VMM; may sleep.
    fn enter(ring: &'a Ring, vcpu: &Vcpu, entries: u32) -> Self {
        let begun = ring.unfinished.begin(vcpu, entries).then_some(entries);
        Self { ring, calls: None, begun }
    }

    /// Has nobody wait who unregisters an operation, until the next entry is handed over: what comes now may
    /// wait for the VMM, which may take its time.
    fn pause(&mut self) {
        self.calls = None;
    }

    /// Hands one entry to its operation; `None` if it is pending, or has ended meanwhile.
    fn execute(
        &mut self,
        caller: &Caller<'_>,
        mut state: Locked<'a>,
        position: u32,
        call: &Call,
    ) -> (Locked<'a>, Option<Status>) {
        let Some(begun) = self.begun.as_mut().filter(|begun| **begun > 0) else {
            return (state, Some(dlh_abi::Error::Gone.into()));
        };
        state.begin(position);
        // Those before it have been executed; it is pending by its own bit.
        state.executed_all();
        // The operation may complete calls.
        drop(state);
        let queue = &self.ring.queue;
        let calls = self.calls.get_or_insert_with(|| queue.calls());
        let outcome = queue.execute(calls, caller, call, position);
        let mut state = match self.ring.state.try_lock() {
            Some(state) => state,
            None => {
                // Who has it may be waiting for the VMM.
                self.calls = None;
                self.ring.state.lock()
            }
        };
        match outcome {
            Outcome::Finished(status) => {
                state.finish(position);
                (state, Some(status))
            }
            Outcome::Pending => {
                *begun -= 1;
                (state, None)
            }
        }
    }
}

impl Drop for Operations<'_> {
    fn drop(&mut self) {
        // Those that were not handed over, or were finished at once.
        self.ring.unfinished.ended(self.begun.unwrap_or(0));
    }
}
