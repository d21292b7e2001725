// SPDX-License-Identifier: GPL-2.0

//! What has happened to the free pages of one VM, counted in pages.

use kernel::{
    fmt,
    sync::atomic::{ordering::Relaxed, Atomic},
};
use kvm_merge::Verdict;

const VERDICTS: [(Verdict, &str); 8] = [
    (Verdict::Merged, "merged_pages"),
    (Verdict::NoMemslot, "skipped_memslot"),
    (Verdict::ReadOnly, "skipped_readonly"),
    (Verdict::Private, "skipped_private"),
    (Verdict::Kind, "skipped_kind"),
    (Verdict::Locked, "skipped_locked"),
    (Verdict::Userfault, "skipped_uffd"),
    (Verdict::Pinned, "skipped_pinned"),
];

/// The counters of a VM. Any context.
pub(crate) struct Stats {
    requests: Atomic<u64>,
    busy: Atomic<u64>,
    reported: Atomic<u64>,
    runs: Atomic<u64>,
    verdicts: [Atomic<u64>; VERDICTS.len()],
}

impl Stats {
    pub(crate) fn new() -> Self {
        Self {
            requests: Atomic::new(0),
            busy: Atomic::new(0),
            reported: Atomic::new(0),
            runs: Atomic::new(0),
            verdicts: [const { Atomic::new(0) }; VERDICTS.len()],
        }
    }

    /// A request for `pages` pages was accepted.
    pub(crate) fn reported(&self, pages: u64) {
        self.requests.add(1, Relaxed);
        self.reported.add(pages, Relaxed);
    }

    /// A request was declined for want of room.
    pub(crate) fn busy(&self) {
        self.busy.add(1, Relaxed);
    }

    /// One run is about to be released.
    pub(crate) fn run(&self) {
        self.runs.add(1, Relaxed);
    }

    /// This became of `pages` pages.
    pub(crate) fn judged(&self, pages: u64, verdict: Verdict) {
        for ((kind, _), counter) in VERDICTS.iter().zip(&self.verdicts) {
            if *kind == verdict {
                counter.add(pages, Relaxed);
            }
        }
    }

    /// Writes `name value` lines.
    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, counter) in [
            ("requests", &self.requests),
            ("busy", &self.busy),
            ("reported_pages", &self.reported),
            ("runs", &self.runs),
        ] {
            writeln!(f, "{name} {}", counter.load(Relaxed))?;
        }
        for ((_, name), counter) in VERDICTS.iter().zip(&self.verdicts) {
            writeln!(f, "{name} {}", counter.load(Relaxed))?;
        }
        Ok(())
    }
}
