// SPDX-License-Identifier: GPL-2.0

//! A word of guest memory that may be read with interrupts off.

use core::ptr::NonNull;

use dlh_bindings as bindings;
use kernel::{error::from_err_ptr, prelude::*};
use kvm_vm::{Hva, Vm};

use rcu_table::Reader;

/// A hint that a ring may have new entries: the guest's `tail`, read without page tables.
///
/// What it says is never trusted. A stale doorbell (the VMM's mapping changed) says so, and whoever
/// reads it then looks through the memslots.
///
/// # Invariants
///
/// Owns the C object, which watches a page of the VMM.
pub struct Doorbell {
    bell: NonNull<bindings::dlh_doorbell>,
}

// SAFETY: The object belongs to no thread.
unsafe impl Send for Doorbell {}
// SAFETY: Re-arming takes the object's own lock, and readers are covered by RCU.
unsafe impl Sync for Doorbell {}

impl Doorbell {
    /// A doorbell for the page-aligned `hva` of the VMM of `vm`, stale at first. On a thread of that VMM; may
    /// sleep; no locks, the memslots' included.
    ///
    /// # Errors
    ///
    /// `EBUSY` if somebody keeps the mmap lock, `EINTR` if the task is being killed, `EFAULT` on another thread, `ENOMEM`.
    pub fn create(vm: &Vm, hva: Hva) -> Result<Self> {
        if !vm.is_current() {
            return Err(EFAULT);
        }
        // SAFETY: May sleep, and the current thread has an mm: it is the VMM's.
        let bell = from_err_ptr(unsafe { bindings::dlh_doorbell_create(hva.0) })?;
        // INVARIANT: Just created.
        Ok(Self { bell: NonNull::new(bell).ok_or(ENOMEM)? })
    }

    /// Where the word is, or null. Any context.
    #[inline]
    fn word(&self) -> *const u32 {
        // SAFETY: By the type invariant; the field changes, and is read in one access.
        unsafe { (&raw const (*self.bell.as_ptr()).word).read_volatile() }
    }

    /// The word, or `None` if the doorbell is stale. Any context.
    #[inline]
    pub fn read(&self, _reader: Reader<'_>) -> Option<u32> {
        let word = self.word();
        if word.is_null() {
            return None;
        }
        // SAFETY: The page is let go of a grace period after the field was cleared. The guest may be
        // writing there: a single access, of a word that is aligned as the page is.
        Some(unsafe { word.read_volatile() })
    }

    /// Whether it has to be armed again. Any context.
    #[inline]
    pub fn is_stale(&self) -> bool {
        self.word().is_null()
    }

    /// Makes a stale doorbell good again, if the page is there. Where it is not, or the VMM's mapping is just
    /// being changed, it stays stale, which costs a look at each exit and nothing else. On a thread of the VMM
    /// of `vm`; may sleep, but waits for no user.
    pub fn rearm(&self, vm: &Vm) {
        if vm.is_current() {
            // SAFETY: By the type invariant; the current thread has the VMM's mm.
            let _ = unsafe { bindings::dlh_doorbell_rearm(self.bell.as_ptr()) };
        }
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; a dropped object has no readers.
        unsafe { bindings::dlh_doorbell_destroy(self.bell.as_ptr()) }
    }
}

/// Waits until no page is held for a doorbell that has been dropped: before the module goes. May sleep.
pub fn barrier() {
    // SAFETY: May sleep here.
    unsafe { bindings::dlh_doorbell_barrier() }
}
