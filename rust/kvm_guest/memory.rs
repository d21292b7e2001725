// SPDX-License-Identifier: GPL-2.0

//! The memory of a ring: this kernel's, and written by the host.
//!
//! There is never a Rust reference to it. Words are read and written one by one, each exactly once
//! (`READ_ONCE()`, `WRITE_ONCE()`), at offsets that `dlh_abi` gives.
//!
//! C header: `include/linux/gfp.h`.

use core::{
    marker::PhantomData,
    ptr::NonNull,
    sync::atomic::{fence, Ordering},
};

use dlh_abi::{header, Gpa, RawEntry, RingSize, Status, HEADER_BYTES};
use dlh_bindings as bindings;
use kernel::prelude::*;

/// Memory that can hold a ring.
///
/// # Invariants
///
/// `base` is the page-aligned begin of `size.bytes()` physically contiguous bytes, which this owns
/// and which nobody holds a reference to; the host may write there.
pub(crate) struct RingMemory {
    base: NonNull<u8>,
    size: RingSize,
}

// SAFETY: The memory belongs to no thread.
unsafe impl Send for RingMemory {}
// SAFETY: All accesses are volatile and of whole words.
unsafe impl Sync for RingMemory {}

impl RingMemory {
    /// Zeroed memory, of the current CPU's node if that has any. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, which large rings run into when memory is fragmented.
    pub(crate) fn new(size: RingSize) -> Result<Self> {
        // SAFETY: May sleep here.
        let base = unsafe { bindings::dlh_guest_ring_alloc(size.bytes() as usize) };
        // INVARIANT: Just allocated; pages are aligned to pages.
        Ok(Self { base: NonNull::new(base.cast()).ok_or(ENOMEM)?, size })
    }

    /// Number of entries there is room for.
    #[inline]
    pub(crate) fn size(&self) -> RingSize {
        self.size
    }

    /// Where the host finds it.
    pub(crate) fn gpa(&self) -> Gpa {
        // SAFETY: By the type invariant this is memory of the direct map.
        Gpa(unsafe { bindings::dlh_guest_ring_gpa(self.base.as_ptr().cast()) })
    }

    /// Access to its words.
    #[inline]
    pub(crate) fn words(&self) -> Words<'_> {
        // INVARIANT: That is the memory's own invariant.
        Words { base: self.base, size: self.size, _memory: PhantomData }
    }
}

/// Access to the words of a ring's memory.
///
/// It is passed by value, so that the compiler need not look up where the ring is after each write.
///
/// # Invariants
///
/// `base` and `size` are those of a [`RingMemory`] that lives as long as `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Words<'a> {
    base: NonNull<u8>,
    size: RingSize,
    _memory: PhantomData<&'a RingMemory>,
}

impl Words<'_> {
    /// Reads a word of the header.
    ///
    /// # Safety
    ///
    /// `offset` must be that of a `T` in the header; `T` must be an integer.
    #[inline]
    unsafe fn read<T: Copy>(self, offset: usize) -> T {
        // SAFETY: By the safety requirements and the type invariant this is an aligned word of our
        // memory, in which any bits are a value.
        unsafe { self.base.add(offset).cast::<T>().read_volatile() }
    }

    /// Position that the host has finished everything before of. What is read afterwards is as new.
    #[inline]
    pub(crate) fn done(self) -> u32 {
        // SAFETY: The offset of a `u32`.
        let done = unsafe { self.read(header::DONE) };
        // Pairs with the host's barrier between what an entry did, its status, and `done`.
        fence(Ordering::Acquire);
        done
    }

    /// State of the ring as the host shows it: (cookie, entries, version, flags).
    pub(crate) fn introduction(self) -> (u64, u32, u32, u32) {
        // SAFETY: Offsets of a `u64` and three `u32`.
        unsafe {
            (
                self.read(header::COOKIE),
                self.read(header::ENTRIES),
                self.read(header::VERSION),
                self.read(header::FLAGS),
            )
        }
    }

    /// Fills a slot. It should be the guest's, or the host reads a mixture.
    ///
    /// # Safety
    ///
    /// `slot` must be less than the number of entries.
    #[inline]
    pub(crate) unsafe fn write_entry(self, slot: u32, entry: &RawEntry) {
        // The second word in one piece: operation, flags, status.
        let second = u64::from(entry.op)
            | u64::from(entry.flags) << 16
            | u64::from(entry.status as u32) << 32;
        let words = [entry.tag, second, entry.arg[0], entry.arg[1]];
        let offset = HEADER_BYTES + slot as usize * RawEntry::BYTES;
        // SAFETY: By the safety requirements the slot lies within the ring, which by the type
        // invariant is our memory; an entry is four aligned words.
        unsafe {
            let place = self.base.add(offset).cast::<u64>();
            place.write_volatile(words[0]);
            place.add(1).write_volatile(words[1]);
            place.add(2).write_volatile(words[2]);
            place.add(3).write_volatile(words[3]);
        }
    }

    /// Reads the status in a slot. It means something only if the host is done with the entry.
    pub(crate) fn status(self, slot: u32) -> Status {
        let offset = self.size.slot_offset(slot) as usize + RawEntry::STATUS_OFFSET;
        // SAFETY: `slot_offset()` keeps every slot within the ring, which by the type invariant is our
        // memory; the status is an aligned word of the entry.
        Status(unsafe { self.base.add(offset).cast::<i32>().read_volatile() })
    }

    /// Shows the host all slots before `tail`.
    #[inline]
    pub(crate) fn publish_tail(self, tail: u32) {
        // Pairs with the host's barrier between reading tail and the slots.
        fence(Ordering::Release);
        // SAFETY: The offset of a `u32` that the host only reads.
        unsafe { self.base.add(header::TAIL).cast::<u32>().write_volatile(tail) }
    }

    /// Shows the host how many calls found the ring full.
    pub(crate) fn publish_dropped(self, dropped: u64) {
        // SAFETY: The offset of a `u64` that the host only reads.
        unsafe { self.base.add(header::DROPPED).cast::<u64>().write_volatile(dropped) }
    }
}

const _: () = assert!(header::VERSION < HEADER_BYTES && header::DROPPED < HEADER_BYTES);

impl Drop for RingMemory {
    fn drop(&mut self) {
        // SAFETY: Allocated in `new()` with this size; by the type invariant it is ours. That the
        // host is done with it is what `Ring` sees to.
        unsafe {
            bindings::dlh_guest_ring_free(self.base.as_ptr().cast(), self.size.bytes() as usize)
        }
    }
}
