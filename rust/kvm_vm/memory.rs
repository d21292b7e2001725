// SPDX-License-Identifier: GPL-2.0

//! Copying to and from guest memory on a thread of the VMM, as far as it is there: no copy waits.

use core::mem::MaybeUninit;

use dlh_abi::{Cookie, GfnRange, Gpa, RawEntry, RingWords, PAGE_SIZE};
use dlh_bindings as bindings;
use kernel::prelude::*;

use crate::{Hva, Memslots, SlotError, Span, Vm};

/// Memory of the VMM that could not be accessed as it is: what a copy failed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absent {
    address: usize,
    write: bool,
}

/// What became of memory that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is there, or was a moment ago.
    Here,
    /// It is on its way, or its VMM keeps it away (userfaultfd, a lock): ask again later.
    NotYet,
    /// It cannot be had.
    Never,
}

impl Absent {
    /// What is outside of a window; no user has memory there.
    const OUTSIDE: Self = Self { address: usize::MAX, write: false };

    /// Asks for it, without waiting for anybody. What is to be read from swap comes by itself after that;
    /// userfaultfd is not told.
    ///
    /// # Context
    ///
    /// May sleep for a moment; no locks, the memslots' included. On other threads than the VMM's it is
    /// [`Presence::Never`] there.
    pub fn fetch(self, vm: &Vm) -> Presence {
        if !vm.is_current() {
            return Presence::Never;
        }
        // SAFETY: The current thread has an mm, that of the VM; any address may be asked for.
        match unsafe { bindings::dlh_fault_in(self.address, self.write) } {
            0 => Presence::Here,
            e if e == EAGAIN.to_errno() => Presence::NotYet,
            _ => Presence::Never,
        }
    }
}

/// Where a stretch of guest memory lies in the VMM, as found once in the memslots.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    gpa: Gpa,
    bytes: u64,
    hva: Hva,
    /// Whether KVM logs what is written there (KVM_MEM_LOG_DIRTY_PAGES).
    logs: bool,
    /// The generation of the memslots for which this is known.
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
        let (found, generation) = slots.steady(|| locate(slots, gpa, bytes));
        let (hva, logs) = found?;
        Ok(Self { gpa, bytes, hva, logs, generation: generation.unwrap_or(UNKNOWN) })
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
            self.logs = now.logs;
        }
        GuestWindow::at(slots, self.gpa, (self.hva, self.logs), self.bytes)
    }

    /// Where it lies in the VMM.
    #[inline]
    pub fn hva(&self) -> Hva {
        self.hva
    }

    /// The guest-physical address.
    #[inline]
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }
}

fn locate(slots: &Memslots<'_>, gpa: Gpa, bytes: u64) -> Result<(Hva, bool), SlotError> {
    let frames =
        GfnRange::new(gpa.gfn(), bytes.div_ceil(PAGE_SIZE)).map_err(|_| SlotError::None)?;
    let Span { hva, .. } = slots.translate_all(frames)?;
    Ok((hva, slots.logs_writes(frames.start())))
}

/// A stretch of guest memory in one memslot, for as long as the memslots stay locked.
///
/// All accesses are copies through the VMM's page tables, as if the VMM made them, but they take no page
/// faults: what is not mapped, or not for writing, is [`Absent`]. What is written is marked in KVM's dirty
/// bitmap, if the memslot has one.
///
/// # Context
///
/// A thread of the VMM. Does not sleep.
pub struct GuestWindow<'a> {
    slots: &'a Memslots<'a>,
    gpa: Gpa,
    base: usize,
    bytes: usize,
    logs: bool,
}

impl<'a> GuestWindow<'a> {
    /// The window onto `bytes` bytes from the page-aligned `gpa`.
    ///
    /// # Errors
    ///
    /// [`SlotError::None`] unless all of it lies in one usable memslot and the current thread has
    /// the VMM's address space.
    pub fn open(slots: &'a Memslots<'a>, gpa: Gpa, bytes: u64) -> Result<Self, SlotError> {
        Self::at(slots, gpa, locate(slots, gpa, bytes)?, bytes)
    }

    #[inline]
    fn at(
        slots: &'a Memslots<'a>,
        gpa: Gpa,
        (hva, logs): (Hva, bool),
        bytes: u64,
    ) -> Result<Self, SlotError> {
        if !slots.vm().is_current() {
            return Err(SlotError::None);
        }
        let bytes = usize::try_from(bytes).map_err(|_| SlotError::None)?;
        Ok(Self { slots, gpa, base: hva.0, bytes, logs })
    }

    /// The address in the VMM of the window's first byte.
    pub fn hva(&self) -> Hva {
        Hva(self.base)
    }

