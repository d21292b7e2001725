// SPDX-License-Identifier: GPL-2.0

//! The workqueue.

use core::ptr::NonNull;

use dlh_bindings as bindings;
use kernel::{
    prelude::*,
    workqueue::{Queue, RawWorkItem},
};

/// A workqueue of the module's own. Its works run on any CPU, in any order, beside each other: one that
/// waits keeps no other waiting, as long as there are fewer than the kernel's `WQ_DFL_ACTIVE` of them.
///
/// # Invariants
///
/// Owns the C object. No work is queued on it by a timer, but those of [`crate::Linger`], which are
/// cancelled first.
pub struct OwnQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A workqueue belongs to no thread.
unsafe impl Send for OwnQueue {}
// SAFETY: Works may be queued by any thread at any time.
unsafe impl Sync for OwnQueue {}

impl OwnQueue {
    /// An empty one, named after the module. May sleep.
    pub fn new() -> Result<Self> {
        // SAFETY: May sleep here.
        let queue = unsafe { bindings::dlh_workqueue_create() };
        // INVARIANT: Just created.
        NonNull::new(queue).map(Self).ok_or(ENOMEM)
    }

    /// Has a work done. Any context, but of a non-maskable interrupt.
    pub fn enqueue<W, const ID: u64>(&self, work: W) -> W::EnqueueOutput
    where
        W: RawWorkItem<ID> + Send + 'static,
    {
        // SAFETY: By the type invariant, for as long as `self` is borrowed; what is queued is done before
        // the workqueue goes. Nothing is queued with a delay: that would outlive it.
        unsafe { Queue::from_raw(self.raw().cast_const().cast()) }.enqueue(work)
    }

    /// Waits until all works that were queued before have been done. Signals do not end the wait. May
    /// sleep.
    pub fn flush(&self) {
        // SAFETY: By the type invariant; may sleep here.
        unsafe { bindings::dlh_workqueue_flush(self.raw()) }
    }

    pub(crate) fn raw(&self) -> *mut bindings::workqueue_struct {
        self.0.as_ptr()
    }
}

impl Drop for OwnQueue {
    /// Waits for all its works. Must not be dropped by one of them. May sleep.
    fn drop(&mut self) {
        // SAFETY: By the type invariant; may sleep here.
        unsafe { bindings::dlh_workqueue_destroy(self.raw()) }
    }
}
