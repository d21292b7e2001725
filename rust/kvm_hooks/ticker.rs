// SPDX-License-Identifier: GPL-2.0

//! A thread that looks at something periodically, while there is something to look at.

use core::{ffi::c_void, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::{error::from_err_ptr, prelude::*, sync::Arc, task::Task, time::Delta};

/// What is looked at.
pub trait Tick: Send + Sync + 'static {
    /// Looks. False: there is nothing to look at until [`Ticker::wake`] is called.
    ///
    /// # Context
    ///
    /// A kernel thread; may sleep.
    fn tick(&self) -> bool;
}

/// The thread; it ends when this is dropped, which may sleep.
///
/// # Invariants
///
/// Owns the C object, whose data is the object that `_target` counts.
pub struct Ticker<T: Tick> {
    ticker: NonNull<bindings::dlh_ticker>,
    _target: Arc<T>,
}

// SAFETY: The thread can be woken and stopped by any thread.
unsafe impl<T: Tick> Send for Ticker<T> {}
// SAFETY: As above.
unsafe impl<T: Tick> Sync for Ticker<T> {}

impl<T: Tick> Ticker<T> {
    /// Starts the thread, which looks once in `period`. May sleep.
    pub fn start(target: Arc<T>, period: Delta) -> Result<Self> {
        let data = Arc::as_ptr(&target).cast_mut().cast::<c_void>();
        let period = u64::try_from(period.as_nanos()).map_err(|_| EINVAL)?;
        // SAFETY: `tick` takes what `data` is, which stays until the thread has been stopped.
        let ticker = unsafe { bindings::dlh_ticker_start(Some(tick::<T>), data, period) };
        let ticker = from_err_ptr(ticker)?;
        // INVARIANT: Just started.
        Ok(Self { ticker: NonNull::new(ticker).ok_or(ENOMEM)?, _target: target })
    }

    /// There is something to look at. Any context.
    pub fn wake(&self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_ticker_wake(self.ticker.as_ptr()) }
    }
}

impl<T: Tick> Drop for Ticker<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; may sleep here.
        unsafe { bindings::dlh_ticker_stop(self.ticker.as_ptr()) }
    }
}

/// # Safety
///
/// `data` is what the thread was started with.
unsafe extern "C" fn tick<T: Tick>(data: *mut c_void) -> bool {
    // SAFETY: By the caller's promise; kept alive by `Ticker`.
    unsafe { &*data.cast::<T>() }.tick()
}

/// How often the host's timer interrupt makes every vCPU exit that runs; `None` if there are CPUs where
/// it does not (`nohz_full`).
pub fn timer_tick() -> Option<Delta> {
    // SAFETY: May be called anywhere.
    match unsafe { bindings::dlh_tick_period_us() } {
        0 => None,
        us => Some(Delta::from_micros(us.into())),
    }
}

/// Makes `task`, or `all` threads of its process, enter the kernel, if they are running, in a guest or
/// elsewhere. Any context.
pub fn kick(task: &Task, all: bool) {
    // SAFETY: The task is alive as long as the reference.
    unsafe { bindings::dlh_task_kick(task.as_ptr().cast(), all) }
}