    #[inline]
    fn span(&self, offset: usize, bytes: usize) -> Result<usize, Absent> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.base + offset),
            _ => Err(Absent::OUTSIDE),
        }
    }

    #[inline]
    fn word<T>(&self, offset: usize) -> Result<usize, Absent> {
        match self.span(offset, size_of::<T>())? {
            address if address % align_of::<T>() == 0 => Ok(address),
            _ => Err(Absent::OUTSIDE),
        }
    }

    /// Marks what was written at `offset`, if that is logged.
    #[inline]
    fn mark(&self, offset: usize) {
        if self.logs {
            self.slots.mark_dirty(Gpa(self.gpa.0 + offset as u64).gfn());
        }
    }

    /// Reads an aligned word in one access: the other side may be writing it.
    ///
    /// # Errors
    ///
    /// What is not there; outside of the window nothing ever is.
    #[inline]
    pub fn read_u32(&self, offset: usize) -> Result<u32, Absent> {
        let (address, mut value) = (self.word::<u32>(offset)?, 0);
        // SAFETY: Any address may be tried; the helper checks that it is a user's.
        let result = unsafe { bindings::dlh_get_user_u32(address, &mut value) };
        reached(result, address, false)?;
        Ok(value)
    }

    /// As [`GuestWindow::read_u32`].
    #[inline]
    pub fn read_u64(&self, offset: usize) -> Result<u64, Absent> {
        let (address, mut value) = (self.word::<u64>(offset)?, 0);
        // SAFETY: Any address may be tried; the helper checks that it is a user's.
        let result = unsafe { bindings::dlh_get_user_u64(address, &mut value) };
        reached(result, address, false)?;
        Ok(value)
    }

    /// Writes an aligned word in one access. Errors as [`GuestWindow::read_u32`].
    #[inline]
    pub fn write_u32(&self, offset: usize, value: u32) -> Result<(), Absent> {
        let address = self.word::<u32>(offset)?;
        // SAFETY: Any address may be tried; the helper checks that it is a user's.
        reached(unsafe { bindings::dlh_put_user_u32(address, value) }, address, true)?;
        self.mark(offset);
        Ok(())
    }

    /// As [`GuestWindow::write_u32`].
    #[inline]
    pub fn write_u64(&self, offset: usize, value: u64) -> Result<(), Absent> {
        let address = self.word::<u64>(offset)?;
        // SAFETY: Any address may be tried; the helper checks that it is a user's.
        reached(unsafe { bindings::dlh_put_user_u64(address, value) }, address, true)?;
        self.mark(offset);
        Ok(())
    }

    /// Reads the words of a ring's header that say what is in it, `tail` before the others.
    /// Errors as [`GuestWindow::read_u32`].
    #[inline]
    pub fn read_ring_words(&self) -> Result<RingWords, Absent> {
        let ring = self.span(0, dlh_abi::HEADER_BYTES)?;
        let mut words = bindings::dlh_ring_words::default();
        // SAFETY: Any address may be tried; the helper checks that it is a user's.
        let result = unsafe { bindings::dlh_get_user_ring_words(ring, &mut words) };
        reached(result, ring, false)?;
        Ok(RingWords { tail: words.tail, done: words.done, cookie: Cookie(words.cookie) })
    }

    /// Copies entries out into the front of `buffer`, all of it; returns them. Errors as
    /// [`GuestWindow::read_u32`].
    #[inline]
    pub fn read_entries<'b>(
        &self,
        offset: usize,
        buffer: &'b mut [MaybeUninit<RawEntry>],
    ) -> Result<&'b [RawEntry], Absent> {
        let bytes = size_of_val(buffer);
        let address = self.span(offset, bytes)?;
        let start = buffer.as_mut_ptr();
        // SAFETY: `start` is memory of that many bytes; any address may be tried, the helper checks that it
        // is a user's.
        if unsafe { bindings::dlh_get_user_bytes(start.cast(), address, bytes) } != 0 {
            return Err(self.first_absent(offset, bytes));
        }
        // SAFETY: All bytes were copied, and any bytes are a valid `RawEntry`: it has integer fields and
        // no padding (its size is the sum of theirs).
        Ok(unsafe { core::slice::from_raw_parts(start.cast::<RawEntry>(), buffer.len()) })
    }

    /// Copies entries out into `entries`. Errors as [`GuestWindow::read_u32`].
    pub fn copy_entries(&self, offset: usize, entries: &mut [RawEntry]) -> Result<(), Absent> {
        let bytes = size_of_val(entries);
        let address = self.span(offset, bytes)?;
        let to = entries.as_mut_ptr();
        // SAFETY: `to` is memory of that many bytes, and any bytes are a valid `RawEntry`; any address may be
        // tried, the helper checks that it is a user's.
        match unsafe { bindings::dlh_get_user_bytes(to.cast(), address, bytes) } {
            0 => Ok(()),
            _ => Err(self.first_absent(offset, bytes)),
        }
    }

    /// Which page of `bytes` bytes from `offset` on, which could not be copied, is not there.
    #[cold]
    fn first_absent(&self, offset: usize, bytes: usize) -> Absent {
        let page = PAGE_SIZE as usize;
        let others = (offset / page + 1..).map(|number| number * page);
        let others = others.take_while(|start| *start < offset + bytes);
        // One that has come meanwhile is asked for in vain, and then the copy is made again.
        let first = self.read_u32(offset).err();
        let absent = first.or_else(|| others.filter_map(|at| self.read_u32(at).err()).next());
        absent.unwrap_or(Absent { address: self.base + offset, write: false })
    }
}

/// What a helper that accesses the VMM's memory at `address` returned: 0 or `-EFAULT`.
#[inline]
fn reached(result: i32, address: usize, write: bool) -> Result<(), Absent> {
    if result == 0 {
        Ok(())
    } else {
        Err(Absent { address, write })
    }
}
