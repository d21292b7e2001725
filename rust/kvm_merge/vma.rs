// SPDX-License-Identifier: GPL-2.0

//! One VMA at a time: what kind of memory it is, and what that allows.

use dlh_abi::{Contents, PAGE_SIZE};
use dlh_bindings as bindings;
use kernel::mm::{virt::VmaRef, MmWithUser};
use kvm_vm::{Hva, Span};

use crate::{
    file::{File, Piece},
    Mode, Verdict,
};

/// What became of the pages at the front.
pub(crate) struct Step {
    /// How many, at least one.
    pub(crate) pages: u64,
    pub(crate) verdict: Verdict,
}

/// What is to be done about the pages at the front.
pub(crate) enum Front {
    /// Nothing any more.
    Done(Step),
    /// They may be taken out of a file, without the mmap lock.
    File(Piece),
}

/// The largest multiple of `size` that is not above `value`. (Not a division: what it panics with is more
/// than objtool knows.)
pub(crate) fn round_down(value: u64, size: u64) -> u64 {
    value - value.checked_rem(size).unwrap_or(0)
}

fn step(pages: u64, verdict: Verdict) -> Front {
    Front::Done(Step { pages, verdict })
}

/// Deals with the front of what is left of `span` after `done` pages, with at most `most` pages of it or one
/// huge page. `mm` is the current one; its mmap lock is taken meanwhile. With [`Contents::Any`] private copies of a file's
/// pages go, whatever the file holds.
pub(crate) fn release_front(
    mm: &MmWithUser,
    span: Span,
    done: u64,
    most: u64,
    (mode, contents): (Mode, Contents),
) -> Front {
    let mmap = mm.mmap_read_lock();
    let Hva(base) = span.hva;
    let address = base + (done * PAGE_SIZE) as usize;
    let rest = span.frames.pages() - done;
    let Some(vma) = mmap.vma_lookup(address) else {
        // Nothing is mapped there, so there is nothing to release.
        // SAFETY: The lock is held.
        let bytes = unsafe { bindings::dlh_unmapped_bytes(mm.as_raw().cast(), address) };
        return step(rest.min((bytes as u64).div_ceil(PAGE_SIZE)).max(1), Verdict::NoMemslot);
    };
    let here = rest.min((vma.end() - address) as u64 / PAGE_SIZE);
    // SAFETY: A `VmaRef` exists only while its mmap lock is held.
    let kind = unsafe { bindings::dlh_vma_judge(vma.as_ptr().cast()) };
    let kept = match kind {
        bindings::dlh_vma_DLH_VMA_ANONYMOUS
        | bindings::dlh_vma_DLH_VMA_SHARED_FILE
        | bindings::dlh_vma_DLH_VMA_PRIVATE_FILE => None,
        bindings::dlh_vma_DLH_VMA_PRIVATE_OTHER if contents == Contents::Any => None,
        bindings::dlh_vma_DLH_VMA_PFNMAP => Some(Verdict::PfnMap),
        bindings::dlh_vma_DLH_VMA_LOCKED => Some(Verdict::Locked),
        bindings::dlh_vma_DLH_VMA_UFFD => Some(Verdict::Userfault),
        _ => Some(Verdict::Kind),
    };
    if let Some(verdict) = kept {
        return step(here, verdict);
    }

    // SAFETY: As above.
    let page = unsafe { bindings::dlh_vma_page_bytes(vma.as_ptr().cast()) } as u64 / PAGE_SIZE;
    // A huge page is released whole, or not at all.
    let frame = address as u64 / PAGE_SIZE;
    let before = frame - round_down(frame, page);
    if before != 0 || here < page {
        return step(here.min(page - before), Verdict::Partial);
    }
    let pages = round_down(here.min(most.max(page)), page);
    match kind {
        bindings::dlh_vma_DLH_VMA_SHARED_FILE => Front::File(Piece {
            file: File::of(vma, address),
            bytes: pages * PAGE_SIZE,
            page_bytes: page * PAGE_SIZE,
        }),
        // Whatever the file holds may be seen then.
        bindings::dlh_vma_DLH_VMA_PRIVATE_FILE | bindings::dlh_vma_DLH_VMA_PRIVATE_OTHER
            if contents == Contents::Any =>
        {
            zap(mm, vma, address, pages, page)
        }
        bindings::dlh_vma_DLH_VMA_PRIVATE_FILE => {
            // The file may be others' as well: it is only looked at.
            let zeroes = File::of(vma, address).zeroes(pages * PAGE_SIZE);
            let pages = round_down(zeroes / PAGE_SIZE, page);
            if pages == 0 {
                // What is in the file would be seen; and it may be others' as well.
                return step(page, Verdict::File);
            }
            zap(mm, vma, address, pages, page)
        }
        _ => {
            let front = zap(mm, vma, address, pages, page);
            if let (Mode::Share, Front::Done(Step { pages, verdict: Verdict::Merged })) =
                (mode, &front)
            {
                // SAFETY: The range lies in a VMA of `current->mm`, whose lock is held.
                unsafe { bindings::dlh_map_zero_page(address, (pages * PAGE_SIZE) as usize) };
            }
            front
        }
    }
}

/// Takes the front of `pages` pages out of the page tables, up to the first that is pinned.
fn zap(mm: &MmWithUser, vma: &VmaRef, address: usize, pages: u64, page: u64) -> Front {
    let mut bytes = (pages * PAGE_SIZE) as usize;
    // SAFETY: The mm is alive.
    if unsafe { bindings::dlh_mm_has_pinned(mm.as_raw().cast()) } {
        let page_bytes = (page * PAGE_SIZE) as usize;
        let raw = mm.as_raw().cast();
        let mut pinned = false;
        // SAFETY: The range lies in a readable VMA of this mm, whose lock is held.
        bytes = unsafe { bindings::dlh_pinned_front(raw, address, bytes, page_bytes, &mut pinned) };
        if pinned {
            return step(bytes as u64 / PAGE_SIZE, Verdict::Pinned);
        }
    }
    vma.zap_vma_range(address, bytes);
    step(bytes as u64 / PAGE_SIZE, Verdict::Merged)
}
