// SPDX-License-Identifier: GPL-2.0

//! One ring: looked at after an exit, drained on the vCPU thread, finished wherever its calls are.

use core::mem::MaybeUninit;

use dlh_abi::{
    header, Broken, Collected, Consumer, Cookie, Error as CallError, Gpa, RawEntry, RingSize,
    Status, ABI_VERSION, RING_ACTIVE,
};
use kernel::{
    fmt, new_condvar, new_mutex, new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            ordering::{Acquire, Relaxed, Release},
            Atomic,
        },
        barrier::{smp_mb, Full},
        Arc, ArcBorrow, CondVar, Mutex, SpinLock,
    },
    task::Task,
};
use kvm_hooks::{random_cookie, Deferred, Doorbell, Listening, TaskWork};
use kvm_registry::Outcome;
use kvm_vm::{GuestWindow, Hva, Memslots, Vcpu, VcpuKey, VcpuRef, Vm};

use crate::{host::Host, progress::Progress, queue::VmQueue, stats::Event};

/// Entries copied at a time: 1 KiB of stack.
const BATCH: usize = 32;

/// A ring in guest memory.
#[pin_data]
pub(crate) struct Ring {
    queue: Arc<VmQueue>,
    id: u32,
    vcpu: VcpuKey,
    gpa: Gpa,
    size: RingSize,
    hva: Hva,
    doorbell: Doorbell,
    /// Position up to which entries were taken, for comparing with the doorbell.
    seen: Atomic<u32>,
    /// The memslot generation at the last look.
    generation: Atomic<u64>,
    /// False once nothing is to be taken from it any more.
    live: Atomic<bool>,
    /// The thread that last ran its vCPU (`task_struct` address), or 0.
    task: Atomic<usize>,
    work: TaskWork<Ring>,
    #[pin]
    drain: Mutex<()>,
    /// The value of `done` that stands in guest memory, and the entries declined so far.
    #[pin]
    publish: Mutex<Shown>,
    #[pin]
    progress: SpinLock<Progress>,
    /// Completed on threads that are not the VMM's, and not ended yet.
    #[pin]
    late: Mutex<KVec<(u32, Status)>>,
    #[pin]
    settled: CondVar,
    _listening: Listening<Host>,
}

struct Shown {
    done: u32,
    declined: u64,
}

/// Why a ring was detached.
#[derive(Clone, Copy, Debug)]
enum Detached {
    /// Its memory is not where it was, or cannot be reached.
    Memory,
    /// What lies there is not a ring any more.
    Broken,
}

impl From<Broken> for Detached {
    fn from(_: Broken) -> Self {
        Self::Broken
    }
}

impl From<kvm_vm::SlotError> for Detached {
    fn from(_: kvm_vm::SlotError) -> Self {
        Self::Memory
    }
}

impl From<Error> for Detached {
    fn from(_: Error) -> Self {
        Self::Memory
    }
}

impl Ring {
    /// Whether a ring could lie at `gpa`. On the vCPU's thread; may sleep.
    pub(crate) fn check_memory(vcpu: &Vcpu, gpa: Gpa, size: RingSize) -> Result<(), CallError> {
        let slots = vcpu.vm().memslots();
        let window = GuestWindow::open(&slots, gpa, size.bytes()).map_err(|_| CallError::Memory)?;
        // The first and the last word stand for all: the slot is one piece.
        let last = size.slot_offset(size.get() - 1) as usize;
        let reachable = window.read::<u32>(header::TAIL).and(window.read::<u64>(last));
        reachable.map(drop).map_err(|_| CallError::Memory)
    }

