// SPDX-License-Identifier: GPL-2.0

//! The pace of reporting: a token bucket that holds what may be reported in a second.
//!
//! A report is handed over as a whole and may empty the bucket further than it was full: the next one
//! waits until that is made up for.

use kernel::{
    sync::atomic::{ordering::Relaxed, Atomic},
    time::{Instant, Monotonic, NSEC_PER_MSEC, NSEC_PER_SEC},
};

/// The bucket is given that much time to fill when it is empty, so that what there is to report is not
/// looked at for each block.
const PAUSE_NS: i64 = 100 * NSEC_PER_MSEC;

/// The bucket. It is kept as a time: the one at which it was, or will be, empty.
pub(crate) struct Pace {
    mib_per_second: u32,
    begin: Instant<Monotonic>,
    /// In nanoseconds after `begin`. There is one report at a time, so nobody else changes it meanwhile.
    empty_at: Atomic<i64>,
}

impl Pace {
    /// A full bucket; one that is never empty if `mib_per_second` is 0.
    pub(crate) fn new(mib_per_second: u32) -> Self {
        let empty_at = Atomic::new(-NSEC_PER_SEC);
        Self { mib_per_second, begin: Instant::now(), empty_at }
    }

    fn now(&self) -> i64 {
        self.begin.elapsed().as_nanos()
    }

    /// Whether something may be reported.
    ///
    /// # Errors
    ///
    /// Milliseconds after which to ask again.
    pub(crate) fn check(&self) -> Result<(), u32> {
        if self.mib_per_second == 0 {
            return Ok(());
        }
        let debt = self.empty_at.load(Relaxed) - self.now();
        if debt < 0 {
            return Ok(());
        }
        Err(u32::try_from((debt + PAUSE_NS) / NSEC_PER_MSEC).unwrap_or(u32::MAX))
    }

    /// So much has been reported.
    pub(crate) fn spend(&self, bytes: u64) {
        if self.mib_per_second == 0 {
            return;
        }
        let a_second = u64::from(self.mib_per_second) << 20;
        let cost = bytes.saturating_mul(NSEC_PER_SEC.unsigned_abs()) / a_second;
        let full = self.now() - NSEC_PER_SEC;
        let empty_at = self.empty_at.load(Relaxed).max(full).saturating_add_unsigned(cost);
        self.empty_at.store(empty_at, Relaxed);
    }
}
