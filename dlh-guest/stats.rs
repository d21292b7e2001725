// SPDX-License-Identifier: GPL-2.0

//! What has happened, counted.

use counters::{counters, Counters};
use kernel::fmt;

/// The counters. Any context.
pub(crate) struct Stats(Counters<Event>);

impl Stats {
    pub(crate) fn new() -> Self {
        Self(Counters::new())
    }

    /// Something happened.
    pub(crate) fn count(&self, event: Event) {
        self.0.count(event);
    }

    /// Something happened `n` times.
    pub(crate) fn add(&self, event: Event, n: u64) {
        self.0.add(event, n);
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.0.iter() {
            writeln!(f, "{name} {value}")?;
        }
        Ok(())
    }
}

counters! {
    /// One thing to count.
    pub(crate) enum Event {
        /// The page allocator handed over a list of ranges.
        Report = "reports",
        /// The host is done with a range and executed it.
        Range = "ranges",
        /// Pages in ranges that were named to the host.
        Page = "pages",
        /// A batch was waited for.
        Wait = "waits",
        /// Microseconds that was waited.
        WaitUs = "wait_us",
        /// The host was called because it had not come by, or had detached the ring.
        Kick = "kicks",
        /// It had not come by.
        Timeout = "timeouts",
        /// A ring was full in the middle of a report.
        Full = "full",
        /// The host is done with a range and did not execute it.
        Declined = "declined",
        /// A range was handed over without a ring.
        Synchronous = "synchronous",
        /// A batch ended with its ring.
        Lost = "lost",
        /// A report failed: its pages are reported again later.
        Failed = "failed",
        /// A report was put off to keep the pace.
        Paced = "paced",
        /// A ring was set up.
        SetUp = "setups",
        /// A ring could not be set up.
        SetUpFailed = "setups_failed",
        /// An event for the host's trace was placed.
        Traced = "traced",
        /// The host has said whether it wants all reports once more.
        Asked = "asked",
        /// All that is free is reported once more.
        Again = "again",
        /// A free block is to be reported once more.
        Unmarked = "unmarked",
        /// Microseconds spent on that.
        UnmarkUs = "unmark_us",
    }
}
