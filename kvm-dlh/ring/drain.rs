// SPDX-License-Identifier: GPL-2.0

//! Draining a ring: what the guest made visible is copied once, checked, and executed.

use core::mem::MaybeUninit;

use dlh_abi::{Call, Operation, RawEntry, Status, PAGE_SIZE};
use kernel::{
    prelude::*,
    sync::lock::{mutex::MutexBackend, Guard},
};
use kvm_hooks::{inline_atomic::Ordering, may_go_on, Killed};
use kvm_registry::{Calls, Outcome};
use kvm_vm::{Absent, GuestWindow, Memslots, Place, Presence, Vcpu};

use super::{finish::Late, state::State, Detached, Queue, Ring, Stopped};
use crate::{
    budget::{Budget, Clock},
    caller::Caller,
    patience::{GivenUp, Patience},
    stats::Event,
};

/// Entries copied at a time: 1 KiB of stack.
const BATCH: usize = 32;

/// Entries that are more than a NOP, between two looks at the clock.
const CLOCK_ENTRIES: u32 = 8;

/// Where a drain has come to.
#[derive(Clone, Copy)]
pub(super) enum Drained {
    /// Every entry before `position` is taken; `left` visible ones from there on are not.
    To { position: u32, left: u32 },
    /// No further than to memory that is not there.
    Absent(Absent),
    /// Nothing is taken from the ring any more.
    Detached,
}

impl Drained {
    /// Whether visible entries may have been left in the ring.
    pub(super) fn is_partial(self) -> bool {
        matches!(self, Self::To { left: 1.., .. } | Self::Absent(_))
    }
}

/// The lock on the indices, given up while operations execute: they may complete calls.
type Locked<'a> = Guard<'a, State, MutexBackend>;

impl Ring {
    /// Takes and executes what is visible now, in as many drains as it takes, others getting their turn in
    /// between. What becomes visible meanwhile may be left. Returns the position before which everything is
    /// taken, if the ring is still live. On a thread of the VMM; may sleep.
    pub(super) fn drain_all(&self, vcpu: &Vcpu) -> Result<u32, Killed> {
        let budget = self.queue.budget();
        let mut goal = None;
        let mut patience = Patience::new();
        loop {
            match self.drain_once(vcpu, budget, goal) {
                Drained::To { position, left } => {
                    let goal = *goal.get_or_insert(position.wrapping_add(left));
                    if goal.wrapping_sub(position) as i32 <= 0 {
                        return Ok(goal);
                    }
                    if left == 0 {
                        // The guest has taken entries back, by moving its tail: they never come.
                        return Ok(position);
                    }
                }
                Drained::Absent(absent) => match patience.ask(absent, vcpu.vm()) {
                    Ok(()) => {}
                    Err(GivenUp::Never) => self.detach(Detached::Memory),
                    Err(GivenUp::Killed) => return Err(Killed),
                },
                Drained::Detached => return Ok(self.shown.load(Ordering::Relaxed)),
            }
            if !may_go_on() {
                return Err(Killed);
            }
        }
    }

    /// Takes and executes what is visible, up to the budget, as far as memory is there: what is not is asked
    /// for, and left to the next exit. On a thread of the VMM; may sleep.
    pub(super) fn drain(&self, vcpu: &Vcpu) -> Drained {
        match self.drain_once(vcpu, self.queue.budget(), None) {
            Drained::Absent(absent) => self.drain_absent(vcpu, absent),
            drained => drained,
        }
    }

    /// The same, where something was absent at the first try.
    #[cold]
    fn drain_absent(&self, vcpu: &Vcpu, mut absent: Absent) -> Drained {
        // The ring's pages, and one for what changes meanwhile.
        for _ in 0..=self.size.bytes().div_ceil(PAGE_SIZE) {
            match absent.fetch(vcpu.vm()) {
                Presence::Here => {}
                Presence::NotYet => return Drained::Absent(absent),
                Presence::Never => break,
            }
            match self.drain_once(vcpu, self.queue.budget(), None) {
                Drained::Absent(other) => absent = other,
                drained => return drained,
            }
        }
        // It cannot be had, comes and goes, or cannot be accessed although it is there.
        self.detach(Detached::Memory);
        Drained::Detached
    }

