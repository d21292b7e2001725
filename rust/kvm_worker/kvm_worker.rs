// SPDX-License-Identifier: GPL-2.0

//! A kernel thread that belongs to the VMM: its address space, its cgroups, its end.
//!
//! C header: `include/linux/sched/vhost_task.h`

use core::{ffi::c_void, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::{error::from_err_ptr, prelude::*, sync::Arc};

/// What a worker does.
pub trait Job: Send + Sync + 'static {
    /// Whether there is something to do. Must not sleep.
    fn is_due(&self) -> bool;

    /// Does some of it. On the worker, a thread of the VMM; may sleep.
    fn work(&self);

    /// The VMM was killed: [`Job::work`] is not called again. On the worker; may sleep.
    fn killed(&self);
}

/// The thread; dropping it stops it and waits.
///
/// # Invariants
///
/// Owns `task`, which has been started, and whose data is the object that `job` counts.
pub struct Worker<J: Job> {
    task: NonNull<bindings::vhost_task>,
    job: Arc<J>,
}

// SAFETY: A worker may be woken and stopped by any thread.
unsafe impl<J: Job> Send for Worker<J> {}
// SAFETY: Waking is safe from several threads at once.
unsafe impl<J: Job> Sync for Worker<J> {}

impl<J: Job> Worker<J> {
    /// Starts a worker in the process of the current thread. May sleep.
    pub fn start(job: Arc<J>) -> Result<Self> {
        let data = Arc::as_ptr(&job).cast_mut().cast::<c_void>();
        // SAFETY: The callbacks take what `data` is; it lives until the task has been stopped.
        let task = from_err_ptr(unsafe {
            bindings::dlh_worker_create(Some(work::<J>), Some(killed::<J>), data)
        })?;
        // SAFETY: Just created.
        unsafe { bindings::dlh_worker_start(task) };
        // INVARIANT: Created and started above.
        Ok(Self { task: NonNull::new(task).ok_or(ENOMEM)?, job })
    }

    /// What it works on.
    pub fn job(&self) -> &Arc<J> {
        &self.job
    }

    /// Has it look for something to do. Any context.
    pub fn wake(&self) {
        // SAFETY: By the type invariant; the task structure is kept until it is stopped.
        unsafe { bindings::dlh_worker_wake(self.task.as_ptr()) }
    }
}

impl<J: Job> Drop for Worker<J> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is ours, and is stopped once. Waits for its end.
        unsafe { bindings::dlh_worker_stop(self.task.as_ptr()) }
    }
}

/// Called by the thread in a loop, in the state it would sleep in if this returns false.
///
/// # Safety
///
/// `data` is what the worker was created with.
unsafe extern "C" fn work<J: Job>(data: *mut c_void) -> bool {
    // SAFETY: `data` is the job, which is kept until the thread has ended.
    let job = unsafe { &*data.cast::<J>() };
    if !job.is_due() {
        return false;
    }
    // SAFETY: The thread sets its own state.
    unsafe { bindings::dlh_worker_running() };
    job.work();
    true
}

/// Called by the thread when the VMM is being killed.
///
/// # Safety
///
/// As [`work`].
unsafe extern "C" fn killed<J: Job>(data: *mut c_void) {
    // SAFETY: As in `work`.
    unsafe { &*data.cast::<J>() }.killed();
}

/// Keeps the current worker to a share of one CPU, by letting it sleep after it has worked.
pub struct Pace {
    /// CPU time before which everything was slept for, in nanoseconds.
    paid: u64,
}

/// The longest a worker sleeps for at a time, in milliseconds: what is reported meanwhile waits.
const LONGEST_PAUSE_MS: u64 = 1000;

impl Pace {
    /// Nothing is owed. On the worker, or before it has started.
    pub const fn new() -> Self {
        Self { paid: 0 }
    }

    /// Sleeps for as long as makes what was used since the last time `percent` of the time: not at all at
    /// 100 or more. On the worker; may sleep, but for a second at most.
    pub fn keep(&mut self, percent: u32) {
        // SAFETY: May be called on any thread.
        let used = unsafe { bindings::dlh_worker_cpu_ns() };
        let ms = used.saturating_sub(self.paid) / 1_000_000;
        if percent >= 100 || self.paid == 0 {
            self.paid = used;
            return;
        }
        // Less than a millisecond is owed until there is more.
        let owed = ms * u64::from(100 - percent) / u64::from(percent.max(1));
        if owed > 0 {
            self.paid = used;
            // SAFETY: May sleep here.
            unsafe { bindings::dlh_worker_pause(owed.min(LONGEST_PAUSE_MS) as u32) };
        }
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self::new()
    }
}
