// SPDX-License-Identifier: GPL-2.0

//! What has happened to the free pages of one VM, counted in pages.

use counters::{counters, Counters};
use kernel::{
    fmt,
    sync::atomic::{ordering::Relaxed, Atomic},
};
use kvm_merge::Verdict;

/// In the order of their numbers.
const VERDICTS: [(Verdict, &str); 13] = [
    (Verdict::Merged, "merged_pages"),
    (Verdict::NoMemslot, "skipped_memslot"),
    (Verdict::ReadOnly, "skipped_readonly"),
    (Verdict::Private, "skipped_private"),
    (Verdict::Kind, "skipped_kind"),
    (Verdict::PfnMap, "skipped_pfnmap"),
    (Verdict::Locked, "skipped_locked"),
    (Verdict::Userfault, "skipped_uffd"),
    (Verdict::Pinned, "skipped_pinned"),
    (Verdict::Partial, "skipped_partial"),
    (Verdict::File, "skipped_file"),
    (Verdict::Busy, "skipped_busy"),
    (Verdict::Hugetlb, "skipped_hugetlb"),
];

const _: () = {
    let mut number = 0;
    while number < VERDICTS.len() {
        assert!(VERDICTS[number].0 as usize == number);
        number += 1;
    }
};

/// Spans after which merged pages came back, in milliseconds, shortest first.
const SPANS: [(u32, &str); 3] = [(1_000, "1s"), (10_000, "10s"), (100_000, "100s")];

counters! {
    /// One thing to count.
    enum Event {
        /// The worker has taken a request.
        Request = "requests",
        /// A request was declined for want of room.
        Busy = "busy",
        /// A request was declined because root does not allow it.
        Policy = "declined_policy",
        /// A request was declined because the VM has assigned devices.
        Assigned = "refused_assigned_devices",
        /// A page of the requests that the worker has taken.
        Reported = "reported_pages",
        /// A run was to be released.
        Run = "runs",
    }
}

/// The counters of a VM. Any context.
pub(crate) struct Stats {
    events: Counters<Event>,
    verdicts: [Atomic<u64>; VERDICTS.len()],
    came_back: Atomic<u64>,
    /// How many came back within each span, and not within the one before.
    spans: [Atomic<u64>; SPANS.len()],
}

impl Stats {
    pub(crate) fn new() -> Self {
        Self {
            events: Counters::new(),
            verdicts: [const { Atomic::new(0) }; VERDICTS.len()],
            came_back: Atomic::new(0),
            spans: [const { Atomic::new(0) }; SPANS.len()],
        }
    }

    /// The worker has taken requests, for `pages` pages together.
    pub(crate) fn reported(&self, requests: u64, pages: u64) {
        self.events.add(Event::Request, requests);
        self.events.add(Event::Reported, pages);
    }

    /// A request was declined for want of room.
    pub(crate) fn busy(&self) {
        self.events.count(Event::Busy);
    }

    /// Requests were declined because root does not allow it.
    pub(crate) fn policy(&self, requests: u64) {
        self.events.add(Event::Policy, requests);
    }

    /// A request was declined because the VM has assigned devices.
    pub(crate) fn assigned(&self) {
        self.events.count(Event::Assigned);
    }

    /// So many runs are about to be released.
    pub(crate) fn runs(&self, n: u64) {
        self.events.add(Event::Run, n);
    }

    /// This became of `pages` pages.
    pub(crate) fn judged(&self, pages: u64, verdict: Verdict) {
        if let Some(counter) = self.verdicts.get(verdict as usize) {
            counter.add(pages, Relaxed);
        }
    }

    /// A merged page came back after `age` milliseconds.
    pub(crate) fn came_back(&self, age: u32) {
        self.came_back.add(1, Relaxed);
        for ((span, _), counter) in SPANS.iter().zip(&self.spans) {
            if age < *span {
                counter.add(1, Relaxed);
                break;
            }
        }
    }

    /// Writes `name value` lines.
    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.events.iter() {
            writeln!(f, "{name} {value}")?;
        }
        let mut merged = 0;
        for ((verdict, name), counter) in VERDICTS.iter().zip(&self.verdicts) {
            let pages = counter.load(Relaxed);
            if *verdict == Verdict::Merged {
                merged = pages;
            }
            writeln!(f, "{name} {pages}")?;
        }
        writeln!(f, "came_back_pages {}", self.came_back.load(Relaxed))?;
        let mut within: u64 = 0;
        for ((_, name), counter) in SPANS.iter().zip(&self.spans) {
            within = within.wrapping_add(counter.load(Relaxed));
            writeln!(f, "came_back_{name} {within}")?;
            let share = within.saturating_mul(1000).checked_div(merged).unwrap_or(0);
            writeln!(f, "came_back_{name}_permille {share}")?;
        }
        Ok(())
    }
}
