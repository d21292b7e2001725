// SPDX-License-Identifier: GPL-2.0

//! Whether memory that was released is there again, without anybody's having used it.
//!
//! Who reads a hole of a shared file makes a page of zeroes there; of private anonymous memory it gets the zero
//! page.

use dlh_abi::PAGE_SIZE;
use dlh_bindings as bindings;
use kernel::mm::Mm;
use kvm_vm::Span;

/// Pages looked at under one hold of the mmap lock.
const CHUNK_PAGES: u64 = 8192;

/// How many pages of `span` the file holds in memory that is mapped there, shared; 0 for other memory. At least so
/// many: what is locked by somebody else is left out, and so is the part of a large page that reaches beyond
/// `span`. Stops above `most`.
///
/// # Context
///
/// Any thread that may sleep; waits for no lock, and adds no user to the address space, whose end may be long.
pub fn in_shared_file(mm: &Mm, span: Span, most: u64) -> u64 {
    let (mut done, mut found) = (0, 0);
    while done < span.frames.pages() && found <= most {
        let count = CHUNK_PAGES.min(span.frames.pages() - done);
        let address = span.hva.0 + (done * PAGE_SIZE) as usize;
        // SAFETY: The mm is counted as long as the reference lives; any address may be asked for.
        found += unsafe { bindings::dlh_mm_in_shared_file(mm.as_raw().cast(), address, count) };
        done += count;
    }
    found
}