    /// Makes the ring at `gpa` for `vcpu`, and writes the host's part of its header. On the vCPU's
    /// thread; may sleep.
    pub(crate) fn set_up(
        queue: &Arc<VmQueue>,
        vcpu: &Vcpu,
        gpa: Gpa,
        size: RingSize,
    ) -> Result<Arc<Self>, CallError> {
        let generation = vcpu.vm().generation();
        let slots = vcpu.vm().memslots();
        let window = GuestWindow::open(&slots, gpa, size.bytes()).map_err(|_| CallError::Memory)?;
        let unreachable = |_: Error| CallError::Memory;
        let no_memory = |_: Error| CallError::NoMemory;

        let cookie = random_cookie();
        let start = window.read(header::TAIL).map_err(unreachable)?;
        let hva = window.hva();
        let doorbell = Doorbell::create(&window).map_err(unreachable)?;
        let listening = queue.host().listen().map_err(no_memory)?;
        let progress = Progress::new(Consumer::new(size, cookie, start)).map_err(no_memory)?;
        let ring = Arc::pin_init(
            pin_init!(Self {
                queue: queue.clone(),
                id: vcpu.index(),
                vcpu: vcpu.key(),
                gpa,
                size,
                hva,
                doorbell,
                seen: Atomic::new(start),
                generation: Atomic::new(generation),
                live: Atomic::new(true),
                task: Atomic::new(0),
                work: TaskWork::new(),
                drain <- new_mutex!(()),
                publish <- new_mutex!(Shown { done: start, declined: 0 }),
                progress <- new_spinlock!(progress),
                late <- new_mutex!(KVec::new()),
                settled <- new_condvar!(),
                _listening: listening,
            }),
            GFP_KERNEL_ACCOUNT,
        )
        .map_err(no_memory)?;
        Self::introduce(&window, start, size, cookie).map_err(unreachable)?;
        Ok(ring)
    }

