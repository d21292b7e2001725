// SPDX-License-Identifier: GPL-2.0

//! Copying to and from guest memory on a thread of the VMM.

use core::mem::MaybeUninit;

use dlh_abi::{Cookie, GfnRange, Gpa, RawEntry, RingWords, PAGE_SIZE};
use dlh_bindings as bindings;
use kernel::prelude::*;

use crate::{Hva, Memslots, SlotError, Span};

/// Where a stretch of guest memory lies in the VMM, as found once in the memslots.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    gpa: Gpa,
    bytes: u64,
    hva: Hva,
    /// The generation of the memslots for which this is known; none has this number.
    generation: u64,
}

/// No generation of memslots: KVM sets the top bit only while it changes them.
const UNKNOWN: u64 = u64::MAX;

impl Place {
    /// Finds `bytes` bytes from the page-aligned `gpa`.
    ///
    /// # Errors
    ///
    /// [`SlotError::None`] unless all of it lies in one usable memslot.
    pub fn find(slots: &Memslots<'_>, gpa: Gpa, bytes: u64) -> Result<Self, SlotError> {
        let (hva, generation) = slots.steady(|| locate(slots, gpa, bytes));
        Ok(Self { gpa, bytes, hva: hva?, generation: generation.unwrap_or(UNKNOWN) })
    }

    /// The window onto it. The memslots are searched only if they have changed.
    ///
    /// # Errors
    ///
    /// [`SlotError::None`] if it does not lie there any more, all of it, or if the current thread has
    /// not the VMM's address space.
    #[inline]
    pub fn open<'a>(&mut self, slots: &'a Memslots<'a>) -> Result<GuestWindow<'a>, SlotError> {
        if slots.vm().generation() != self.generation {
            let now = Self::find(slots, self.gpa, self.bytes)?;
            if now.hva != self.hva {
                return Err(SlotError::None);
            }
            self.generation = now.generation;
        }
        GuestWindow::at(slots, self.hva, self.bytes)
    }

    /// The guest-physical address.
    #[inline]
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }
}

/// What a helper that accesses user memory returns: 0 or `-EFAULT`.
#[inline]
fn reached(result: i32) -> Result {
    if result == 0 {
        Ok(())
    } else {
        Err(EFAULT)
    }
}

fn locate(slots: &Memslots<'_>, gpa: Gpa, bytes: u64) -> Result<Hva, SlotError> {
    let frames =
        GfnRange::new(gpa.gfn(), bytes.div_ceil(PAGE_SIZE)).map_err(|_| SlotError::None)?;
    let Span { hva, .. } = slots.translate_all(frames)?;
    Ok(hva)
}

/// A stretch of guest memory in one memslot, for as long as the memslots stay locked.
///
/// All accesses are copies through the VMM's page tables, as if the VMM made them: they fault pages
/// in, break copy-on-write, and honour userfaultfd.
///
/// # Context
///
/// A thread of the VMM; may sleep.
pub struct GuestWindow<'a> {
    // Keeps the memslots as they are.
    _slots: &'a Memslots<'a>,
    base: usize,
    bytes: usize,
}

impl<'a> GuestWindow<'a> {
    /// The window onto `bytes` bytes from the page-aligned `gpa`.
    ///
    /// # Errors
    ///
    /// [`SlotError::None`] unless all of it lies in one usable memslot and the current thread has
    /// the VMM's address space.
    pub fn open(slots: &'a Memslots<'a>, gpa: Gpa, bytes: u64) -> Result<Self, SlotError> {
        Self::at(slots, locate(slots, gpa, bytes)?, bytes)
    }

    #[inline]
    fn at(slots: &'a Memslots<'a>, hva: Hva, bytes: u64) -> Result<Self, SlotError> {
        if !slots.vm().is_current() {
            return Err(SlotError::None);
        }
        let bytes = usize::try_from(bytes).map_err(|_| SlotError::None)?;
        Ok(Self { _slots: slots, base: hva.0, bytes })
    }

    /// The address in the VMM of the window's first byte.
    pub fn hva(&self) -> Hva {
        Hva(self.base)
    }

    #[inline]
    fn span(&self, offset: usize, bytes: usize) -> Result<usize> {
        let end = offset.checked_add(bytes).ok_or(EINVAL)?;
        if end > self.bytes {
            return Err(EINVAL);
        }
        Ok(self.base + offset)
    }

    #[inline]
    fn word<T>(&self, offset: usize) -> Result<usize> {
        match self.span(offset, size_of::<T>())? {
            address if address % align_of::<T>() == 0 => Ok(address),
            _ => Err(EINVAL),
        }
    }

    /// Reads an aligned word in one access: the other side may be writing it.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the memory cannot be read, `EINVAL` outside the window.
    #[inline]
    pub fn read_u32(&self, offset: usize) -> Result<u32> {
        let mut value = 0;
        // SAFETY: Any address may be tried; the helper checks that it is a user's. May sleep here.
        reached(unsafe { bindings::dlh_get_user_u32(self.word::<u32>(offset)?, &mut value) })?;
        Ok(value)
    }

    /// As [`GuestWindow::read_u32`].
    #[inline]
    pub fn read_u64(&self, offset: usize) -> Result<u64> {
        let mut value = 0;
        // SAFETY: As in `read_u32`.
        reached(unsafe { bindings::dlh_get_user_u64(self.word::<u64>(offset)?, &mut value) })?;
        Ok(value)
    }

    /// Writes an aligned word in one access. Errors as [`GuestWindow::read_u32`].
    #[inline]
    pub fn write_u32(&self, offset: usize, value: u32) -> Result {
        // SAFETY: As in `read_u32`.
        reached(unsafe { bindings::dlh_put_user_u32(self.word::<u32>(offset)?, value) })
    }

    /// As [`GuestWindow::write_u32`].
    #[inline]
    pub fn write_u64(&self, offset: usize, value: u64) -> Result {
        // SAFETY: As in `read_u32`.
        reached(unsafe { bindings::dlh_put_user_u64(self.word::<u64>(offset)?, value) })
    }

    /// Reads the words of a ring's header that say what is in it, `tail` before the others.
    /// Errors as [`GuestWindow::read_u32`].
    #[inline]
    pub fn read_ring_words(&self) -> Result<RingWords> {
        let ring = self.span(0, dlh_abi::HEADER_BYTES)?;
        let mut words = bindings::dlh_ring_words::default();
        // SAFETY: As in `read_u32`.
        reached(unsafe { bindings::dlh_get_user_ring_words(ring, &mut words) })?;
        Ok(RingWords { tail: words.tail, done: words.done, cookie: Cookie(words.cookie) })
    }

    /// Copies entries out into the front of `buffer`; returns them. Errors as [`GuestWindow::read_u32`].
    #[inline]
    pub fn read_entries<'b>(
        &self,
        offset: usize,
        buffer: &'b mut [MaybeUninit<RawEntry>],
    ) -> Result<&'b [RawEntry]> {
        let bytes = size_of_val(buffer);
        let address = self.span(offset, bytes)?;
        let start = buffer.as_mut_ptr();
        // SAFETY: `start` is memory of that many bytes; the rest as in `read_u32`.
        reached(unsafe { bindings::dlh_get_user_bytes(start.cast(), address, bytes) })?;
        // SAFETY: All bytes were copied, and any bytes are a valid `RawEntry`: it has integer fields and
        // no padding (its size is the sum of theirs).
        Ok(unsafe { core::slice::from_raw_parts(start.cast::<RawEntry>(), buffer.len()) })
    }
}
