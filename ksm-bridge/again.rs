// SPDX-License-Identifier: GPL-2.0

//! Whether a guest is to report all that is free once more.
//!
//! Its allocator reports a free block once. So what was reported to another host, was kept for a reason that
//! has passed, or has come back because somebody read it, stays as it is until the guest uses it. A guest asks from
//! time to time; what it is told is decided when it asks.

use kernel::sync::atomic::{
    ordering::{Full, Relaxed},
    Atomic,
};

/// Milliseconds until a guest that was told to report once more is told so again, for reasons that may be there
/// for ever. Twice as long each time.
const FIRST_GAP_MS: i64 = 60_000;
/// The longest.
const LONGEST_GAP_MS: i64 = 3_600_000;

/// What is known of one VM. Any context.
pub(crate) struct Again {
    /// Somebody wants it, whatever else is the case.
    wanted: Atomic<bool>,
    /// Something was kept that may be released at another time.
    kept: Atomic<bool>,
    /// How often the guest was told so.
    told: Atomic<u64>,
    /// Before this time it is told so only if somebody wants it.
    not_before: Atomic<i64>,
    gap_ms: Atomic<i64>,
}

impl Again {
    /// Nothing is known of what the guest has reported before.
    pub(crate) fn new() -> Self {
        Self {
            wanted: Atomic::new(true),
            kept: Atomic::new(false),
            told: Atomic::new(0),
            not_before: Atomic::new(0),
            gap_ms: Atomic::new(FIRST_GAP_MS),
        }
    }

    /// The next time the guest asks it is told to report once more.
    pub(crate) fn want(&self) {
        self.wanted.store(true, Relaxed);
    }

    /// Pages were kept that may be released at another time.
    pub(crate) fn kept(&self) {
        self.kept.store(true, Relaxed);
    }

    /// How often the guest was told to report once more.
    pub(crate) fn told(&self) -> u64 {
        self.told.load(Relaxed)
    }

    /// The guest asks, at `now`, in milliseconds; `refilled` finds out whether much of what was released is there
    /// again. Returns whether it is to report once more. Two vCPUs that ask at the same time may both be told so.
    pub(crate) fn answer(&self, now: i64, refilled: impl FnOnce() -> bool) -> bool {
        if self.wanted.xchg(false, Full) {
            // At first there is nothing that could have come back while it reports.
            if self.told() > 0 {
                self.not_before.store(now + FIRST_GAP_MS, Relaxed);
            }
        } else if now < self.not_before.load(Relaxed) {
            return false;
        } else if self.kept.load(Relaxed) || refilled() {
            let gap = self.gap_ms.load(Relaxed);
            self.not_before.store(now + gap, Relaxed);
            self.gap_ms.store(LONGEST_GAP_MS.min(2 * gap), Relaxed);
        } else {
            self.gap_ms.store(FIRST_GAP_MS, Relaxed);
            return false;
        }
        self.kept.store(false, Relaxed);
        self.told.add(1, Relaxed);
        true
    }
}