    /// Writes the host's cache line; the flag that says so comes last.
    fn introduce(window: &GuestWindow<'_>, start: u32, size: RingSize, cookie: Cookie) -> Result {
        window.write(header::DONE, &start)?;
        window.write(header::COOKIE, &cookie.0)?;
        window.write(header::DECLINED, &0u64)?;
        window.write(header::ENTRIES, &size.get())?;
        window.write(header::VERSION, &ABI_VERSION)?;
        smp_mb(Full);
        window.write(header::FLAGS, &RING_ACTIVE)
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
    pub(crate) fn queue(&self) -> &Arc<VmQueue> {
        &self.queue
    }

    /// The thread under which it stands in the table of tasks, or 0.
    pub(crate) fn task(&self) -> usize {
        self.task.load(Relaxed)
    }

    /// Exit path: queues the drain if there is anything to look at. Interrupts off.
    #[inline]
    pub(crate) fn exited(this: ArcBorrow<'_, Self>, vcpu: &Vcpu) {
        let quiet = this.doorbell.read() == Some(this.seen.load(Relaxed))
            && this.generation.load(Relaxed) == vcpu.vm().generation();
        if !quiet && this.live.load(Acquire) && !this.queue.is_dead() {
            TaskWork::queue(this, || vcpu.try_get());
        }
    }

    /// KVM_RUN returns to the VMM: whatever is unfinished must end before the VMM has a say.
    /// Preemption off.
    pub(crate) fn left(this: ArcBorrow<'_, Self>) {
        let held = this.progress.lock().held().and_then(|vcpu| vcpu.try_get());
        // The task found may be another one that got the address of one that has ended.
        if held.as_ref().is_some_and(|vcpu| vcpu.vm().is_current()) {
            TaskWork::queue(this, || held);
        }
    }

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

    fn write_status(&self, window: &GuestWindow<'_>, position: u32, status: Status) -> Result {
        let slot = self.size.slot_offset(self.size.slot(position)) as usize;
        self.publish.lock().declined += 1;
        window.write(slot + RawEntry::STATUS_OFFSET, &status.0)
    }

    /// Stores `done`, and the count of declined entries, where the guest sees them.
    fn show(&self, window: &GuestWindow<'_>) -> Result {
        let mut shown = self.publish.lock();
        let done = self.progress.lock().consumer().done();
        window.write(header::DECLINED, &shown.declined)?;
        if done != shown.done {
            // Pairs with the guest's barrier after it reads done: statuses come first.
            smp_mb(Full);
            window.write(header::DONE, &done)?;
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
    fn end_late(&self, vcpu: Option<&Vcpu>) {
        while let Some((position, status)) = self.next_late() {
            self.end(vcpu, position, status);
        }
    }

    /// Executes what is visible to its end, and shows it. On a vCPU thread of the VM; may sleep.
    pub(crate) fn kick(&self, vcpu: &Vcpu) -> Result<(), CallError> {
        self.drain(vcpu, u32::MAX);
        self.settle(Some(vcpu));
        if self.live.load(Acquire) {
            Ok(())
        } else {
            Err(CallError::NoRing)
        }
    }

    /// Waits until nothing that was taken is unfinished, or not shown yet. May sleep.
    fn settle(&self, vcpu: Option<&Vcpu>) {
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

    /// Has the return of this thread to the VMM lead here. May sleep.
    fn follow(self: &Arc<Self>, vcpu: &Vcpu, task: usize) {
        let old = self.task.load(Relaxed);
        if old == task {
            return;
        }
        // Nothing is entered into the table once the ring is closed: see `close()`.
        let drain = self.drain.lock();
        let known = self.live.load(Acquire) && self.queue.host().follow(self, old, task).is_ok();
        self.task.store(if known { task } else { 0 }, Relaxed);
        drop(drain);
        if !known {
            // The return to the VMM would go unnoticed: no entry may be left pending then.
            self.close(Some(vcpu));
        }
    }

    /// Takes nothing more. The guest's memory is not touched: it may be anything by now.
    fn detach(&self, why: Detached) {
        if matches!(why, Detached::Broken) {
            self.queue.stats().count(Event::RingBroken);
        }
        self.live.store(false, Release);
        self.progress.lock().close();
    }

    /// Detaches the ring in good order: on return nothing of it is, or will be, worked on. May sleep.
    pub(crate) fn close(&self, vcpu: Option<&Vcpu>) {
        {
            let _drain = self.drain.lock();
            self.live.store(false, Release);
            let mut progress = self.progress.lock();
            progress.close();
        }
        self.settle(vcpu);
        let unneeded = self.progress.lock().release();
        drop(unneeded);
    }

    /// Its state in one line.
    pub(crate) fn show_state(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let progress = self.progress.lock();
        let consumer = progress.consumer();
        writeln!(
            f,
            "gpa={:#x} entries={} taken={} done={} outstanding={} {}",
            self.gpa.0,
            self.size.get(),
            consumer.collected(),
            consumer.done(),
            progress.outstanding(),
            if progress.is_closed() { "detached" } else { "active" }
        )
    }

    /// Tells the guest that the ring is detached, if its memory is still this ring's.
    pub(crate) fn retire(&self, vm: &Vm) {
        let slots = vm.memslots();
        let Ok(window) = GuestWindow::open(&slots, self.gpa, self.size.bytes()) else { return };
        let cookie = self.progress.lock().consumer().cookie();
        if window.hva() == self.hva && window.read::<u64>(header::COOKIE) == Ok(cookie.0) {
            // Nothing depends on it: a guest that does not see this runs into its own time-out.
            let _ = window.write(header::FLAGS, &0u32);
        }
    }
}

impl Deferred for Ring {
    type Payload = VcpuRef;

    fn task_work(&self) -> &TaskWork<Self> {
        &self.work
    }

    fn run(this: Arc<Self>, vcpu: VcpuRef) {
        if !vcpu.vm().is_current() {
            // The thread is ending and has given its memory up: nobody can look for it any more.
            this.close(None);
            return;
        }
        this.follow(&vcpu, Task::current_raw() as usize);
        if vcpu.is_in_run() {
            this.drain(&vcpu, this.queue.host().budget());
        } else {
            // The VMM may reset the guest or restore a snapshot as soon as it runs: nothing may be
            // left that belongs to the guest of before.
            this.drain(&vcpu, u32::MAX);
            this.settle(Some(&vcpu));
        }
    }
}
