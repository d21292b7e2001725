// SPDX-License-Identifier: GPL-2.0

//! One VMA at a time: what kind of memory it is, and what that allows.

use dlh_abi::{Contents, PAGE_SIZE};
use dlh_bindings as bindings;
use kvm_vm::{Hva, Span};
use kvm_worker::Inside;

use crate::{
    file::{Hole, Place},
    mmap::{Mmap, Vma},
    verdict::{round_down, Mode, Step, Terms, Verdict},
};

/// What is to be done about the pages at the front.
pub(crate) enum Front {
    /// Nothing any more.
    Done(Step),
    /// They may be taken out of a file, with nothing held.
    Hole(Hole),
    /// So many have to be tried again: the mmap lock cannot be had.
    Locked(u64),
}

fn step(pages: u64, verdict: Verdict) -> Front {
    Front::Done(Step { pages, verdict })
}

/// Deals with the front of `span`, with at most `most` pages of it or one huge page. The addresses are those of the
/// current address space; its mmap lock is taken meanwhile. With [`Contents::Any`] private copies of a file's pages go,
/// whatever the file holds.
pub(crate) fn release_front(inside: &Inside<'_>, span: Span, most: u64, terms: Terms) -> Front {
    let rest = span.frames.pages();
    let Some(mmap) = Mmap::try_lock(inside) else {
        return Front::Locked(rest.min(most));
    };
    let Hva(address) = span.hva;
    let Some(vma) = mmap.lookup(address) else {
        // Nothing is mapped there, so there is nothing to release.
        let bytes = mmap.unmapped_bytes(address) as u64;
        return step(rest.min(bytes.div_ceil(PAGE_SIZE)).max(1), Verdict::NoMemslot);
    };
    let here = rest.min((vma.end() - address) as u64 / PAGE_SIZE);
    let kind = vma.judge();
    let kept = match kind {
        bindings::dlh_vma_DLH_VMA_ANONYMOUS
        | bindings::dlh_vma_DLH_VMA_SHARED_FILE
        | bindings::dlh_vma_DLH_VMA_PRIVATE_FILE => None,
        bindings::dlh_vma_DLH_VMA_PRIVATE_OTHER if terms.contents == Contents::Any => None,
        bindings::dlh_vma_DLH_VMA_PFNMAP => Some(Verdict::PfnMap),
        bindings::dlh_vma_DLH_VMA_LOCKED => Some(Verdict::Locked),
        bindings::dlh_vma_DLH_VMA_UFFD => Some(Verdict::Userfault),
        _ => Some(Verdict::Kind),
    };
    if let Some(verdict) = kept {
        return step(here, verdict);
    }

    let page = vma.page_bytes() / PAGE_SIZE;
    // Only hugetlbfs has other pages than small ones.
    if page != 1 && !terms.hugetlb {
        return step(here, Verdict::Hugetlb);
    }
    // A huge page is released whole, or not at all.
    let frame = address as u64 / PAGE_SIZE;
    let before = frame - round_down(frame, page);
    if before != 0 || here < page {
        return step(here.min(page - before), Verdict::Partial);
    }
    let pages = round_down(here.min(most.max(page)), page);
    match kind {
        bindings::dlh_vma_DLH_VMA_SHARED_FILE => {
            let place = Place::of(&vma, address);
            if place.is_shmem() {
                Front::Done(place.punch(pages * PAGE_SIZE))
            } else {
                Front::Hole(place.hole(pages * PAGE_SIZE, page * PAGE_SIZE))
            }
        }
        // Whatever the file holds may be seen then.
        bindings::dlh_vma_DLH_VMA_PRIVATE_FILE | bindings::dlh_vma_DLH_VMA_PRIVATE_OTHER
            if terms.contents == Contents::Any =>
        {
            Front::Done(zap(&vma, address, pages, page))
        }
        bindings::dlh_vma_DLH_VMA_PRIVATE_FILE => {
            // The file may be others' as well: it is only looked at.
            let zeroes = Place::of(&vma, address).zeroes(pages * PAGE_SIZE);
            let pages = round_down(zeroes / PAGE_SIZE, page);
            if pages == 0 {
                // What is in the file would be seen; and it may be others' as well.
                return step(page, Verdict::File);
            }
            Front::Done(zap(&vma, address, pages, page))
        }
        _ => {
            let zapped = zap(&vma, address, pages, page);
            if terms.mode == Mode::Share && zapped.verdict == Verdict::Merged {
                vma.map_zero_page(address, (zapped.pages * PAGE_SIZE) as usize);
            }
            Front::Done(zapped)
        }
    }
}

/// Takes the front of `pages` pages out of the page tables, up to the first that is pinned.
fn zap(vma: &Vma<'_>, address: usize, pages: u64, page: u64) -> Step {
    let [bytes, page_bytes] = [pages, page].map(|pages| (pages * PAGE_SIZE) as usize);
    let (bytes, pinned) = vma.pinned_front(address, bytes, page_bytes);
    let pages = bytes as u64 / PAGE_SIZE;
    if pinned {
        return Step { pages, verdict: Verdict::Pinned };
    }
    vma.zap(address, bytes);
    Step { pages, verdict: Verdict::Merged }
}
