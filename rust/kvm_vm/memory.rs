// SPDX-License-Identifier: GPL-2.0

//! Copying to and from guest memory on a thread of the VMM.

use core::mem::MaybeUninit;

use dlh_abi::{GfnRange, Gpa, RawEntry, PAGE_SIZE};
use dlh_bindings as bindings;
use kernel::{
    error::to_result,
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};

use crate::{Memslots, SlotError, Span};

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
        let frames =
            GfnRange::new(gpa.gfn(), bytes.div_ceil(PAGE_SIZE)).map_err(|_| SlotError::None)?;
        let Span { hva, .. } = slots.translate_all(frames)?;
        if !slots.vm().is_current() {
            return Err(SlotError::None);
        }
        let bytes = usize::try_from(bytes).map_err(|_| SlotError::None)?;
        Ok(Self { _slots: slots, base: hva.0, bytes })
    }

    /// The address in the VMM of the window's first byte.
    pub fn hva(&self) -> crate::Hva {
        crate::Hva(self.base)
    }

    fn slice(&self, offset: usize, bytes: usize) -> Result<UserSlice> {
        let end = offset.checked_add(bytes).ok_or(EINVAL)?;
        if end > self.bytes {
            return Err(EINVAL);
        }
        Ok(UserSlice::new(UserPtr::from_addr(self.base + offset), bytes))
    }

    fn word<T>(&self, offset: usize) -> Result<usize> {
        let end = offset.checked_add(size_of::<T>()).ok_or(EINVAL)?;
        let address = self.base + offset;
        if end > self.bytes || address % align_of::<T>() != 0 {
            return Err(EINVAL);
        }
        Ok(address)
    }

    /// Reads an aligned word in one access: the other side may be writing it.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the memory cannot be read, `EINVAL` outside the window.
    pub fn read_u32(&self, offset: usize) -> Result<u32> {
        let mut value = 0;
        // SAFETY: Any address may be tried; the helper checks that it is a user's. May sleep here.
        to_result(unsafe { bindings::dlh_get_user_u32(self.word::<u32>(offset)?, &mut value) })?;
        Ok(value)
    }

    /// As [`GuestWindow::read_u32`].
    pub fn read_u64(&self, offset: usize) -> Result<u64> {
        let mut value = 0;
        // SAFETY: As in `read_u32`.
        to_result(unsafe { bindings::dlh_get_user_u64(self.word::<u64>(offset)?, &mut value) })?;
        Ok(value)
    }

    /// Writes an aligned word in one access. Errors as [`GuestWindow::read_u32`].
    pub fn write_u32(&self, offset: usize, value: u32) -> Result {
        // SAFETY: As in `read_u32`.
        to_result(unsafe { bindings::dlh_put_user_u32(self.word::<u32>(offset)?, value) })
    }

    /// As [`GuestWindow::write_u32`].
    pub fn write_u64(&self, offset: usize, value: u64) -> Result {
        // SAFETY: As in `read_u32`.
        to_result(unsafe { bindings::dlh_put_user_u64(self.word::<u64>(offset)?, value) })
    }

    /// Copies entries out into the front of `buffer`; returns them. Errors as [`GuestWindow::read_u32`].
    pub fn read_entries<'b>(
        &self,
        offset: usize,
        buffer: &'b mut [MaybeUninit<RawEntry>],
    ) -> Result<&'b [RawEntry]> {
        let bytes = size_of_val(buffer);
        let count = buffer.len();
        let start = buffer.as_mut_ptr();
        // SAFETY: `MaybeUninit<u8>` may hold anything and has no alignment, and this is the very
        // memory of `buffer`, borrowed mutably.
        let raw =
            unsafe { core::slice::from_raw_parts_mut(start.cast::<MaybeUninit<u8>>(), bytes) };
        self.slice(offset, bytes)?.reader().read_raw(raw)?;
        // SAFETY: `read_raw` initialised all bytes, and any bytes are a valid `RawEntry`: it has
        // integer fields and no padding (its size is the sum of theirs).
        Ok(unsafe { core::slice::from_raw_parts(start.cast::<RawEntry>(), count) })
    }
}
