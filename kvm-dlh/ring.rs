// SPDX-License-Identifier: GPL-2.0

//! One ring: found at an exit ([`exits`]), looked at, drained ([`drain`]) on the vCPU thread, its calls finished
//! ([`finish`]) wherever they are worked on.

use dlh_abi::{header, Broken, Consumer, Error as CallError, Gpa, RingSize};
use kernel::{
    current, fmt, new_mutex, new_spinlock,
    prelude::*,
    sync::{aref::ARef, Arc, ArcBorrow, Mutex, SpinLock},
    task::Task,
};
use kvm_hooks::{
    inline_atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    kick, random_cookie, Deferred, Killed, Listening, TaskWork, Watch,
};
use kvm_vm::{Absent, Place, Vcpu, VcpuKey, VcpuRef, Vm};
use rcu_table::{impl_linked, Link, Reader};

mod drain;
mod exits;
mod finish;
mod state;
mod unfinished;

use crate::{failure::Failure, patience::with_window, queue::VmQueue, stats::Event};
use exits::{BY_TASK, BY_VCPU};
use finish::Late;
use state::State;
use unfinished::Unfinished;

pub(crate) use exits::RingTables;

/// The queue of a VM with its rings.
pub(crate) type Queue = VmQueue<Ring>;

/// A ring in guest memory.
#[pin_data]
pub(crate) struct Ring {
    queue: Arc<Queue>,
    tables: Arc<RingTables>,
    id: u32,
    vcpu: VcpuKey,
    /// The number that the VMM gave that vCPU.
    vcpu_id: u32,
    size: RingSize,
    /// Where it lies, as found when it was set up.
    place: Place,
    /// For the exit path: is there anything new?
    watch: Watch,
    /// False once nothing is to be taken from it any more.
    live: AtomicBool,
    work: TaskWork<Ring>,
    /// Taking entries, in the order of their positions.
    #[pin]
    drain: Mutex<Place>,
    #[pin]
    state: Mutex<State>,
    /// `done` as the guest has been shown it: a copy of what `state` says, for those who wait.
    shown: AtomicU32,
    /// Something has ended, and could not be shown. Changed with `state` locked.
    unshown: AtomicBool,
    #[pin]
    unfinished: Unfinished,
    /// Completed on threads that are not the VMM's, and not ended yet.
    #[pin]
    late: Mutex<KVec<Late>>,
    /// The thread that last ran its vCPU: its address, or 0, and itself.
    task: AtomicUsize,
    #[pin]
    runner: SpinLock<Option<ARef<Task>>>,
    /// What the last tick found waiting: the position of the first entry, and for how many ticks.
    waiting: AtomicU64,
    _listening: Listening<RingTables>,
    by_vcpu: Link<Ring>,
    by_task: Link<Ring>,
}

impl_linked! {
    impl Linked<BY_VCPU> for Ring { self.by_vcpu }
    impl Linked<BY_TASK> for Ring { self.by_task }
}

/// [`Ring::waiting`] of a ring in which nothing waits.
const NOTHING: u64 = u64::MAX;
/// Ticks after which a vCPU that did not exit is tried again: it was not running.
const REPEAT: u64 = 64;

/// Why a ring was detached.
#[derive(Clone, Copy, Debug)]
enum Detached {
    /// Its memory is not where it was, or cannot be reached.
    Memory,
    /// What lies there is not a ring any more.
    Broken,
}

/// Why a look at a ring came no further.
#[derive(Clone, Copy, Debug)]
enum Stopped {
    /// Some of its memory is not there.
    Absent(Absent),
    /// The ring is to be detached.
    Detached(Detached),
}

impl From<Absent> for Stopped {
    fn from(absent: Absent) -> Self {
        Self::Absent(absent)
    }
}

impl From<Detached> for Stopped {
    fn from(why: Detached) -> Self {
        Self::Detached(why)
    }
}

