// SPDX-License-Identifier: GPL-2.0

//! What has happened, counted.

use kernel::{
    fmt,
    sync::atomic::{ordering::Relaxed, Atomic},
};

/// One thing to count. The discriminant is its place in [`NAMES`].
#[derive(Clone, Copy)]
pub(crate) enum Event {
    /// The page allocator handed over a list of ranges.
    Report,
    /// The host is done with a range and executed it.
    Range,
    /// Pages in ranges that were named to the host.
    Page,
    /// A batch was waited for.
    Wait,
    /// Microseconds that was waited.
    WaitUs,
    /// The host was called because it had not come by, or had detached the ring.
    Kick,
    /// It had not come by.
    Timeout,
    /// A ring was full in the middle of a report.
    Full,
    /// The host is done with a range and did not execute it.
    Declined,
    /// A range was handed over without a ring.
    Synchronous,
    /// A batch ended with its ring.
    Lost,
    /// A report failed: its pages are reported again later.
    Failed,
    /// A report was put off to keep the pace.
    Paced,
    /// A ring was set up.
    SetUp,
    /// A ring could not be set up.
    SetUpFailed,
    /// An event for the host's trace was placed.
    Traced,
    /// The host has said whether it wants all reports once more.
    Asked,
    /// All that is free is reported once more.
    Again,
    /// A free block is to be reported once more.
    Unmarked,
    /// Microseconds spent on that.
    UnmarkUs,
}

const NAMES: [&str; 20] = [
    "reports",
    "ranges",
    "pages",
    "waits",
    "wait_us",
    "kicks",
    "timeouts",
    "full",
    "declined",
    "synchronous",
    "lost",
    "failed",
    "paced",
    "setups",
    "setups_failed",
    "traced",
    "asked",
    "again",
    "unmarked",
    "unmark_us",
];

/// The counters. Any context.
pub(crate) struct Stats([Atomic<u64>; NAMES.len()]);

impl Stats {
    pub(crate) fn new() -> Self {
        Self([const { Atomic::new(0) }; NAMES.len()])
    }

    /// Something happened.
    pub(crate) fn count(&self, event: Event) {
        self.add(event, 1);
    }

    /// Something happened `n` times.
    pub(crate) fn add(&self, event: Event, n: u64) {
        self.0[event as usize].add(n, Relaxed);
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, counter) in NAMES.iter().zip(&self.0) {
            writeln!(f, "{name} {}", counter.load(Relaxed))?;
        }
        Ok(())
    }
}
