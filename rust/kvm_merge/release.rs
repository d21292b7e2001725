// SPDX-License-Identifier: GPL-2.0

//! What may be released is; what may not is named, with the reason (DESIGN.md rule 3).
//!
//! Releasing takes the page out of the page tables, and out of the file behind them if there is one: a read
//! then finds zeroes, a write gets a zeroed page of its own. Of private anonymous memory a read maps the
//! shared zero page: a merge into it, done when it is looked at.

use dlh_abi::{Contents, Gfn, GfnRange};
use kernel::{current, mm::MmWithUser};
use kvm_vm::{Memslots, SlotError, Span};

use crate::vma::{self, Step};

/// Pages released under one hold of the mmap lock and of the memslots: 32 MiB, unless a page is larger.
const CHUNK_PAGES: u64 = 8192;

/// What became of some guest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Released: they read as zeroes now.
    Merged,
    /// Kept: no memslot, nothing mapped there, or not by the VMM.
    NoMemslot,
    /// Kept: the memslot is read-only.
    ReadOnly,
    /// Kept: the memslot is backed by guest_memfd.
    Private,
    /// Kept: neither anonymous memory, shmem nor hugetlbfs, or not readable and writable. Private memory over
    /// a file of another kind is released where the guest does not rely on its contents.
    Kind,
    /// Kept: no ordinary pages.
    PfnMap,
    /// Kept: locked in memory.
    Locked,
    /// Kept: armed for userfaultfd.
    Userfault,
    /// Kept: pinned for DMA.
    Pinned,
    /// Kept: the rest of the huge page is in use, or was not reported together with them.
    Partial,
    /// Kept: a private mapping, and the file behind it has something there, which would be seen then; the guest
    /// relies on not finding it.
    File,
}

/// When the zero page is mapped into the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// When somebody reads there.
    Release,
    /// At once, for private anonymous memory.
    Share,
}

impl From<SlotError> for Verdict {
    fn from(e: SlotError) -> Self {
        match e {
            SlotError::None => Self::NoMemslot,
            SlotError::ReadOnly => Self::ReadOnly,
            SlotError::Private => Self::Private,
        }
    }
}

/// Releases what may be released of `frames`, and says of each part what became of it. Returns whether it has
/// come to the end: not if a signal is pending, as when the VMM is killed or is to be frozen, or if `lock` has had
/// it stop. The guest must not be using them; `contents` is what it relies on finding there afterwards.
///
/// `lock` locks the memslots; they are let go of from time to time, so that changing them never waits
/// for much more than [`CHUNK_PAGES`].
///
/// # Context
///
/// A thread of the VMM; may sleep; takes the mmap lock for reading, and locks of files.
pub fn release<'a>(
    lock: impl Fn() -> Option<Memslots<'a>>,
    frames: GfnRange,
    mode: Mode,
    contents: Contents,
    mut tell: impl FnMut(GfnRange, Verdict),
) -> bool {
    let mut next = frames.start();
    while next < frames.end() {
        if current!().signal_pending() {
            return false;
        }
        // Never fails: what is left of a valid range is valid.
        let Ok(rest) = GfnRange::new(next, frames.end().0 - next.0) else { return false };
        let Some(slots) = lock() else { return false };
        let done = release_chunk(&slots, rest, (mode, contents), &mut tell);
        next = Gfn(next.0 + done);
    }
    true
}

/// Deals with the front of `rest`; returns how many pages that were, at least one.
fn release_chunk(
    slots: &Memslots<'_>,
    rest: GfnRange,
    how: (Mode, Contents),
    tell: &mut impl FnMut(GfnRange, Verdict),
) -> u64 {
    let span = match slots.translate(rest) {
        Ok(span) if slots.vm().is_current() => span,
        Ok(span) => {
            tell(span.frames, Verdict::NoMemslot);
            return span.frames.pages();
        }
        // The slot has changed since the pages were reported.
        Err(e) => {
            tell(rest, e.into());
            return rest.pages();
        }
    };
    match current!().mm() {
        Some(mm) => release_span(mm, span, how, tell),
        None => {
            tell(span.frames, Verdict::NoMemslot);
            span.frames.pages()
        }
    }
}

/// Deals with about [`CHUNK_PAGES`] of `span`; returns how many.
fn release_span(
    mm: &MmWithUser,
    span: Span,
    how: (Mode, Contents),
    tell: &mut impl FnMut(GfnRange, Verdict),
) -> u64 {
    let mut done = 0;
    while done < span.frames.pages().min(CHUNK_PAGES) {
        let step = vma::release_front(mm, span, done, CHUNK_PAGES, how);
        let Step { pages, verdict } = match step {
            // The file's locks are outside the mmap lock, which is not held any more.
            vma::Front::File(piece) => piece.punch(),
            vma::Front::Done(step) => step,
        };
        if let Ok(part) = GfnRange::new(Gfn(span.frames.start().0 + done), pages) {
            tell(part, verdict);
        }
        done += pages;
    }
    done
}
