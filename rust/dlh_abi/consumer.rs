// SPDX-License-Identifier: GPL-2.0

//! The host's side of a ring: what it has taken, and what it has finished.

use crate::{Cookie, RawEntry, RingSize};

/// Why a ring can no longer be read; it is detached for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The guest's tail is further ahead than the ring is long, or went backwards.
    Overrun,
    /// An entry's tag is not that of its position.
    Tag,
}

/// A run of slots that lie side by side in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First slot.
    pub slot: u32,
    /// Number of slots.
    pub len: u32,
}

/// The indices of one ring as the host keeps them, out of the guest's reach.
///
/// # Invariants
///
/// `done`, `executed`, `collected` and every tail that [`Consumer::visible`] accepted follow each other
/// in this order, and the last is at most `size` ahead of the first (all in wrapping arithmetic).
#[derive(Clone, Copy, Debug)]
pub struct Consumer {
    size: RingSize,
    cookie: Cookie,
    collected: u32,
    executed: u32,
    done: u32,
}

impl Consumer {
    /// A ring whose first entry will be at `start`: any value, the guest chooses.
    #[inline]
    pub const fn new(size: RingSize, cookie: Cookie, start: u32) -> Self {
        // INVARIANT: all indices are equal.
        Self { size, cookie, collected: start, executed: start, done: start }
    }

    /// Size of the ring.
    #[inline]
    pub const fn size(&self) -> RingSize {
        self.size
    }

    /// Secret of the ring.
    #[inline]
    pub const fn cookie(&self) -> Cookie {
        self.cookie
    }

    /// Position of the next entry to take.
    #[inline]
    pub const fn collected(&self) -> u32 {
        self.collected
    }

    /// Every position before this one is finished.
    #[inline]
    pub const fn done(&self) -> u32 {
        self.done
    }

    /// Entries taken and not passed by [`Consumer::done`].
    #[inline]
    pub const fn unfinished(&self) -> u32 {
        self.collected.wrapping_sub(self.done)
    }

    /// How many entries wait when the guest's tail is `tail`.
    ///
    /// # Errors
    ///
    /// [`Broken::Overrun`] if `tail` claims slots that the host still owns.
    #[inline]
    pub const fn visible(&self, tail: u32) -> Result<u32, Broken> {
        let outstanding = tail.wrapping_sub(self.done);
        let waiting = tail.wrapping_sub(self.collected);
        // `waiting > outstanding`: the tail is behind what has been taken already.
        if outstanding > self.size.get() || waiting > outstanding {
            return Err(Broken::Overrun);
        }
        Ok(waiting)
    }

    /// The slots of the next `want` entries up to where the ring wraps.
    #[inline]
    pub const fn next_run(&self, want: u32) -> Run {
        let slot = self.size.slot(self.collected);
        let to_end = self.size.get() - slot;
        Run { slot, len: if want < to_end { want } else { to_end } }
    }

    /// Takes the copy `raw` of the next entry, and returns its position, which names it until it is finished.
    ///
    /// # Errors
    ///
    /// [`Broken::Tag`] if these bytes are not the entry of that position; nothing is taken.
    #[inline]
    pub fn take(&mut self, raw: &RawEntry) -> Result<u32, Broken> {
        if raw.tag != self.cookie.tag(self.collected) {
            return Err(Broken::Tag);
        }
        let position = self.collected;
        // INVARIANT: the caller takes no more than `visible()` entries, so this stays behind tail.
        self.collected = self.collected.wrapping_add(1);
        Ok(position)
    }

    /// Whether all of `copies` are the next entries.
    pub fn are_next(&self, copies: &[RawEntry]) -> bool {
        let mut position = self.collected;
        copies.iter().all(|raw| {
            let tag = self.cookie.tag(position);
            position = position.wrapping_add(1);
            raw.tag == tag
        })
    }

    /// Takes the leading NOPs of `copies`, which are copies of the next entries, and returns how many. They
    /// are executed by that. The one after them has another operation, flags, or another tag; or its position is 0,
    /// which no [`Consumer::next_run`] comes to in the middle: the ring ends before it.
    #[inline]
    pub fn take_nops(&mut self, copies: &[RawEntry]) -> u32 {
        let begin = self.cookie.tag(self.collected);
        // Tags follow each other up to the last position.
        let mut tag = begin;
        for raw in copies {
            if raw.tag != tag || !raw.is_plain_nop() {
                break;
            }
            tag = tag.wrapping_add(1);
        }
        let taken = tag.wrapping_sub(begin) as u32;
        // INVARIANT: the caller hands in no more than `visible()` entries.
        self.collected = self.collected.wrapping_add(taken);
        taken
    }

    /// Every entry taken so far has been executed, or is pending: `done` may come to it.
    #[inline]
    pub fn executed_all(&mut self) {
        // INVARIANT: equal to `collected`.
        self.executed = self.collected;
    }

    /// Moves `done` forward to the first executed entry that `is_pending(slot)`, and returns it.
    #[inline]
    pub fn advance(&mut self, mut is_pending: impl FnMut(u32) -> bool) -> u32 {
        // INVARIANT: stops at `executed`.
        while self.done != self.executed && !is_pending(self.size.slot(self.done)) {
            self.done = self.done.wrapping_add(1);
        }
        self.done
    }

    /// [`Consumer::advance`] when nothing is pending, in constant time.
    #[inline]
    pub fn advance_all(&mut self) -> u32 {
        // INVARIANT: equal to `executed`.
        self.done = self.executed;
        self.done
    }
}
