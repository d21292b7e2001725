// SPDX-License-Identifier: GPL-2.0

//! The file behind a VMA: shmem or hugetlbfs.
//!
//! A hole in a file of shmem is made while its VMA stands still ([`Place::punch`]). hugetlbfs has no way for that; there
//! it is made afterwards, with nothing held ([`Hole`]).
//!
//! C header: `include/linux/fs.h`

use core::{marker::PhantomData, ptr::NonNull};

use dlh_abi::PAGE_SIZE;
use dlh_bindings as bindings;
use kernel::error::code::EAGAIN;

use crate::{
    mmap::Vma,
    verdict::{round_down, Step, Verdict},
};

/// A place in the file behind a VMA.
///
/// # Invariants
///
/// `file` has a count for `'a`.
pub(crate) struct Place<'a> {
    file: NonNull<bindings::file>,
    offset: u64,
    _vma: PhantomData<&'a Vma<'a>>,
}

impl<'a> Place<'a> {
    /// Where `address` of `vma` lies. The VMA must be that of a file.
    pub(crate) fn of(vma: &'a Vma<'a>, address: usize) -> Self {
        let (file, offset) = vma.file(address);
        // INVARIANT: A VMA has a count of its file.
        Self { file, offset, _vma: PhantomData }
    }

    /// Whether the file is of shmem; if not, it is of hugetlbfs.
    pub(crate) fn is_shmem(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_file_is_shmem(self.file.as_ptr()) }
    }

    /// How many bytes from here on, at most `bytes`, read as zeroes.
    pub(crate) fn zeroes(&self, bytes: u64) -> u64 {
        // SAFETY: By the type invariant.
        unsafe {
            bindings::dlh_file_zero_bytes(self.file.as_ptr(), self.offset, bytes as usize) as u64
        }
    }

    /// The front of `bytes` bytes that nobody has pinned or locked; or why its first page, of `page_bytes`,
    /// must stay.
    fn loose(&self, bytes: u64, page_bytes: u64) -> Result<u64, Step> {
        let (file, mut locked) = (self.file.as_ptr(), false);
        // SAFETY: By the type invariant.
        let loose = unsafe {
            bindings::dlh_file_loose_bytes(file, self.offset, bytes as usize, &mut locked)
        };
        match round_down(loose as u64, page_bytes) {
            0 => {
                let verdict = if locked { Verdict::Locked } else { Verdict::Pinned };
                Err(Step { pages: page_bytes / PAGE_SIZE, verdict })
            }
            loose => Ok(loose),
        }
    }

    /// Makes a hole of the front of `bytes` bytes, up to the first page that must stay. The file must be of shmem.
    pub(crate) fn punch(&self, bytes: u64) -> Step {
        let loose = match self.loose(bytes, PAGE_SIZE) {
            Ok(loose) => loose,
            Err(kept) => return kept,
        };
        // SAFETY: By the type invariant; of shmem, by the caller's promise, or it fails.
        let error =
            unsafe { bindings::dlh_shmem_punch(self.file.as_ptr(), self.offset, loose as usize) };
        Step { pages: loose / PAGE_SIZE, verdict: verdict_of(error) }
    }

    /// The same, for later; the VMA may have gone by then.
    pub(crate) fn hole(&self, bytes: u64, page_bytes: u64) -> Hole {
        // SAFETY: By the type invariant; the count is given back by `Hole`.
        let file = unsafe { bindings::dlh_file_get(self.file.as_ptr()) };
        // SAFETY: The same file, which is not null.
        let file = unsafe { NonNull::new_unchecked(file) };
        // INVARIANT: The count was just taken.
        Hole { file, offset: self.offset, bytes, page_bytes }
    }
}

/// Sealed, or not open for writing, is a kind of memory; busy passes.
fn verdict_of(error: i32) -> Verdict {
    match error {
        0 => Verdict::Merged,
        error if error == EAGAIN.to_errno() => Verdict::Busy,
        _ => Verdict::Kind,
    }
}

/// A hole that is to be made in a file.
///
/// # Invariants
///
/// Owns a count of `file`.
pub(crate) struct Hole {
    file: NonNull<bindings::file>,
    offset: u64,
    bytes: u64,
    /// Of one page of the file.
    page_bytes: u64,
}

impl Hole {
    /// Makes it, up to the first page that must stay. May sleep; nothing may be held that others need.
    pub(crate) fn punch(&self) -> Step {
        let file = self.file.as_ptr();
        // INVARIANT: The count is kept as long as `self` is.
        let place = Place { file: self.file, offset: self.offset, _vma: PhantomData };
        let loose = match place.loose(self.bytes, self.page_bytes) {
            Ok(loose) => loose,
            Err(kept) => return kept,
        };
        // SAFETY: By the type invariant. May sleep here.
        let error = unsafe {
            // Whoever takes the lock in between is waited for.
            if bindings::dlh_file_is_busy(file) {
                EAGAIN.to_errno()
            } else {
                bindings::dlh_file_punch(file, self.offset, loose as usize)
            }
        };
        Step { pages: loose / PAGE_SIZE, verdict: verdict_of(error) }
    }
}

impl Drop for Hole {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the count is ours to give back.
        unsafe { bindings::dlh_file_put(self.file.as_ptr()) }
    }
}
