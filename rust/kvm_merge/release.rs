// SPDX-License-Identifier: GPL-2.0

//! What may be released is; what may not is named, with the reason (DESIGN.md rule 3).
//!
//! Releasing is zapping: the page table entry goes and the page with it. A read then maps the shared
//! zero page, a write gets a zeroed page of its own: a merge into the zero page, done when it is
//! looked at.

use dlh_abi::{Gfn, GfnRange, PAGE_SIZE};
use dlh_bindings as bindings;
use kernel::{
    current,
    mm::{virt::VmaRef, MmWithUser},
};
use kvm_vm::{Hva, Memslots, SlotError, Span};

/// Pages released under one hold of the mmap lock and of the memslots: 32 MiB.
const CHUNK_PAGES: u64 = 8192;

/// What became of some guest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Released: they read as zeroes now.
    Merged,
    /// Kept: no memslot, or not one the VMM made.
    NoMemslot,
    /// Kept: the memslot is read-only.
    ReadOnly,
    /// Kept: the memslot is backed by guest_memfd.
    Private,
    /// Kept: not private anonymous memory.
    Kind,
    /// Kept: locked in memory.
    Locked,
    /// Kept: armed for userfaultfd.
    Userfault,
    /// Kept: pinned for DMA.
    Pinned,
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

/// Releases what may be released of `frames`, and says of each part what became of it; nothing is said of
/// what is left because a signal is pending. The guest must not be using them.
///
/// `lock` locks the memslots; they are let go of from time to time, so that changing them never waits
/// for more than [`CHUNK_PAGES`].
///
/// # Context
///
/// A thread of the VMM; may sleep; takes the mmap lock for reading.
pub fn release<'a>(
    lock: impl Fn() -> Memslots<'a>,
    frames: GfnRange,
    mut tell: impl FnMut(GfnRange, Verdict),
) {
    let mut next = frames.start();
    // A VMM that is being killed does not wait for this.
    while next < frames.end() && !current!().signal_pending() {
        let pages = (frames.end().0 - next.0).min(CHUNK_PAGES);
        // Never fails: a part of a valid range is valid.
        let Ok(chunk) = GfnRange::new(next, pages) else { return };
        let slots = lock();
        let done = release_chunk(&slots, chunk, &mut tell);
        next = Gfn(next.0 + done);
    }
}

/// Deals with the front of `chunk`; returns how many pages that were, at least one.
fn release_chunk(
    slots: &Memslots<'_>,
    chunk: GfnRange,
    tell: &mut impl FnMut(GfnRange, Verdict),
) -> u64 {
    let span = match slots.translate(chunk) {
        Ok(span) if slots.vm().is_current() => span,
        Ok(_) => {
            tell(chunk, Verdict::NoMemslot);
            return chunk.pages();
        }
        // The slot has changed since the pages were reported.
        Err(e) => {
            tell(chunk, e.into());
            return chunk.pages();
        }
    };
    match current!().mm() {
        Some(mm) => release_span(mm, span, tell),
        None => tell(span.frames, Verdict::NoMemslot),
    }
    span.frames.pages()
}

fn release_span(mm: &MmWithUser, span: Span, tell: &mut impl FnMut(GfnRange, Verdict)) {
    let mmap = mm.mmap_read_lock();
    // SAFETY: The mm is alive.
    let has_pinned = unsafe { bindings::dlh_mm_has_pinned(mm.as_raw().cast()) };
    let Hva(base) = span.hva;
    let mut done = 0;
    while done < span.frames.pages() {
        let address = base + (done * PAGE_SIZE) as usize;
        let rest = span.frames.pages() - done;
        let (pages, verdict) = match mmap.vma_lookup(address) {
            Some(vma) => {
                let here = (vma.end() - address) as u64 / PAGE_SIZE;
                release_in_vma(vma, address, rest.min(here), has_pinned)
            }
            // Nothing is mapped there, so there is nothing to release.
            None => {
                // SAFETY: The lock is held.
                let bytes = unsafe { bindings::dlh_unmapped_bytes(mm.as_raw().cast(), address) };
                (rest.min((bytes as u64).div_ceil(PAGE_SIZE)).max(1), Verdict::NoMemslot)
            }
        };
        if let Ok(part) = GfnRange::new(Gfn(span.frames.start().0 + done), pages) {
            tell(part, verdict);
        }
        done += pages;
    }
}

/// Deals with the front of the `pages` pages at `address`, which lie in `vma`.
fn release_in_vma(vma: &VmaRef, address: usize, pages: u64, has_pinned: bool) -> (u64, Verdict) {
    // SAFETY: A `VmaRef` exists only while its mmap lock is held.
    match unsafe { bindings::dlh_vma_judge(vma.as_ptr().cast()) } {
        bindings::dlh_vma_DLH_VMA_USABLE => {}
        bindings::dlh_vma_DLH_VMA_LOCKED => return (pages, Verdict::Locked),
        bindings::dlh_vma_DLH_VMA_UFFD => return (pages, Verdict::Userfault),
        _ => return (pages, Verdict::Kind),
    }
    let mut pages = pages;
    if has_pinned {
        // SAFETY: The range lies in a VMA of `current->mm`, whose lock is held.
        pages = unsafe { bindings::dlh_unpinned_pages(address, pages as usize) } as u64;
        if pages == 0 {
            return (1, Verdict::Pinned);
        }
    }
    vma.zap_vma_range(address, (pages * PAGE_SIZE) as usize);
    (pages, Verdict::Merged)
}
