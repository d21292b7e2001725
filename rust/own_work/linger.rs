// SPDX-License-Identifier: GPL-2.0

//! What is costly to make and to give up is given up late.

use core::{ffi::c_void, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::{
    error::from_err_ptr,
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

use crate::OwnQueue;

/// How long it is kept when nobody uses it any more, in milliseconds: however users come and go, it is made
/// and given up once a minute at most.
const LINGER_MS: u32 = 60_000;

/// Keeps something while there are users, and a minute longer. Attaching a probe changes the code of the
/// kernel, for which every CPU is interrupted: what a guest does must not decide how often.
///
/// # Invariants
///
/// `later` is the C object, whose data is this object. It is queued only while `state` is locked and not
/// closed.
#[pin_data(PinnedDrop)]
pub struct Linger<T: Send + Unpin + 'static> {
    queue: Arc<OwnQueue>,
    later: NonNull<bindings::dlh_later>,
    #[pin]
    state: Mutex<State<T>>,
}

struct State<T> {
    users: usize,
    kept: Option<T>,
    closed: bool,
}

// SAFETY: The C object belongs to no thread; what is kept is `Send`, and behind a mutex.
unsafe impl<T: Send + Unpin> Send for Linger<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Unpin> Sync for Linger<T> {}

impl<T: Send + Unpin + 'static> Linger<T> {
    /// Nothing is kept. `queue` is where it is given up. May sleep.
    pub fn new(queue: Arc<OwnQueue>) -> impl PinInit<Self, Error> {
        try_pin_init!(&this in Self {
            queue,
            // SAFETY: May sleep here. The data is what `expired` takes; it stays in place, and is valid
            // until the work has been cancelled for good. It is queued by methods only.
            later: NonNull::new(from_err_ptr(unsafe {
                bindings::dlh_later_create(Some(expired::<T>), this.as_ptr().cast::<c_void>())
            })?).ok_or(ENOMEM)?,
            state <- new_mutex!(State { users: 0, kept: None, closed: false }),
        }? Error)
    }

    /// Counts a user, until [`Linger::leave`]. Calls `make` if nothing is kept. May sleep.
    ///
    /// # Errors
    ///
    /// What `make` reports, or `ENODEV` after [`Linger::close`]; nothing is counted then.
    pub fn enter(&self, make: impl FnOnce() -> Result<T>) -> Result {
        let mut state = self.state.lock();
        if state.closed {
            return Err(ENODEV);
        }
        if state.kept.is_none() {
            state.kept = Some(make()?);
        }
        state.users += 1;
        Ok(())
    }

    /// Counts a user off. May sleep.
    pub fn leave(&self) {
        let mut state = self.state.lock();
        state.users -= 1;
        if state.users == 0 && !state.closed {
            // SAFETY: By the type invariant; locked and not closed.
            unsafe { bindings::dlh_later_queue(self.later.as_ptr(), self.queue.raw(), LINGER_MS) }
        }
    }

    /// Gives up at once what is kept, used or not, and keeps nothing any more. May sleep.
    pub fn close(&self) {
        self.state.lock().closed = true;
        // SAFETY: By the type invariant; may sleep here. The lock is not held: what runs may want it.
        unsafe { bindings::dlh_later_cancel(self.later.as_ptr()) };
        let mut state = self.state.lock();
        let kept = state.kept.take();
        drop(state);
        drop(kept);
    }
}

#[pinned_drop]
impl<T: Send + Unpin + 'static> PinnedDrop for Linger<T> {
    fn drop(self: Pin<&mut Self>) {
        self.close();
        // SAFETY: Cancelled, and never queued again.
        unsafe { bindings::dlh_later_destroy(self.later.as_ptr()) }
    }
}

/// # Safety
///
/// `data` points to a `Linger<T>` that waits for this before it goes.
unsafe extern "C" fn expired<T: Send + Unpin + 'static>(data: *mut c_void) {
    // SAFETY: By the caller's promise.
    let linger = unsafe { &*data.cast::<Linger<T>>() };
    let mut state = linger.state.lock();
    if state.users == 0 {
        // Under the lock: a new one is made only when the old one has gone.
        drop(state.kept.take());
    }
}
