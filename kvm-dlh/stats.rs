// SPDX-License-Identifier: GPL-2.0

//! What has happened in one VM, counted.
//!
//! The law: submitted = executed + declined + dropped + pending. An entry is submitted when the host
//! first sees it, and then is in exactly one of the four states.

use dlh_abi::{Error as CallError, Status};
use kernel::{
    fmt,
    sync::atomic::{ordering::Relaxed, Atomic},
};

const FIRST_ERROR: u16 = CallError::Refused as u16;

/// Names of the error counters, in the order of the numbers in the header.
const ERROR_NAMES: [&str; 11] = [
    "refused",
    "function",
    "align",
    "size",
    "memory",
    "noring",
    "operation",
    "argument",
    "busy",
    "nomem",
    "gone",
];

/// The counters of a VM. Any context.
pub(crate) struct Stats {
    submitted: Atomic<u64>,
    executed: Atomic<u64>,
    declined: Atomic<u64>,
    dropped: Atomic<u64>,
    inserted: Atomic<u64>,
    drains: Atomic<u64>,
    kicks: Atomic<u64>,
    hypercalls: Atomic<u64>,
    rings_set_up: Atomic<u64>,
    rings_broken: Atomic<u64>,
    errors: [Atomic<u64>; ERROR_NAMES.len()],
}

/// One thing to count.
#[derive(Clone, Copy)]
pub(crate) enum Event {
    /// A trap-inserted call.
    Inserted,
    /// A look at a ring.
    Drain,
    /// A kick.
    Kick,
    /// Any hypercall of ours.
    Hypercall,
    /// A ring was set up.
    RingSetUp,
    /// A ring was detached because of what was found in it.
    RingBroken,
}

impl Stats {
    pub(crate) fn new() -> Self {
        Self {
            submitted: Atomic::new(0),
            executed: Atomic::new(0),
            declined: Atomic::new(0),
            dropped: Atomic::new(0),
            inserted: Atomic::new(0),
            drains: Atomic::new(0),
            kicks: Atomic::new(0),
            hypercalls: Atomic::new(0),
            rings_set_up: Atomic::new(0),
            rings_broken: Atomic::new(0),
            errors: [const { Atomic::new(0) }; ERROR_NAMES.len()],
        }
    }

    /// `n` entries were seen for the first time.
    pub(crate) fn submitted(&self, n: u32) {
        self.submitted.add(u64::from(n), Relaxed);
    }

    /// `n` entries were executed.
    pub(crate) fn executed(&self, n: u32) {
        self.executed.add(u64::from(n), Relaxed);
    }

    /// `n` entries were seen and then lost with their ring.
    pub(crate) fn dropped(&self, n: u32) {
        self.dropped.add(u64::from(n), Relaxed);
    }

    /// One entry ended with `status`.
    pub(crate) fn ended(&self, status: Status) {
        if status.is_ok() {
            self.executed(1);
        } else {
            self.declined.add(1, Relaxed);
            self.error(status);
        }
    }

    /// A function or an entry ended with an error.
    pub(crate) fn error(&self, status: Status) {
        let index = status.0.unsigned_abs().wrapping_sub(u32::from(FIRST_ERROR));
        if let Some(counter) = self.errors.get(index as usize) {
            counter.add(1, Relaxed);
        }
    }

    /// Something happened.
    pub(crate) fn count(&self, event: Event) {
        match event {
            Event::Inserted => &self.inserted,
            Event::Drain => &self.drains,
            Event::Kick => &self.kicks,
            Event::Hypercall => &self.hypercalls,
            Event::RingSetUp => &self.rings_set_up,
            Event::RingBroken => &self.rings_broken,
        }
        .add(1, Relaxed);
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let get = |counter: &Atomic<u64>| counter.load(Relaxed);
        // What ends is read before what begins, so that `pending` is never negative.
        let (executed, declined, dropped) =
            (get(&self.executed), get(&self.declined), get(&self.dropped));
        let submitted = get(&self.submitted);
        let pending = submitted.saturating_sub(executed + declined + dropped);
        for (name, value) in [
            ("submitted", submitted),
            ("executed", executed),
            ("declined", declined),
            ("dropped", dropped),
            ("pending", pending),
            ("inserted", get(&self.inserted)),
            ("drains", get(&self.drains)),
            ("kicks", get(&self.kicks)),
            ("hypercalls", get(&self.hypercalls)),
            ("rings_set_up", get(&self.rings_set_up)),
            ("rings_broken", get(&self.rings_broken)),
        ] {
            writeln!(f, "{name} {value}")?;
        }
        for (name, counter) in ERROR_NAMES.iter().zip(&self.errors) {
            writeln!(f, "errors_{name} {}", get(counter))?;
        }
        Ok(())
    }
}
