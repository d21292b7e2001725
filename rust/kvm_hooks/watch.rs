// SPDX-License-Identifier: GPL-2.0

//! What the exit path compares: has anything changed since the last look?

use kernel::prelude::*;
use kvm_vm::{Hva, Vm};
use rcu_table::Reader;

use crate::{
    inline_atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    Doorbell,
};

/// A doorbell, and what it and the memslots said at the last look.
pub struct Watch {
    doorbell: Doorbell,
    seen: AtomicU32,
    generation: AtomicU64,
}

/// Not the generation of any memslots.
const NONE: u64 = u64::MAX;

impl Watch {
    /// Watches the word at `hva`, which says `seen` as long as there is nothing new; the first look arms it. On
    /// a thread of the VMM; context and errors as [`Doorbell::create`].
    pub fn new(vm: &Vm, hva: Hva, seen: u32) -> Result<Self> {
        Ok(Self {
            doorbell: Doorbell::create(vm, hva)?,
            seen: AtomicU32::new(seen),
            generation: AtomicU64::new(NONE),
        })
    }

    /// Whether nothing has changed. A hint: what it says leads to a look, or to none until the next exit.
    #[inline]
    pub fn is_quiet(&self, vm: &Vm, reader: Reader<'_>) -> bool {
        self.doorbell.read(reader) == Some(self.seen.load(Relaxed))
            && self.generation.load(Relaxed) == vm.generation()
    }

    /// What the doorbell says, if it says that there is something new. Any context.
    pub fn news(&self, reader: Reader<'_>) -> Option<u32> {
        self.doorbell.read(reader).filter(|&tail| tail != self.seen.load(Relaxed))
    }

    /// The position before which everything was seen at the last look. Any context.
    pub fn seen(&self) -> u32 {
        self.seen.load(Relaxed)
    }

    /// A look begins: what changes from here on is noticed at the next exit.
    #[inline]
    pub fn begin_look(&self, vm: &Vm) {
        self.generation.store(vm.generation(), Relaxed);
    }

    /// Has the next exit lead to a look. Any context.
    pub fn look_again(&self) {
        self.generation.store(NONE, Relaxed);
    }

    /// A look has seen everything before `position`.
    #[inline]
    pub fn end_look(&self, position: u32) {
        self.seen.store(position, Relaxed);
    }

    /// Makes a stale doorbell good. Context as [`Doorbell::rearm`].
    #[inline]
    pub fn keep_armed(&self, vm: &Vm) {
        if self.doorbell.is_stale() {
            self.doorbell.rearm(vm);
        }
    }
}
