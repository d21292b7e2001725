// SPDX-License-Identifier: GPL-2.0

//! The VMM's mappings, with its mmap lock taken for reading.
//!
//! Not the kernel crate's, which wants a reference to the address space that keeps it: a worker has none.
//!
//! C header: `include/linux/mmap_lock.h`

use core::{marker::PhantomData, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::types::NotThreadSafe;
use kvm_worker::Inside;

/// The mmap lock.
///
/// # Invariants
///
/// `mm` is the address space of the current thread, alive for `'a`; its mmap lock is held for reading.
pub(crate) struct Mmap<'a> {
    mm: NonNull<bindings::mm_struct>,
    _inside: PhantomData<&'a Inside<'a>>,
    _context: NotThreadSafe,
}

impl<'a> Mmap<'a> {
    /// Takes the lock, unless others have it, who may keep it for long.
    pub(crate) fn try_lock(_: &'a Inside<'a>) -> Option<Self> {
        // SAFETY: May be called on any thread; who is inside has an address space, which does not end.
        let mm = NonNull::new(unsafe { bindings::dlh_mmap_trylock() })?;
        // INVARIANT: Just locked, and alive as long as the thread is inside.
        Some(Self { mm, _inside: PhantomData, _context: NotThreadSafe })
    }

    /// What is mapped at `address`.
    pub(crate) fn lookup(&self, address: usize) -> Option<Vma<'_>> {
        // SAFETY: By the type invariant.
        let raw = NonNull::new(unsafe { bindings::dlh_vma_lookup(self.mm.as_ptr(), address) })?;
        // INVARIANT: The lock is held for as long as it is borrowed.
        Some(Vma { raw, mmap: self })
    }

    /// How far it is from `address`, where nothing is mapped, to what is.
    pub(crate) fn unmapped_bytes(&self, address: usize) -> usize {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_unmapped_bytes(self.mm.as_ptr(), address) }
    }
}

impl Drop for Mmap<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_mmap_unlock(self.mm.as_ptr()) }
    }
}

/// One mapping.
///
/// # Invariants
///
/// `raw` is a VMA of `mmap`.
pub(crate) struct Vma<'a> {
    raw: NonNull<bindings::vm_area_struct>,
    mmap: &'a Mmap<'a>,
}

impl Vma<'_> {
    /// Where it ends.
    pub(crate) fn end(&self) -> usize {
        // SAFETY: By the type invariants the VMA does not change.
        unsafe { bindings::dlh_vma_end(self.raw.as_ptr()) }
    }

    /// What it is, and whether it may be released.
    pub(crate) fn judge(&self) -> bindings::dlh_vma {
        // SAFETY: As above.
        unsafe { bindings::dlh_vma_judge(self.raw.as_ptr()) }
    }

    /// The bytes of what is mapped and freed at a time.
    pub(crate) fn page_bytes(&self) -> u64 {
        // SAFETY: As above.
        unsafe { bindings::dlh_vma_page_bytes(self.raw.as_ptr()) as u64 }
    }

    /// The file behind it, and where in it `address` lies; valid as long as the VMA is. The VMA must be that of a
    /// file.
    pub(crate) fn file(&self, address: usize) -> (NonNull<bindings::file>, u64) {
        let mut offset = 0;
        // SAFETY: As above.
        let file = unsafe { bindings::dlh_vma_file(self.raw.as_ptr(), address, &mut offset) };
        // SAFETY: A file of a VMA is never null.
        (unsafe { NonNull::new_unchecked(file) }, offset)
    }

    /// How many of the `bytes` from `address` on, at least one page of `page_bytes`, are pinned, or are not; and
    /// which of the two. They must lie in this VMA, which must be readable.
    pub(crate) fn pinned_front(
        &self,
        address: usize,
        bytes: usize,
        page_bytes: usize,
    ) -> (usize, bool) {
        let (mm, mut pinned) = (self.mmap.mm.as_ptr(), false);
        // SAFETY: By the type invariants the mm is alive and locked.
        let front = unsafe {
            if !bindings::dlh_mm_has_pinned(mm) {
                return (bytes, false);
            }
            bindings::dlh_pinned_front(mm, address, bytes, page_bytes, &mut pinned)
        };
        (front, pinned)
    }

    /// Takes the part of `bytes` bytes from `address` on out of the page tables. What does not lie in the VMA
    /// stays.
    pub(crate) fn zap(&self, address: usize, bytes: usize) {
        let bytes = bytes.min(self.end().saturating_sub(address));
        // SAFETY: By the type invariants; `release_front` looked the VMA up by this address, or a later one in it,
        // so it does not begin after it.
        unsafe { bindings::dlh_vma_zap(self.raw.as_ptr(), address, bytes) }
    }

    /// Maps the zero page wherever nothing is mapped in the `bytes` bytes from `address` on, which must lie in
    /// the VMA.
    pub(crate) fn map_zero_page(&self, address: usize, bytes: usize) {
        // SAFETY: By the type invariants this is the current address space, locked.
        unsafe { bindings::dlh_map_zero_page(address, bytes) }
    }
}
