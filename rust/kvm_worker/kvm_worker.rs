// SPDX-License-Identifier: GPL-2.0

//! A kernel thread that belongs to the VMM: its address space, its cgroups, its end.
//!
//! C header: `include/linux/sched/vhost_task.h`

use core::{ffi::c_void, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::{
    error::from_err_ptr,
    prelude::*,
    sync::{
        atomic::{ordering::Relaxed, Atomic},
        Arc,
    },
    time::{Instant, Monotonic},
};

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

/// Keeps a worker to a share of one CPU: says when there is to be no more work for it.
pub struct Pace {
    percent: u32,
    began: Instant<Monotonic>,
    /// CPU time of the worker that has been accounted for, in nanoseconds. The worker's own.
    counted: Atomic<u64>,
    /// When what it has used will be its share of the time, in nanoseconds since `began`.
    paid_at: Atomic<u64>,
}

/// How far it may be ahead of its share, in nanoseconds.
const AHEAD_NS: u64 = 200_000_000;
/// The longest it is kept from work after it has worked, however much it has used at a stretch.
const MOST_NS: u64 = 10_000_000_000;

impl Pace {
    /// A worker that may use `percent` of a CPU; all of it at 100 or more.
    pub fn new(percent: u32) -> Self {
        Self {
            percent: percent.clamp(1, 100),
            began: Instant::now(),
            counted: Atomic::new(u64::MAX),
            paid_at: Atomic::new(0),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(0)
    }

    /// Counts what the worker has used since the last time. On the worker.
    pub fn worked(&self) {
        if self.percent >= 100 {
            return;
        }
        // SAFETY: May be called on any thread.
        let used = unsafe { bindings::dlh_worker_cpu_ns() };
        let more = used.saturating_sub(self.counted.load(Relaxed));
        self.counted.store(used, Relaxed);
        let takes = more.saturating_mul(100) / u64::from(self.percent);
        let now = self.now();
        let paid_at = self.paid_at.load(Relaxed).max(now).saturating_add(takes);
        self.paid_at.store(paid_at.min(now.saturating_add(MOST_NS)), Relaxed);
    }

    /// Whether it is to be given no more work for the moment. Any context.
    pub fn is_exhausted(&self) -> bool {
        self.percent < 100 && self.paid_at.load(Relaxed) > self.now().saturating_add(AHEAD_NS)
    }
}