impl From<Broken> for Stopped {
    fn from(_: Broken) -> Self {
        Self::Detached(Detached::Broken)
    }
}

impl From<kvm_vm::SlotError> for Stopped {
    fn from(_: kvm_vm::SlotError) -> Self {
        Self::Detached(Detached::Memory)
    }
}

impl Ring {
    /// Whether a ring could lie at `gpa`. On the vCPU's thread; may sleep.
    pub(crate) fn check_memory(vcpu: &Vcpu, gpa: Gpa, size: RingSize) -> Result<(), Failure> {
        with_window(vcpu, gpa, size.bytes(), |window| {
            // The first and the last word stand for all: the slot is one piece.
            let last = size.slot_offset(size.get() - 1) as usize;
            window.read_u32(header::TAIL)?;
            window.read_u64(last)?;
            Ok(())
        })
    }

    /// Makes the ring at `gpa` for `vcpu`, and writes the host's part of its header. On the vCPU's
    /// thread; may sleep.
    pub(crate) fn set_up(
        queue: &Arc<Queue>,
        tables: &Arc<RingTables>,
        vcpu: &Vcpu,
        gpa: Gpa,
        size: RingSize,
    ) -> Result<Arc<Self>, Failure> {
        let no_memory = |_: Error| CallError::NoMemory;
        let known = {
            let slots = vcpu.vm().memslots();
            Place::find(&slots, gpa, size.bytes()).map_err(|_| CallError::Memory)?
        };
        let start = with_window(vcpu, gpa, size.bytes(), |window| window.read_u32(header::TAIL))?;
        let watch = Watch::new(vcpu.vm(), known.hva(), start).map_err(no_memory)?;
        let listening = tables.listen().map_err(no_memory)?;
        let state = State::new(Consumer::new(size, random_cookie(), start)).map_err(no_memory)?;
        let known = &known;
        let ring = Arc::pin_init(
            pin_init!(Self {
                queue: queue.clone(),
                tables: tables.clone(),
                id: vcpu.index(),
                vcpu_id: vcpu.id(),
                vcpu: vcpu.key(),
                size,
                place: *known,
                watch,
                live: AtomicBool::new(true),
                work: TaskWork::new(),
                drain <- new_mutex!(*known),
                state <- new_mutex!(state),
                shown: AtomicU32::new(start),
                unshown: AtomicBool::new(false),
                unfinished <- Unfinished::new(),
                late <- new_mutex!(KVec::new()),
                task: AtomicUsize::new(0),
                runner <- new_spinlock!(None),
                waiting: AtomicU64::new(NOTHING),
                _listening: listening,
                by_vcpu: Link::new(),
                by_task: Link::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )
        .map_err(no_memory)?;
        with_window(vcpu, gpa, size.bytes(), |window| ring.state.lock().introduce(window))?;
        Ok(ring)
    }

    /// Its number in the VM.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// The vCPU whose exits it is looked at.
    pub(crate) fn vcpu(&self) -> VcpuKey {
        self.vcpu
    }

    /// The VM's queue.
    pub(crate) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// Whether entries may be taken from it. Those of a VM that has ended are not: a new vCPU may have the
    /// address of the old one.
    #[inline]
    pub(crate) fn is_live(&self) -> bool {
        self.live.load(Ordering::Acquire) && !self.queue.is_dead()
    }

    /// Exit path: queues the drain if there is anything to look at. Interrupts off.
    #[inline]
    fn exited(this: ArcBorrow<'_, Self>, vcpu: &Vcpu, reader: Reader<'_>) {
        // On a thread that it does not follow yet nothing else would lead here when that returns to the VMM.
        let quiet = this.watch.is_quiet(vcpu.vm(), reader) && this.is_followed();
        if !quiet && this.is_live() {
            TaskWork::queue(this, || vcpu.try_get());
        }
    }

    /// KVM_RUN returns to the VMM: whatever is unfinished must end before the VMM has a say. Must not
    /// sleep.
    fn left(this: ArcBorrow<'_, Self>) {
        if !this.unfinished.is_none() {
            // The task may be another one that got the address of one that has ended.
            TaskWork::queue(this, || this.unfinished.held(|vcpu| vcpu.vm().is_current()));
        }
    }

    /// Has the vCPU exit if what was new at the last tick has not been looked at. A kernel thread.
    fn tick(&self, reader: Reader<'_>) {
        if self.watch.news(reader).is_none() || !self.is_live() {
            self.waiting.store(NOTHING, Ordering::Relaxed);
            return;
        }
        let seen = self.watch.seen();
        let last = self.waiting.load(Ordering::Relaxed);
        let ticks = if last as u32 == seen && last != NOTHING { (last >> 32) + 1 } else { 0 };
        self.waiting.store((ticks % REPEAT) << 32 | u64::from(seen), Ordering::Relaxed);
        // If the first kick has not helped, another thread runs the vCPU now. If the second has not either,
        // none does; one may later.
        if ticks != 1 && ticks != 2 {
            return;
        }
        if let Some(runner) = &*self.runner.lock() {
            self.queue.stats().count(Event::DeferKick);
            kick(runner, ticks == 2);
        }
    }

    /// Executes what is visible to its end, and shows it. What becomes visible meanwhile does not make it
    /// longer. On a vCPU thread of the VM; may sleep. Whether the ring is live after that.
    pub(crate) fn kick(self: &Arc<Self>, vcpu: &Vcpu) -> Result<bool, Killed> {
        if self.vcpu == vcpu.key() {
            self.follow();
        }
        self.drain_and_settle(vcpu)?;
        Ok(self.is_live())
    }

    /// Takes what is visible, and waits for its end. A task that is being killed takes the ring with it: nobody
    /// else would end what it leaves.
    fn drain_and_settle(&self, vcpu: &Vcpu) -> Result<(), Killed> {
        let settled = self.drain_all(vcpu).and_then(|goal| self.settle(vcpu, goal));
        if settled.is_err() {
            self.abandon();
        }
        settled
    }

    /// Executes what is visible before something that was asked for later, if this is the ring of `vcpu`.
    /// On the vCPU's thread; may sleep.
    pub(crate) fn come_first(self: &Arc<Self>, vcpu: &Vcpu) -> Result<(), Killed> {
        if self.vcpu == vcpu.key() {
            self.follow();
            self.drain_all(vcpu)?;
        }
        Ok(())
    }

    /// Notes what the guest has been shown, for those who wait for it.
    #[inline]
    fn note_shown(&self, state: &State) {
        // Pairs with the acquire in `has_settled`, which relies on nothing else that was written before.
        self.shown.store(state.shown(), Ordering::Release);
        self.unshown.store(false, Ordering::Relaxed);
        self.unfinished.tell();
    }

    /// The thread under which it stands in the table of tasks, or 0.
    #[inline]
    pub(crate) fn task(&self) -> usize {
        self.task.load(Ordering::Relaxed)
    }

    /// Has the return of this thread to the VMM lead here. May sleep.
    #[inline]
    pub(crate) fn follow(self: &Arc<Self>) {
        if !self.is_followed() {
            self.move_to(Task::current_raw() as usize);
        }
    }

    /// Whether the return of this thread to the VMM leads here.
    #[inline]
    fn is_followed(&self) -> bool {
        self.task() == Task::current_raw() as usize
    }

    #[cold]
    fn move_to(self: &Arc<Self>, task: usize) {
        // Nothing is entered into the table once the ring is closed: see `close()`.
        let drain = self.drain.lock();
        self.tables.unfollow(self);
        let known = self.is_live() && self.tables.follow(self, task).is_ok();
        let runner = known.then(|| ARef::from(&**current!()));
        self.task.store(if known { task } else { 0 }, Ordering::Relaxed);
        let former = core::mem::replace(&mut *self.runner.lock(), runner);
        drop(drain);
        drop(former);
        if !known {
            // The return to the VMM would go unnoticed: no entry may be left pending then. If the task is
            // being killed, none is of use to anybody.
            let _ = self.close(true);
        }
    }

    /// Takes nothing more. The guest's memory is not touched: it may be anything by now. The state must not be
    /// locked.
    fn detach(&self, why: Detached) {
        let event = match why {
            Detached::Broken => Event::RingBroken,
            Detached::Memory => Event::RingLost,
        };
        if self.live.swap(false, Ordering::AcqRel) {
            self.queue.stats().count(event);
        }
        self.end_late_unshown();
        self.unfinished.forget_left_behind();
        self.unfinished.tell();
    }

    /// Detaches the ring without waiting for what is worked on: it ends wherever it is completed, and the
    /// guest hears nothing of that. May sleep, but not for the VMM.
    fn abandon(&self) {
        {
            let _drain = self.drain.lock();
            self.live.store(false, Ordering::Release);
        }
        self.end_late_unshown();
        self.unfinished.forget_left_behind();
        self.unfinished.tell();
    }

    /// Detaches the ring in good order: on return nothing of it is, or will be, worked on. May sleep; killable
    /// if the current thread is a vCPU's.
    pub(crate) fn close(&self, killable: bool) -> Result<(), Killed> {
        self.abandon();
        self.settle_detached(killable)
    }

    /// Nothing leads to it any more; it is closed. May sleep.
    pub(crate) fn forget(&self) {
        self.tables.forget(self);
    }

    /// Its state in one line.
    pub(crate) fn show_state(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (taken, done) = {
            let state = self.state.lock();
            (state.consumer().collected(), state.consumer().done())
        };
        writeln!(
            f,
            "gpa={:#x} entries={} taken={taken} done={done} outstanding={} {}",
            self.place.gpa().0,
            self.size.get(),
            self.unfinished.outstanding(),
            if self.is_live() { "active" } else { "detached" }
        )
    }

    /// Tells the guest that the ring is detached, if its memory is still this ring's.
    pub(crate) fn retire(&self, vm: &Vm) {
        let slots = vm.memslots();
        let mut place = self.place;
        let Ok(window) = place.open(&slots) else { return };
        let cookie = self.state.lock().consumer().cookie();
        if window.read_u64(header::COOKIE) == Ok(cookie.0) {
            // Nothing depends on it: a guest that does not see this runs into its own time-out.
            let _ = window.write_u32(header::FLAGS, 0);
        }
    }
}

impl Deferred for Ring {
    type Payload = VcpuRef;

    fn task_work(&self) -> &TaskWork<Self> {
        &self.work
    }

    fn run(this: Arc<Self>, vcpu: VcpuRef) {
        // Another vCPU than the ring's own is here only on behalf of one that has left.
        if vcpu.runs_here() && vcpu.key() == this.vcpu {
            this.follow();
            let drained = this.drain(&vcpu);
            // What is left waits for the next exit, of which a vCPU that waits makes none.
            if drained.is_partial() && vcpu.will_block() && this.drain_all(&vcpu).is_err() {
                this.abandon();
            }
        } else {
            this.leave(&vcpu);
        }
    }
}

impl Ring {
    /// KVM_RUN is over, and the VMM may reset the guest or restore a snapshot as soon as it runs: nothing
    /// may be left that belongs to the guest of before. May sleep.
    #[cold]
    fn leave(&self, vcpu: &Vcpu) {
        if !vcpu.vm().is_current() {
            // The thread is ending and has given its memory up: nobody can look for it any more.
            self.abandon();
            return;
        }
        // Another thread may run the vCPU by now: this one does not take the ring over from it. A task that is
        // being killed has abandoned it.
        let _ = self.drain_and_settle(vcpu);
        self.unfinished.forget_left_behind();
    }
}
