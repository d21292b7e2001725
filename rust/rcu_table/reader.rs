// SPDX-License-Identifier: GPL-2.0

//! Proof of an RCU read section.
//!
//! C header: `include/linux/rcupdate.h`

use core::marker::PhantomData;

use kernel::{sync::rcu, types::NotThreadSafe};

/// An RCU read section lasts as long as this: grace periods that begin meanwhile end later.
///
/// # Invariants
///
/// A guard is held, or interrupts stay off, for `'a`.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    _section: PhantomData<&'a ()>,
    _thread: NotThreadSafe,
}

impl<'a> Reader<'a> {
    /// The section of `guard`.
    #[inline]
    pub fn of(_guard: &'a rcu::Guard) -> Self {
        // INVARIANT: The guard is borrowed.
        Self { _section: PhantomData, _thread: NotThreadSafe }
    }

    /// The section that interrupts being off are.
    ///
    /// # Safety
    ///
    /// Interrupts are off, and RCU is watching this CPU, for `'a`: `synchronize_rcu()` waits for such
    /// sections too (Documentation/RCU/whatisRCU.rst).
    #[inline]
    pub unsafe fn interrupts_off() -> Self {
        // INVARIANT: By the caller's promise.
        Self { _section: PhantomData, _thread: NotThreadSafe }
    }
}
