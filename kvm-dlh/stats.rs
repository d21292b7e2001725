// SPDX-License-Identifier: GPL-2.0

//! What has happened in one VM, counted.
//!
//! The law: submitted = executed + declined + dropped + pending. An entry is submitted when the host
//! first sees it, and then is in exactly one of the four states.

use core::array;

use counters::{counters, Counters};
use dlh_abi::{Error as CallError, Operation, Status};
use kernel::fmt;
use kvm_hooks::inline_atomic::{AtomicU64, Ordering::Relaxed};
use kvm_registry::MAX_OPERATIONS;

const FIRST_ERROR: u16 = CallError::Refused as u16;

/// Names of the error counters, in the order of the numbers in the header.
const ERROR_NAMES: [&str; 12] = [
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
    "again",
];

/// The counters of a VM. Any context.
pub(crate) struct Stats {
    submitted: AtomicU64,
    executed: AtomicU64,
    declined: AtomicU64,
    dropped: AtomicU64,
    events: Counters<Event>,
    errors: [AtomicU64; ERROR_NAMES.len()],
    operations: [Ended; MAX_OPERATIONS],
}

/// Calls of one operation that have ended.
#[derive(Default)]
struct Ended {
    executed: AtomicU64,
    declined: AtomicU64,
}

counters! {
    /// One thing to count.
    pub(crate) enum Event {
        /// A trap-inserted call.
        Inserted = "inserted",
        /// A look at a ring.
        Drain = "drains",
        /// A kick.
        Kick = "kicks",
        /// Any hypercall of ours.
        Hypercall = "hypercalls",
        /// A ring was set up.
        RingSetUp = "rings_set_up",
        /// A ring was detached because of what was found in it.
        RingBroken = "rings_broken",
        /// A ring was detached because its memory had gone, or did not come.
        RingLost = "rings_lost",
        /// A vCPU was made to exit because an entry had waited for long.
        DeferKick = "defer_kicks",
    }
}

impl Stats {
    pub(crate) fn new() -> Self {
        Self {
            submitted: AtomicU64::new(0),
            executed: AtomicU64::new(0),
            declined: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            events: Counters::new(),
            errors: array::from_fn(|_| AtomicU64::new(0)),
            operations: array::from_fn(|_| Ended::default()),
        }
    }

    /// `n` entries were seen for the first time.
    pub(crate) fn submitted(&self, n: u32) {
        self.submitted.fetch_add(u64::from(n), Relaxed);
    }

    /// `n` NOPs were seen and executed.
    #[inline]
    pub(crate) fn executed_nops(&self, n: u32) {
        let n = u64::from(n);
        self.submitted.fetch_add(n, Relaxed);
        self.operations[usize::from(Operation::NOP.0)].executed.fetch_add(n, Relaxed);
        self.executed.fetch_add(n, Relaxed);
    }

    /// `n` entries were seen and then lost with their ring.
    pub(crate) fn lost(&self, n: u32) {
        self.submitted(n);
        self.dropped(n);
    }

    /// `n` entries that were submitted are lost with their ring.
    pub(crate) fn dropped(&self, n: u32) {
        self.dropped.fetch_add(u64::from(n), Relaxed);
    }

    /// One entry, of operation `op`, ended with `status`.
    pub(crate) fn ended(&self, op: Operation, status: Status) {
        if status.is_ok() {
            self.executed_all(op, 1);
            return;
        }
        let operation = self.operations.get(usize::from(op.0));
        operation.inspect(|ended| _ = ended.declined.fetch_add(1, Relaxed));
        self.declined.fetch_add(1, Relaxed);
        self.error(status);
    }

    /// `n` entries of operation `op` were executed.
    pub(crate) fn executed_all(&self, op: Operation, n: u32) {
        let operation = self.operations.get(usize::from(op.0));
        operation.inspect(|ended| _ = ended.executed.fetch_add(u64::from(n), Relaxed));
        self.executed.fetch_add(u64::from(n), Relaxed);
    }

    /// A function or an entry ended with an error.
    pub(crate) fn error(&self, status: Status) {
        let index = status.0.unsigned_abs().wrapping_sub(u32::from(FIRST_ERROR));
        if let Some(counter) = self.errors.get(index as usize) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Something happened.
    #[inline]
    pub(crate) fn count(&self, event: Event) {
        self.events.count(event);
    }

    /// Writes a line for each operation that has been called: its number, how many of its calls were
    /// executed, and how many were declined.
    pub(crate) fn show_operations(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, ended) in self.operations.iter().enumerate() {
            let (executed, declined) = (ended.executed.load(Relaxed), ended.declined.load(Relaxed));
            if executed + declined > 0 {
                writeln!(f, "{number} executed={executed} declined={declined}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
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
        ] {
            writeln!(f, "{name} {value}")?;
        }
        for (name, value) in self.events.iter() {
            writeln!(f, "{name} {value}")?;
        }
        for (name, counter) in ERROR_NAMES.iter().zip(&self.errors) {
            writeln!(f, "errors_{name} {}", get(counter))?;
        }
        Ok(())
    }
}
