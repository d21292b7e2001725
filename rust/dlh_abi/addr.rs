// SPDX-License-Identifier: GPL-2.0

//! Guest addresses as types, so that a frame number is never taken for an address.

use crate::Error;

/// log2 of the guest page size the ABI speaks of.
pub const PAGE_SHIFT: u32 = 12;
/// The guest page size the ABI speaks of, in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Guest-physical addresses end here: x86 has no more than 52 bits of them.
const GPA_LIMIT: u64 = 1 << 52;

/// A guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The frame this address lies in.
    #[inline]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }

    /// Whether the address is the first of its page.
    #[inline]
    pub const fn is_page_aligned(self) -> bool {
        self.0 % PAGE_SIZE == 0
    }
}

/// A guest frame number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The first address of the frame.
    #[inline]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}

/// A run of guest frames.
///
/// # Invariants
///
/// `pages` is not 0, and the run ends at or below the architecture's limit of guest-physical
/// addresses, so `end()` never wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GfnRange {
    start: Gfn,
    pages: u64,
}

impl GfnRange {
    /// The run of `pages` frames from `start`.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] for an empty run or one that leaves the guest-physical address space.
    #[inline]
    pub fn new(start: Gfn, pages: u64) -> Result<Self, Error> {
        let limit = GPA_LIMIT >> PAGE_SHIFT;
        match start.0.checked_add(pages) {
            // INVARIANT: not empty, and `end` is within the limit.
            Some(end) if pages != 0 && end <= limit => Ok(Self { start, pages }),
            _ => Err(Error::Argument),
        }
    }

    /// The frames that `bytes` bytes from `gpa` cover, as a FREE_PAGES entry names them.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] unless both are multiples of the page size and the run is valid: a part
    /// of a page is never rounded, in either direction.
    #[inline]
    pub fn from_bytes(gpa: Gpa, bytes: u64) -> Result<Self, Error> {
        if !gpa.is_page_aligned() || bytes % PAGE_SIZE != 0 {
            return Err(Error::Argument);
        }
        Self::new(gpa.gfn(), bytes >> PAGE_SHIFT)
    }

    /// First frame.
    #[inline]
    pub const fn start(&self) -> Gfn {
        self.start
    }

    /// Number of frames, at least 1.
    #[inline]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The frame after the last one.
    #[inline]
    pub const fn end(&self) -> Gfn {
        Gfn(self.start.0 + self.pages)
    }

    /// The size of the run in bytes.
    #[inline]
    pub const fn bytes(&self) -> u64 {
        self.pages << PAGE_SHIFT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_never_rounded() {
        for (gpa, bytes) in [(1, 4096), (4096, 1), (4096, 0), (0, 4095), (u64::MAX, 4096)] {
            assert_eq!(GfnRange::from_bytes(Gpa(gpa), bytes), Err(Error::Argument));
        }
    }

    #[test]
    fn ranges_end_inside_the_address_space() {
        let last = (1 << 52) - PAGE_SIZE;
        assert!(GfnRange::from_bytes(Gpa(last), PAGE_SIZE).is_ok());
        assert!(GfnRange::from_bytes(Gpa(last), 2 * PAGE_SIZE).is_err());
        assert!(GfnRange::from_bytes(Gpa(PAGE_SIZE), u64::MAX - PAGE_SIZE + 1).is_err());
    }

    #[test]
    fn range_accessors_agree() {
        let r = GfnRange::from_bytes(Gpa(0x3000), 0x5000).unwrap();
        assert_eq!((r.start(), r.pages(), r.end(), r.bytes()), (Gfn(3), 5, Gfn(8), 0x5000));
        assert_eq!(r.start().gpa(), Gpa(0x3000));
    }
}
