// SPDX-License-Identifier: GPL-2.0

//! The guest's side of a ring.

use crate::{Call, Cookie, RawEntry, RingSize};

/// The indices of one ring as the guest keeps them.
#[derive(Clone, Copy, Debug)]
pub struct Producer {
    size: RingSize,
    cookie: Cookie,
    tail: u32,
}

impl Producer {
    /// A ring that the host has just accepted with this cookie and first position.
    #[inline]
    pub const fn new(size: RingSize, cookie: Cookie, start: u32) -> Self {
        Self { size, cookie, tail: start }
    }

    /// Position of the next entry: what the guest publishes as `tail`.
    #[inline]
    pub const fn tail(&self) -> u32 {
        self.tail
    }

    /// Free slots when the host's index is `done`.
    #[inline]
    pub const fn space(&self, done: u32) -> u32 {
        self.size.get().saturating_sub(self.tail.wrapping_sub(done))
    }

    /// The next slot and what to put there, or `None` when the ring is full.
    ///
    /// The caller stores the entry, then a write barrier, then publishes [`Producer::tail`].
    #[inline]
    pub fn place(&mut self, done: u32, call: &Call) -> Option<(u32, RawEntry)> {
        if self.space(done) == 0 {
            return None;
        }
        let position = self.tail;
        self.tail = position.wrapping_add(1);
        Some((self.size.slot(position), RawEntry::new(self.cookie, position, call)))
    }
}

/// Whether the host's `done` has passed `position`, that is, whether that entry is finished.
#[inline]
pub const fn has_passed(done: u32, position: u32) -> bool {
    // Both lie within one ring length of each other, so the sign of the difference decides.
    done.wrapping_sub(position) as i32 > 0
}
