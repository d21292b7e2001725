// SPDX-License-Identifier: GPL-2.0

//! One ring: looked at after an exit, drained ([`drain`]) on the vCPU thread, its calls finished
//! ([`finish`]) wherever they are worked on.

use dlh_abi::{
    header, Broken, Consumer, Cookie, Error as CallError, Gpa, RingSize, Status, ABI_VERSION,
    RING_ACTIVE,
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
use kvm_vm::{GuestWindow, Hva, Vcpu, VcpuKey, VcpuRef, Vm};

mod drain;
mod finish;

use crate::{host::Host, progress::Progress, queue::VmQueue, stats::Event};

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
    declined_shown: u64,
    cookie: Cookie,
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
        let reachable = window.read_u32(header::TAIL).and(window.read_u64(last));
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
        let start = window.read_u32(header::TAIL).map_err(unreachable)?;
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
                publish <- new_mutex!(Shown { done: start, declined: 0, declined_shown: 0, cookie }),
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
        window.write_u32(header::DONE, start)?;
        window.write_u64(header::COOKIE, cookie.0)?;
        window.write_u64(header::DECLINED, 0)?;
        window.write_u32(header::ENTRIES, size.get())?;
        window.write_u32(header::VERSION, ABI_VERSION)?;
        smp_mb(Full);
        window.write_u32(header::FLAGS, RING_ACTIVE)
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
        // The task may be another one that got the address of one that has ended. Counted only where the
        // count is handed on: dropping it may sleep.
        let held = || {
            let progress = this.progress.lock();
            progress.held().filter(|vcpu| vcpu.vm().is_current())?.try_get()
        };
        TaskWork::queue(this, held);
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

    /// Has the return of this thread to the VMM lead here. May sleep.
    fn follow(self: &Arc<Self>, vcpu: &Vcpu, task: usize) {
        let old = self.task.load(Relaxed);
        if old == task {
            return;
        }
        // Nothing is entered into the table once the ring is closed: see `close()`.
        let drain = self.drain.lock();
        let host = self.queue.host();
        host.unfollow(self, old);
        let known = self.live.load(Acquire) && host.follow(self, task).is_ok();
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
        if window.hva() == self.hva && window.read_u64(header::COOKIE) == Ok(cookie.0) {
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
        if !vcpu.vm().is_current() {
            // The thread is ending and has given its memory up: nobody can look for it any more.
            this.close(None);
            return;
        }
        this.follow(&vcpu, Task::current_raw() as usize);
        // Another vCPU than the ring's own is here only on behalf of one that has left.
        if vcpu.key() == this.vcpu && vcpu.is_in_run() {
            this.drain(&vcpu, this.queue.host().budget());
        } else {
            // The VMM may reset the guest or restore a snapshot as soon as it runs: nothing may be
            // left that belongs to the guest of before.
            this.drain(&vcpu, u32::MAX);
            this.settle(Some(&vcpu));
        }
    }
}
