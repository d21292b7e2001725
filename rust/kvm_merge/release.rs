// SPDX-License-Identifier: GPL-2.0

//! What may be released is; what may not is named, with the reason (DESIGN.md rule 3).
//!
//! Releasing takes the page out of the page tables, and out of the file behind them if there is one: a read
//! then finds zeroes, a write gets a zeroed page of its own. Of private anonymous memory a read maps the
//! shared zero page: a merge into it, done when it is looked at.

use dlh_abi::{Gfn, GfnRange};
use kvm_vm::Memslots;
use kvm_worker::{Inside, Turn};

use crate::{
    file::Hole,
    verdict::{Step, Terms, Verdict},
    vma::{self, Front},
};

/// Pages released under one hold of the mmap lock and of the memslots: 32 MiB, unless a page is larger.
const CHUNK_PAGES: u64 = 8192;

/// How often others' locks are still waited for, a millisecond each time, for all that is released at a time.
pub struct Patience {
    mmap: u32,
    file: u32,
}

impl Patience {
    /// A second for the mmap lock: only the VMM's own threads have it, if only for a fault that reads from a slow disk
    /// while somebody waits to change a mapping. A tenth of that for files, which other processes may have, too: they
    /// cannot slow the VM down by more.
    pub fn new() -> Self {
        Self { mmap: 1000, file: 100 }
    }

    /// Waits for what these are tries of, if there are any left.
    fn wait(left: &mut u32, turn: &mut Turn) -> bool {
        let Some(fewer) = left.checked_sub(1) else { return false };
        *left = fewer;
        turn.nap();
        true
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::new()
    }
}

/// Releases what may be released of `runs`, which ascend, and says of each part what became of it. Returns whether it
/// has come to the end: not if the worker is being stopped, if the VMM has ended, or if `terms` or `lock` have had it
/// stop. The guest must not be using them.
///
/// `terms` is asked from time to time, with nothing held; it may sleep, but not wait for a user. `lock` locks the
/// memslots; they are let go of from time to time, so that changing them never waits for much more than
/// [`CHUNK_PAGES`].
///
/// # Context
///
/// A worker; may sleep. Takes the mmap lock for reading, and locks of files, all without waiting for them, but for the
/// hole in a file of hugetlbfs.
pub fn release<'a>(
    turn: &mut Turn,
    patience: &mut Patience,
    terms: impl Fn() -> Option<Terms>,
    lock: impl Fn() -> Option<Memslots<'a>>,
    runs: &[GfnRange],
    mut tell: impl FnMut(GfnRange, Verdict),
) -> bool {
    let mut left = Left::new(runs);
    while left.front().is_some() {
        if !turn.may_go_on() {
            return false;
        }
        let Some(terms) = terms() else { return false };
        let last = {
            let Some(inside) = turn.enter() else { return false };
            let Some(slots) = lock() else { return false };
            release_chunk(&inside, &slots, &mut left, terms, &mut tell)
        };
        let (last, tries) = match last {
            Last::Told => continue,
            Last::Mappings(pages) => (Step { pages, verdict: Verdict::Busy }, &mut patience.mmap),
            Last::File(pages) => (Step { pages, verdict: Verdict::Busy }, &mut patience.file),
            // Nothing is held here.
            Last::Hole(hole) => (hole.punch(), &mut patience.file),
        };
        if last.verdict == Verdict::Busy && Patience::wait(tries, turn) {
            continue;
        }
        left.tell(last, &mut tell);
    }
    true
}

/// What has not been dealt with yet.
struct Left<'a> {
    runs: &'a [GfnRange],
    /// Pages of the first run that have been.
    done: u64,
}

impl<'a> Left<'a> {
    fn new(runs: &'a [GfnRange]) -> Self {
        Self { runs, done: 0 }
    }

    /// What is left of the first run.
    fn front(&self) -> Option<GfnRange> {
        let run = self.runs.first()?;
        // Never fails: what is left of a valid range is valid, and there is some.
        GfnRange::new(Gfn(run.start().0 + self.done), run.pages() - self.done).ok()
    }

    /// Says what became of the next pages, which lie in one run.
    fn tell(&mut self, step: Step, tell: &mut impl FnMut(GfnRange, Verdict)) {
        let Some(front) = self.front() else { return };
        let pages = step.pages.min(front.pages());
        if let Ok(part) = GfnRange::new(front.start(), pages) {
            tell(part, step.verdict);
        }
        self.done += pages;
        if pages == front.pages() {
            self.runs = &self.runs[1..];
            self.done = 0;
        }
    }
}

/// Why a chunk ends; what has been told of before is dealt with.
enum Last {
    /// It is large enough, or nothing is left.
    Told,
    /// The mmap lock that so many pages need cannot be had.
    Mappings(u64),
    /// The lock of a file that so many pages need cannot be had.
    File(u64),
    /// To be done with nothing held.
    Hole(Hole),
}

/// Deals with about [`CHUNK_PAGES`] of what is left.
fn release_chunk(
    inside: &Inside<'_>,
    slots: &Memslots<'_>,
    left: &mut Left<'_>,
    terms: Terms,
    tell: &mut impl FnMut(GfnRange, Verdict),
) -> Last {
    let mut more = CHUNK_PAGES;
    while let Some(front) = left.front().filter(|_| more > 0) {
        let step = match slots.translate(front) {
            Ok(span) if slots.vm().is_current() => {
                match vma::release_front(inside, span, more, terms) {
                    Front::Locked(pages) => return Last::Mappings(pages),
                    Front::Done(Step { pages, verdict: Verdict::Busy }) => {
                        return Last::File(pages)
                    }
                    Front::Done(step) => step,
                    Front::Hole(hole) => return Last::Hole(hole),
                }
            }
            Ok(span) => Step { pages: span.frames.pages(), verdict: Verdict::NoMemslot },
            // The slot has changed since the pages were reported.
            Err(e) => Step { pages: front.pages(), verdict: e.into() },
        };
        more = more.saturating_sub(step.pages);
        left.tell(step, tell);
    }
    Last::Told
}
