// SPDX-License-Identifier: GPL-2.0

//! The thread.
//!
//! It belongs to the kernel, not to the VMM: nothing that a user may do to a process stops it. Its memory is
//! charged to the VMM's cgroup; its CPU time is the kernel's.
//!
//! C headers: `include/linux/kthread.h`, `include/linux/mmu_notifier.h`

use core::{ffi::c_void, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::{error::from_err_ptr, prelude::*, sync::Arc, types::NotThreadSafe};
use kvm_vm::Vm;

/// What a worker does.
pub trait Job: Send + Sync + 'static {
    /// Whether there is something to do. Must not sleep.
    fn is_due(&self) -> bool;

    /// Does some of it, asking `turn` often whether it may go on: whoever stops the worker waits until it
    /// returns. On the worker; may sleep. Nothing may be waited for that a user can keep from happening.
    fn work(&self, turn: &mut Turn);
}

/// The thread; dropping it stops it, and waits for what it does at that moment.
///
/// # Invariants
///
/// Owns `raw`, which has been started, and whose data is the object that `job` counts.
pub struct Worker<J: Job> {
    raw: NonNull<bindings::dlh_worker>,
    job: Arc<J>,
}

// SAFETY: A worker may be woken and stopped by any thread.
unsafe impl<J: Job> Send for Worker<J> {}
// SAFETY: Waking is safe from several threads at once.
unsafe impl<J: Job> Sync for Worker<J> {}

impl<J: Job> Worker<J> {
    /// Starts a worker for `vm`. On a thread of its VMM; may sleep, for a quarter of a second or so at most.
    ///
    /// # Errors
    ///
    /// `EBUSY`: the VMM's address space was locked all the time. `EINVAL`: the thread is not the VMM's.
    pub fn start(vm: &Vm, job: Arc<J>) -> Result<Self> {
        let data = Arc::as_ptr(&job).cast_mut().cast::<c_void>();
        // SAFETY: The VM is alive. The callbacks take what `data` is; it lives until the thread has been stopped.
        let raw = from_err_ptr(unsafe {
            bindings::dlh_worker_start(vm.as_ptr(), Some(is_due::<J>), Some(work::<J>), data)
        })?;
        // INVARIANT: Started above.
        Ok(Self { raw: NonNull::new(raw).ok_or(ENOMEM)?, job })
    }

    /// What it works on.
    pub fn job(&self) -> &Arc<J> {
        &self.job
    }

    /// Has it look for something to do. Any context.
    pub fn wake(&self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_worker_wake(self.raw.as_ptr()) }
    }
}

impl<J: Job> Drop for Worker<J> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is ours, and is stopped once. Waits for its end.
        unsafe { bindings::dlh_worker_stop(self.raw.as_ptr()) }
    }
}

/// Called by the thread in the state it would sleep in if this returns false.
///
/// # Safety
///
/// `data` is what the worker was started with.
unsafe extern "C" fn is_due<J: Job>(data: *mut c_void) -> bool {
    // SAFETY: `data` is the job, which is kept until the thread has ended.
    unsafe { &*data.cast::<J>() }.is_due()
}

/// Called by the thread when something is due.
///
/// # Safety
///
/// As [`is_due`]; `worker` is that of this thread.
unsafe extern "C" fn work<J: Job>(data: *mut c_void, worker: *mut bindings::dlh_worker) {
    // SAFETY: As in `is_due`.
    let job = unsafe { &*data.cast::<J>() };
    if let Some(raw) = NonNull::new(worker) {
        // INVARIANT: This is its thread, and `Turn` cannot leave it.
        job.work(&mut Turn { raw, _context: NotThreadSafe });
    }
}

/// The worker has something to do, and this is its thread.
///
/// # Invariants
///
/// `raw` is the worker of the current thread.
pub struct Turn {
    raw: NonNull<bindings::dlh_worker>,
    _context: NotThreadSafe,
}

impl Turn {
    /// Whether there is any use in going on: not if the worker is being stopped, or the VMM has ended. Lets
    /// others run, and the system be suspended, so nothing may be held that others need. May sleep.
    pub fn may_go_on(&mut self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_worker_may_go_on(self.raw.as_ptr()) }
    }

    /// Gives the thread the VMM's address space, until the result is dropped; `None` if that has ended. The VMM's
    /// end waits meanwhile, so keep this short. May sleep.
    pub fn enter(&mut self) -> Option<Inside<'_>> {
        // SAFETY: By the type invariant.
        if !unsafe { bindings::dlh_worker_enter(self.raw.as_ptr()) } {
            return None;
        }
        // INVARIANT: Just entered.
        Some(Inside { turn: self })
    }

    /// Sleeps for a millisecond, for others to finish with something. Nothing may be held that others need.
    pub fn nap(&mut self) {
        // SAFETY: On a worker's thread, by the type invariant.
        unsafe { bindings::dlh_worker_nap() }
    }
}

/// The current thread, a worker's, has the VMM's address space, which does not end.
///
/// # Invariants
///
/// `turn` has been entered, and not been left.
pub struct Inside<'a> {
    turn: &'a Turn,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_worker_leave(self.turn.raw.as_ptr()) }
    }
}
