// SPDX-License-Identifier: GPL-2.0

//! How far a ring has come: what is taken, what is pending, what the guest has been shown.

use dlh_abi::{header, Broken, Consumer, RawEntry, RingSize, RingWords, Status};
use kernel::{
    prelude::*,
    sync::barrier::{smp_mb, Full},
};
use kvm_vm::{Absent, GuestWindow};

/// The indices of a ring, kept together under one mutex.
///
/// # Invariants
///
/// `pending` has one bit a slot; it is set exactly for the `unfinished` entries that an operation was given
/// and that are not finished. `done` and `declined_shown` stand in guest memory as long as the ring is live.
pub(super) struct State {
    consumer: Consumer,
    pending: KVec<u64>,
    unfinished: u32,
    done: u32,
    declined: u64,
    declined_shown: u64,
}

impl State {
    /// A ring at its start, where `done` is shown as the consumer has it. May sleep.
    pub(super) fn new(consumer: Consumer) -> Result<Self> {
        let words = consumer.size().get().div_ceil(u64::BITS);
        let pending = KVec::from_elem(0, words as usize, GFP_KERNEL_ACCOUNT)?;
        let done = consumer.done();
        Ok(Self { consumer, pending, unfinished: 0, done, declined: 0, declined_shown: 0 })
    }

    /// The indices.
    #[inline]
    pub(super) fn consumer(&self) -> &Consumer {
        &self.consumer
    }

    /// How many entries wait, as a copy of the header says.
    ///
    /// # Errors
    ///
    /// The words that are ours are not what was stored: the memory went back in time or to another use. Or
    /// the guest's is out of bounds.
    #[inline]
    pub(super) fn waiting(&self, words: &RingWords) -> Result<u32, Broken> {
        self.check(words)?;
        self.consumer.visible(words.tail)
    }

    /// Whether the words that are ours are what was stored.
    #[inline]
    pub(super) fn check(&self, words: &RingWords) -> Result<(), Broken> {
        if words.done == self.done && words.cookie == self.consumer.cookie() {
            Ok(())
        } else {
            Err(Broken::Overrun)
        }
    }

    /// Takes the leading NOPs of `copies`, which is all that executing them takes.
    #[inline]
    pub(super) fn take_nops(&mut self, copies: &[RawEntry]) -> u32 {
        self.consumer.take_nops(copies)
    }

    /// Takes the next entry, and returns its position; `done` does not pass it before [`State::executed_all`].
    #[inline]
    pub(super) fn take(&mut self, raw: &RawEntry) -> Result<u32, Broken> {
        self.consumer.take(raw)
    }

    /// What was taken is executed, or pending.
    #[inline]
    pub(super) fn executed_all(&mut self) {
        self.consumer.executed_all();
    }

    fn place(size: RingSize, position: u32) -> (usize, u64) {
        let slot = size.slot(position);
        ((slot / u64::BITS) as usize, 1 << (slot % u64::BITS))
    }

    /// The entry at `position` is about to be given to an operation, and pending from here on.
    pub(super) fn begin(&mut self, position: u32) {
        let (word, bit) = Self::place(self.consumer.size(), position);
        if let Some(word) = self.pending.get_mut(word) {
            *word |= bit;
        }
        self.unfinished = self.unfinished.wrapping_add(1);
    }

    /// The entry at `position` is finished: `done` may pass it.
    pub(super) fn finish(&mut self, position: u32) {
        let (word, bit) = Self::place(self.consumer.size(), position);
        if let Some(word) = self.pending.get_mut(word) {
            *word &= !bit;
        }
        self.unfinished = self.unfinished.wrapping_sub(1);
    }

    /// The entry that `done` waits for, if there is one. As long as that is pending, the guest sees nothing
    /// of others that are finished.
    pub(super) fn first_pending(&mut self) -> Option<u32> {
        let first = self.advance();
        let (word, bit) = Self::place(self.consumer.size(), first);
        (first == self.done && self.pending[word] & bit != 0).then_some(first)
    }

    /// Stores the status of an entry, which counts as declined if that is not success. Nothing has changed
    /// where it cannot be stored.
    pub(super) fn write_status(
        &mut self,
        window: &GuestWindow<'_>,
        position: u32,
        status: Status,
    ) -> Result<(), Absent> {
        let size = self.consumer.size();
        let slot = size.slot_offset(size.slot(position)) as usize;
        window.write_u32(slot + RawEntry::STATUS_OFFSET, status.0 as u32)?;
        if !status.is_ok() {
            self.declined += 1;
        }
        Ok(())
    }

    /// `done` as the guest has been shown it.
    #[inline]
    pub(super) fn shown(&self) -> u32 {
        self.done
    }

    /// Whether the guest has been shown all that there is to show.
    pub(super) fn is_shown(&mut self) -> bool {
        self.advance() == self.done && self.declined == self.declined_shown
    }

    /// Stores `done`, and the count of declined entries, where the guest sees them.
    #[inline]
    pub(super) fn show(&mut self, window: &GuestWindow<'_>) -> Result<(), Absent> {
        let done = self.advance();
        if self.declined != self.declined_shown {
            window.write_u64(header::DECLINED, self.declined)?;
            self.declined_shown = self.declined;
        }
        if done != self.done {
            // Pairs with the guest's barrier after it reads done: statuses come first. x86 keeps stores in
            // order, so this keeps the compiler only.
            core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
            window.write_u32(header::DONE, done)?;
            self.done = done;
        }
        Ok(())
    }

    /// Moves `done` past what is finished.
    #[inline]
    fn advance(&mut self) -> u32 {
        if self.unfinished == 0 {
            return self.consumer.advance_all();
        }
        let pending = &self.pending;
        self.consumer
            .advance(|slot| pending[(slot / u64::BITS) as usize] & 1 << (slot % u64::BITS) != 0)
    }

    /// Writes the host's cache line of a new ring; the flag that says so comes last.
    pub(super) fn introduce(&self, window: &GuestWindow<'_>) -> Result<(), Absent> {
        window.write_u32(header::DONE, self.done)?;
        window.write_u64(header::COOKIE, self.consumer.cookie().0)?;
        window.write_u64(header::DECLINED, 0)?;
        window.write_u32(header::ENTRIES, self.consumer.size().get())?;
        window.write_u32(header::VERSION, dlh_abi::ABI_VERSION)?;
        smp_mb(Full);
        window.write_u32(header::FLAGS, dlh_abi::RING_ACTIVE)
    }
}
