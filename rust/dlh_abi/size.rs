// SPDX-License-Identifier: GPL-2.0

//! The size of a ring, checked once and trusted afterwards.

use crate::{Error, RawEntry};

/// Bytes before the first entry: the guest's cache line and the host's.
pub const HEADER_BYTES: usize = 128;

/// The number of entries of a ring.
///
/// # Invariants
///
/// A power of two between [`RingSize::MIN`] and [`RingSize::MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize(u32);

impl RingSize {
    /// Smallest ring (`KVM_DLH_RING_MIN_ENTRIES`).
    pub const MIN: u32 = 64;
    /// Largest ring (`KVM_DLH_RING_MAX_ENTRIES`).
    pub const MAX: u32 = 65536;

    /// The number of entries.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The slot of a position; the only place an index is masked.
    #[inline]
    pub const fn slot(self, position: u32) -> u32 {
        position & (self.0 - 1)
    }

    /// Bytes of guest memory the whole ring takes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        HEADER_BYTES as u64 + self.0 as u64 * RawEntry::BYTES as u64
    }

    /// Byte offset of a slot from the start of the ring.
    #[inline]
    pub const fn slot_offset(self, slot: u32) -> u64 {
        HEADER_BYTES as u64 + (slot & (self.0 - 1)) as u64 * RawEntry::BYTES as u64
    }
}

impl TryFrom<u64> for RingSize {
    type Error = Error;

    fn try_from(entries: u64) -> Result<Self, Error> {
        match u32::try_from(entries) {
            // INVARIANT: checked here.
            Ok(n) if n.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&n) => Ok(Self(n)),
            _ => Err(Error::Size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_in_range() {
        for n in [0, 1, 32, 63, 65, 96, 65535, 65537, 131072, 1 << 32, u64::MAX] {
            assert_eq!(RingSize::try_from(n), Err(Error::Size), "{n}");
        }
        for shift in 6..=16 {
            assert_eq!(RingSize::try_from(1u64 << shift).unwrap().get(), 1 << shift);
        }
    }

    #[test]
    fn slots_stay_inside() {
        let s = RingSize::try_from(64).unwrap();
        assert_eq!(s.bytes(), 128 + 64 * 32);
        for p in [0u32, 63, 64, 65, u32::MAX] {
            assert!(s.slot_offset(s.slot(p)) + 32 <= s.bytes());
        }
    }
}
