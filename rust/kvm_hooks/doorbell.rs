// SPDX-License-Identifier: GPL-2.0

//! A word of guest memory that may be read with interrupts off.

use core::ptr::NonNull;

use dlh_bindings as bindings;
use kernel::{
    error::{from_err_ptr, to_result},
    prelude::*,
};
use kvm_vm::{GuestWindow, Hva};

use rcu_table::Reader;

/// A hint that a ring may have new entries: the guest's `tail`, read without page tables.
///
/// What it says is never trusted. A stale doorbell (the VMM's mapping changed) says so, and whoever
/// reads it then looks through the memslots.
///
/// # Invariants
///
/// Owns the C object, which watches the page of `hva`.
pub struct Doorbell {
    bell: NonNull<bindings::dlh_doorbell>,
    hva: Hva,
}

// SAFETY: The object belongs to no thread.
unsafe impl Send for Doorbell {}
// SAFETY: Re-arming takes the object's own lock, and readers are covered by RCU.
unsafe impl Sync for Doorbell {}

impl Doorbell {
    /// A doorbell at the first word of `window`. On a thread of the VMM; may sleep.
    pub fn create(window: &GuestWindow<'_>) -> Result<Self> {
        let Hva(hva) = window.hva();
        // SAFETY: May sleep, and `current->mm` is the VMM's: a window opens nowhere else.
        let bell = from_err_ptr(unsafe { bindings::dlh_doorbell_create(hva) })?;
        // INVARIANT: Just created.
        Ok(Self { bell: NonNull::new(bell).ok_or(ENOMEM)?, hva: window.hva() })
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

    /// Makes a stale doorbell good again. On a thread of the VMM; may sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the window lies elsewhere in the VMM by now, or the VMM could not write there; the
    /// doorbell stays stale then.
    pub fn rearm(&self, window: &GuestWindow<'_>) -> Result {
        if window.hva() != self.hva {
            return Err(EFAULT);
        }
        // SAFETY: By the type invariant; `current->mm` is the VMM's, for a window opens nowhere else.
        to_result(unsafe { bindings::dlh_doorbell_rearm(self.bell.as_ptr()) })
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
