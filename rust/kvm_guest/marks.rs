// SPDX-License-Identifier: GPL-2.0

//! The page allocator's marks on free blocks that have been reported: taken off, the blocks are reported once
//! more, if the allocator is told to look ([`PageReporting::again`](crate::PageReporting::again)).
//!
//! C headers: `include/linux/page-flags.h`, `include/linux/mmzone.h`, `include/linux/memory.h`.

use dlh_bindings as bindings;
use kernel::{error::to_result, prelude::*};

/// Takes marks off.
///
/// # Invariants
///
/// The kernel tells of memory that goes: until then its descriptors stay.
pub struct Marks(());

/// A way through all of memory, from the first page to the last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sweep {
    next: u64,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swept {
    /// There is more.
    Part,
    /// There is more, but memory is going just now: later.
    Held,
    /// That was all.
    All,
}

impl Marks {
    /// There is one at a time: the driver's. May sleep.
    ///
    /// # Errors
    ///
    /// As registering a notifier.
    pub fn new() -> Result<Self> {
        // SAFETY: May sleep here.
        to_result(unsafe { bindings::dlh_guest_marks_watch() })?;
        // INVARIANT: Just registered.
        Ok(Self(()))
    }

    /// Goes on with `sweep` for at most `blocks` pageblocks (2 MiB). Returns how many free blocks have lost their
    /// mark. A zone's lock is held for one pageblock at a time. May sleep.
    pub fn clear(&self, sweep: &mut Sweep, blocks: u32) -> (u64, Swept) {
        let mut sum = 0;
        // SAFETY: May be called anywhere.
        let end = unsafe { bindings::dlh_guest_marks_end() };
        for _ in 0..blocks {
            if sweep.next >= end {
                return (sum, Swept::All);
            }
            let mut unmarked = 0;
            // SAFETY: May sleep here; by the type invariant memory that goes is waited for.
            let next = unsafe { bindings::dlh_guest_unmark(sweep.next, &mut unmarked) };
            sum += u64::from(unmarked);
            if next == sweep.next {
                return (sum, Swept::Held);
            }
            sweep.next = next;
        }
        (sum, Swept::Part)
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; may sleep here.
        unsafe { bindings::dlh_guest_marks_unwatch() }
    }
}
