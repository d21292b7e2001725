// SPDX-License-Identifier: GPL-2.0

//! How much one drain may do before the vCPU goes on.

use kernel::time::{Delta, Instant, Monotonic};

/// The bounds of a drain. At least one entry is executed.
#[derive(Clone, Copy)]
pub(crate) struct Budget {
    /// Entries.
    pub(crate) entries: u32,
    /// Time, looked at after every 8 entries that are more than a NOP, and after every 32 NOPs.
    pub(crate) time: Delta,
}

impl Budget {
    /// A clock that is not running yet: telling the time costs more than a few entries do.
    #[inline]
    pub(crate) fn clock(&self) -> Clock {
        Clock { time: self.time, begun: None }
    }
}

/// Tells when the time of a drain is over.
pub(crate) struct Clock {
    time: Delta,
    begun: Option<Instant<Monotonic>>,
}

impl Clock {
    /// Starts it, if it does not run yet.
    pub(crate) fn start(&mut self) {
        if self.begun.is_none() {
            self.begun = Some(Instant::now());
        }
    }

    /// Whether it has been running for too long.
    #[inline]
    pub(crate) fn is_over(&self) -> bool {
        self.begun.is_some_and(|begun| begun.elapsed().as_nanos() >= self.time.as_nanos())
    }
}
