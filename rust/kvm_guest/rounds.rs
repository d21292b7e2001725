// SPDX-License-Identifier: GPL-2.0

//! Work of the driver's own, on a workqueue that is frozen with the machine, from time to time.
//!
//! C header: `include/linux/workqueue.h`.

use core::{ffi::c_void, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::{prelude::*, sync::Arc};

/// What is done from time to time.
pub trait Round: Send + Sync + 'static {
    /// Does it; returns after how many milliseconds it is due again. One at a time; may sleep.
    fn round(&self) -> u32;
}

/// Has a [`Round`] done until this is dropped, which waits for one that is under way.
///
/// # Invariants
///
/// `raw` was started with `work` as its data, and has not been stopped.
pub struct Rounds<T: Round> {
    raw: NonNull<bindings::dlh_guest_rounds>,
    _work: Arc<T>,
}

// SAFETY: The work belongs to no thread.
unsafe impl<T: Round> Send for Rounds<T> {}
// SAFETY: There are no methods on a shared reference.
unsafe impl<T: Round> Sync for Rounds<T> {}

impl<T: Round> Rounds<T> {
    /// The first round is due after `ms` milliseconds. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn start(work: Arc<T>, ms: u32) -> Result<Self> {
        let data = core::ptr::from_ref(&*work).cast_mut().cast();
        // SAFETY: `data` is what the function takes, and stays until the work has been stopped.
        let raw = unsafe { bindings::dlh_guest_rounds_start(Some(round::<T>), data, ms) };
        // INVARIANT: Just started.
        Ok(Self { raw: NonNull::new(raw).ok_or(ENOMEM)?, _work: work })
    }
}

impl<T: Round> Drop for Rounds<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; may sleep here. No round begins afterwards.
        unsafe { bindings::dlh_guest_rounds_stop(self.raw.as_ptr()) }
    }
}

/// # Safety
///
/// `data` is the `T` of a live [`Rounds`].
unsafe extern "C" fn round<T: Round>(data: *mut c_void) -> u32 {
    // SAFETY: By the safety requirements; only shared references to it exist.
    unsafe { &*data.cast::<T>() }.round()
}
