// SPDX-License-Identifier: GPL-2.0

//! The file behind a VMA: shmem or hugetlbfs.
//!
//! C header: `include/linux/fs.h`

use core::ptr::NonNull;

use dlh_abi::PAGE_SIZE;
use dlh_bindings as bindings;
use kernel::mm::virt::VmaRef;

use crate::{
    vma::{round_down, Step},
    Verdict,
};

/// A place in a file.
///
/// # Invariants
///
/// Owns a count of `file`.
pub(crate) struct File {
    file: NonNull<bindings::file>,
    offset: u64,
}

impl File {
    /// Where `address` of `vma` lies. The VMA must be that of a file.
    pub(crate) fn of(vma: &VmaRef, address: usize) -> Self {
        let mut offset = 0;
        // SAFETY: A `VmaRef` exists only while its mmap lock is held; the VMA is that of a file.
        let file = unsafe { bindings::dlh_vma_file(vma.as_ptr().cast(), address, &mut offset) };
        // SAFETY: A file of a VMA is never null.
        // INVARIANT: The count was just taken.
        Self { file: unsafe { NonNull::new_unchecked(file) }, offset }
    }

    /// How many bytes from here on, at most `bytes`, read as zeroes.
    pub(crate) fn zeroes(&self, bytes: u64) -> u64 {
        let file = self.file.as_ptr();
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_file_zero_bytes(file, self.offset, bytes as usize) as u64 }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the count is ours to give back.
        unsafe { bindings::dlh_file_put(self.file.as_ptr()) }
    }
}

/// A piece of a file that is the guest's memory, and that it does not use.
pub(crate) struct Piece {
    pub(crate) file: File,
    pub(crate) bytes: u64,
    /// Of one page of the file.
    pub(crate) page_bytes: u64,
}

impl Piece {
    /// Makes a hole of it, up to the first page that must stay. May sleep; the mmap lock must not be held.
    pub(crate) fn punch(self) -> Step {
        let Self { file, bytes, page_bytes } = self;
        let (raw, mut locked) = (file.file.as_ptr(), false);
        // SAFETY: The file is counted, by its type invariant.
        let loose = unsafe {
            bindings::dlh_file_loose_bytes(raw, file.offset, bytes as usize, &mut locked)
        } as u64;
        let loose = round_down(loose, page_bytes);
        if loose == 0 {
            let verdict = if locked { Verdict::Locked } else { Verdict::Pinned };
            return Step { pages: page_bytes / PAGE_SIZE, verdict };
        }
        // SAFETY: As above; no mmap lock is held, and it may sleep here.
        let punched = unsafe { bindings::dlh_file_punch(raw, file.offset, loose as usize) };
        // Sealed, or not open for writing.
        let verdict = if punched == 0 { Verdict::Merged } else { Verdict::Kind };
        Step { pages: loose / PAGE_SIZE, verdict }
    }
}