    /// Takes and executes what is visible, up to `budget`, and to the position `goal`. On a thread of the VMM;
    /// may sleep, but not for the VMM.
    fn drain_once(&self, vcpu: &Vcpu, budget: &Budget, goal: Option<u32>) -> Drained {
        let mut place = self.drain.lock();
        if !self.is_live() {
            return Drained::Detached;
        }
        self.queue.stats().count(Event::Drain);
        let vm = vcpu.vm();
        self.watch.begin_look(vm);
        self.watch.keep_armed(vm);
        let ended = if self.unfinished.is_none() { Ok(()) } else { self.end_late(vcpu) };
        let slots = vm.memslots();
        let looked = match ended {
            Ok(()) => self.look(vcpu, &slots, &mut place, budget, goal),
            Err(absent) => Err(absent.into()),
        };
        drop(slots);
        let drained = match looked {
            Ok(drained) => drained,
            Err(Stopped::Absent(absent)) => {
                self.watch.look_again();
                Drained::Absent(absent)
            }
            Err(Stopped::Detached(why)) => {
                self.detach(why);
                Drained::Detached
            }
        };
        if drained.is_partial() || !self.unfinished.is_none() {
            // Only the thread that runs the ring's vCPU comes by here again before the VMM runs.
            let comes_back = vcpu.key() == self.vcpu && vcpu.is_in_run() && self.is_live();
            self.unfinished.leave_behind(vcpu, drained.is_partial() && comes_back);
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
        goal: Option<u32>,
    ) -> Result<Drained, Stopped> {
        let window = place.open(slots)?;
        let mut state = self.state.lock();
        let words = window.read_ring_words()?;
        let waiting = state.waiting(&words)?;
        let mut to_take = waiting.min(budget.entries);
        if let Some(goal) = goal {
            // Another thread may have come further.
            let ahead = goal.wrapping_sub(state.consumer().collected());
            to_take = if ahead as i32 > 0 { to_take.min(ahead) } else { 0 };
        }
        let mut clock = budget.clock();
        if to_take as usize > BATCH {
            clock.start();
        }
        let mut stopped = Ok(());
        while to_take > 0 {
            let (taken, result);
            (state, taken, result) = self.take_run(vcpu, &window, state, to_take, &mut clock);
            to_take -= taken;
            if let Err(why) = result {
                if let Stopped::Detached(_) = why {
                    let lost = words.tail.wrapping_sub(state.consumer().collected());
                    self.queue.stats().lost(lost);
                    return Err(why);
                }
                stopped = Err(why);
                break;
            }
            if to_take > 0 && clock.is_over() {
                break;
            }
        }
        // What was taken is shown, wherever it stopped.
        state.show(&window)?;
        self.note_shown(&state);
        stopped?;
        let position = state.consumer().collected();
        self.watch.end_look(position);
        Ok(Drained::To { position, left: words.tail.wrapping_sub(position) })
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
    ) -> (Locked<'a>, u32, Result<(), Stopped>) {
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
    ) -> (Locked<'a>, u32, Result<(), Stopped>) {
        clock.start();
        let mut intact = None;
        let mut caller = Caller { vcpu, vcpu_id: self.vcpu_id, feed: self.id, time: None };
        let mut operations = Operations::enter(self, vcpu, entries.len() as u32);
        for (taken, raw) in (1..).zip(entries) {
            let position = match state.take(raw) {
                Ok(position) => position,
                Err(e) => return (state, taken - 1, Err(e.into())),
            };
            self.queue.stats().submitted(1);
            caller.time = Some(raw.time());
            let ended;
            (state, ended) = match raw.call() {
                Err(e) => (state, Some(e.into())),
                Ok(call) => match self.queue.execute_builtin(&caller, &call) {
                    Some(status) => (state, Some(status)),
                    None => operations.execute(&caller, state, position, &call),
                },
            };
            if let Some(status) = ended {
                let late = Late { position, op: Operation(raw.op), status };
                // With something else among the others, this may not be a ring any more: nothing is written then.
                let mut intact = || {
                    let others = entries.get(taken as usize..).unwrap_or_default();
                    *intact.get_or_insert_with(|| state.consumer().are_next(others))
                };
                if raw.wants_status(status) && intact() {
                    if let Err(absent) = state.write_status(window, late.position, status) {
                        let why = match operations.leave_to_vmm(&mut state, late) {
                            Ok(()) => absent.into(),
                            Err(why) => {
                                self.queue.stats().dropped(1);
                                why.into()
                            }
                        };
                        return (state, taken, Err(why));
                    }
                }
                self.queue.stats().ended(late.op, status);
                state.executed_all();
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
    calls: Option<Calls<'a, Queue>>,
    /// How many entries may still be handed over; `None` if the VM is being destroyed. They are counted as
    /// outstanding already.
    begun: Option<u32>,
}

impl<'a> Operations<'a> {
    /// For `entries` entries. On a thread of the VMM; may sleep.
    fn enter(ring: &'a Ring, vcpu: &Vcpu, entries: u32) -> Self {
        // Room for their ends, wherever they come from. Without it, as if the VM were being destroyed.
        let room = ring.reserve_late(entries).is_ok();
        let begun = (room && ring.unfinished.begin(vcpu, entries)).then_some(entries);
        Self { ring, calls: None, begun }
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
        let mut state = self.ring.state.lock();
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

    /// An entry has ended, and the memory for its status is not there: it is pending until it is.
    fn leave_to_vmm(&mut self, state: &mut State, late: Late) -> Result<(), Detached> {
        let begun = self.begun.as_mut().filter(|begun| **begun > 0).ok_or(Detached::Memory)?;
        state.begin(late.position);
        state.executed_all();
        if !self.ring.leave_to_vmm(late) {
            state.finish(late.position);
            return Err(Detached::Memory);
        }
        *begun -= 1;
        Ok(())
    }
}

impl Drop for Operations<'_> {
    fn drop(&mut self) {
        // Those that were not handed over, or were finished at once.
        self.ring.unfinished.ended(self.begun.unwrap_or(0));
    }
}
