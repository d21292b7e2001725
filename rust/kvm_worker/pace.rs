// SPDX-License-Identifier: GPL-2.0

//! How much a worker may do.

use dlh_bindings as bindings;
use kernel::{
    sync::atomic::{ordering::Relaxed, Atomic},
    time::{Instant, Monotonic},
};

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
