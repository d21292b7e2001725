// SPDX-License-Identifier: GPL-2.0

//! Whether memory that was released is there again, without anybody's having used it.
//!
//! Who reads a hole of a shared file makes a page of zeroes there; of private anonymous memory it gets the zero
//! page.

use dlh_abi::PAGE_SIZE;
use dlh_bindings as bindings;
use kernel::mm::MmWithUser;
use kvm_vm::Span;

/// Pages looked at under one hold of the mmap lock.
const CHUNK_PAGES: u64 = 8192;

/// How many pages of `span` the file holds in memory that is mapped there, shared; 0 for other memory. At least so
/// many: what is locked by somebody else is left out, and so is the part of a large page that reaches beyond
/// `span`. Stops above `most`.
///
/// # Context
///
/// Any thread that may take an mmap lock; waits for no lock.
pub fn in_shared_file(mm: &MmWithUser, span: Span, most: u64) -> u64 {
    let (mut done, mut found) = (0, 0);
    while done < span.frames.pages() && found <= most {
        let count = CHUNK_PAGES.min(span.frames.pages() - done);
        found += in_chunk(mm, span.hva.0 + (done * PAGE_SIZE) as usize, count);
        done += count;
    }
    found
}

/// The same for `pages` pages at `address`, as far as one VMA has them.
fn in_chunk(mm: &MmWithUser, address: usize, pages: u64) -> u64 {
    let Some(mmap) = mm.mmap_read_trylock() else { return 0 };
    let Some(vma) = mmap.vma_lookup(address) else { return 0 };
    let here = pages.min((vma.end() - address) as u64 / PAGE_SIZE);
    // SAFETY: A `VmaRef` exists only while its mmap lock is held, and the pages lie in it.
    unsafe { bindings::dlh_vma_in_shared_file(vma.as_ptr().cast(), address, here) }
}
