// SPDX-License-Identifier: GPL-2.0

//! How far a ring has come: what is taken, what is still worked on, what is finished.

use dlh_abi::{Broken, Collected, Consumer, RawEntry};
use kernel::prelude::*;
use kvm_vm::{Vcpu, VcpuRef};

/// The indices of a ring and the entries that are pending, kept together under one spin lock.
///
/// # Invariants
///
/// `pending` has one bit a slot; it is set exactly for the `unfinished` entries that an operation was
/// given and that are not finished. `outstanding` are those and the ones whose end has not been shown to the guest yet. `closed` never goes back. `hold` is `Some` only while entries are outstanding or
/// were left in the ring.
pub(crate) struct Progress {
    consumer: Consumer,
    pending: KVec<u64>,
    unfinished: u32,
    outstanding: u32,
    /// Entries completed on foreign threads, which wait for one of the VMM to end them.
    pub(crate) late: u32,
    closed: bool,
    left_behind: bool,
    hold: Option<VcpuRef>,
}

impl Progress {
    /// A ring at its start. May sleep.
    pub(crate) fn new(consumer: Consumer) -> Result<Self> {
        let words = consumer.size().get().div_ceil(u64::BITS);
        let pending = KVec::from_elem(0, words as usize, GFP_KERNEL)?;
        Ok(Self {
            consumer,
            pending,
            unfinished: 0,
            outstanding: 0,
            late: 0,
            closed: false,
            left_behind: false,
            hold: None,
        })
    }

    /// The indices.
    pub(crate) fn consumer(&self) -> &Consumer {
        &self.consumer
    }

    /// Entries that an operation was given and that have not come to their end.
    pub(crate) fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// Whether the ring is detached: nothing is taken from it any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Detaches the ring.
    pub(crate) fn close(&mut self) {
        self.closed = true;
        self.left_behind = false;
    }

    /// A drain begins: `vcpu` is kept, and with it the VM, until nothing is outstanding or left
    /// behind. False if the ring is detached.
    pub(crate) fn begin_drain(&mut self, vcpu: &Vcpu) -> bool {
        if self.closed {
            return false;
        }
        if self.hold.is_none() {
            self.hold = vcpu.try_get();
        }
        self.left_behind = self.hold.is_some();
        self.left_behind
    }

    /// A drain is over. Returns what is to be dropped outside the lock.
    #[must_use]
    pub(crate) fn end_drain(&mut self, left_behind: bool) -> Option<VcpuRef> {
        self.left_behind = left_behind && !self.closed;
        self.release()
    }

    /// The vCPU on whose behalf something is unfinished.
    pub(crate) fn held(&self) -> Option<&VcpuRef> {
        self.hold.as_ref()
    }

    /// What is held for no reason any more; to be dropped outside the lock.
    #[must_use]
    pub(crate) fn release(&mut self) -> Option<VcpuRef> {
        if self.outstanding == 0 && !self.left_behind {
            self.hold.take()
        } else {
            None
        }
    }

    fn place(&self, position: u32) -> (usize, u64) {
        let slot = self.consumer.size().slot(position);
        ((slot / u64::BITS) as usize, 1 << (slot % u64::BITS))
    }

    /// Takes the next entry; `done` does not pass it before [`Progress::executed_all`].
    pub(crate) fn take(&mut self, raw: &RawEntry) -> Result<Collected, Broken> {
        self.consumer.take(raw)
    }

    /// The entry at `position` is about to be given to an operation, and pending from here on.
    pub(crate) fn begin(&mut self, position: u32) {
        let (word, bit) = self.place(position);
        self.pending[word] |= bit;
        self.unfinished += 1;
        self.outstanding += 1;
    }

    /// What was taken is executed, or pending.
    pub(crate) fn executed_all(&mut self) {
        self.consumer.executed_all();
        self.advance();
    }

    /// The entry at `position` is finished: `done` may pass it.
    pub(crate) fn finish(&mut self, position: u32) {
        let (word, bit) = self.place(position);
        self.pending[word] &= !bit;
        self.unfinished -= 1;
        self.advance();
    }

    fn advance(&mut self) {
        if self.unfinished == 0 {
            self.consumer.advance_all();
        } else {
            let pending = &self.pending;
            self.consumer.advance(|slot| {
                pending[(slot / u64::BITS) as usize] & 1 << (slot % u64::BITS) != 0
            });
        }
    }
    /// `count` finished entries have been shown to the guest, or cannot be.
    pub(crate) fn ended(&mut self, count: u32) {
        self.outstanding -= count;
    }
}
