// SPDX-License-Identifier: GPL-2.0

//! Work on the vCPU's own thread, after the exit and before the next entry or the return to the VMM.
//!
//! C header: `include/linux/task_work.h`

use core::{cell::UnsafeCell, mem::offset_of};

use dlh_bindings as bindings;
use kernel::{
    sync::{Arc, ArcBorrow},
    time::{delay::fsleep, Delta},
    types::Opaque,
};

use crate::inline_atomic::{fence, AtomicBool, AtomicI64, Ordering};

/// Something that can be queued on the vCPU thread.
pub trait Deferred: Send + Sync + Sized + 'static {
    /// Handed over from where it is queued to where it runs.
    type Payload: Send;

    /// The work item inside.
    fn task_work(&self) -> &TaskWork<Self>;

    /// Runs once for each time it was queued.
    ///
    /// # Context
    ///
    /// The thread that queued it; may sleep; no locks held, but `vcpu->mutex` may be.
    fn run(this: Arc<Self>, payload: Self::Payload);
}

/// A work item; at most one instance of it is queued at any time.
///
/// # Invariants
///
/// `item` is linked into a task's list, and `payload` is `Some`, only while `queued` is set. Whoever
/// sets it owns both until the item is linked; from then on the function that runs owns them, until it
/// clears `queued`.
pub struct TaskWork<T: Deferred> {
    item: Opaque<bindings::dlh_task_work>,
    payload: UnsafeCell<Option<(Arc<T>, T::Payload)>>,
    queued: AtomicBool,
}

// SAFETY: `payload` is owned by whoever the invariant says; what it holds is `Send`.
unsafe impl<T: Deferred> Sync for TaskWork<T> {}
// SAFETY: Never moved while it is linked: it lives inside an `Arc` that the payload keeps.
unsafe impl<T: Deferred> Send for TaskWork<T> {}

impl<T: Deferred> Default for TaskWork<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Deferred> TaskWork<T> {
    /// An idle work item.
    pub fn new() -> Self {
        // INVARIANT: Not queued.
        Self {
            item: Opaque::uninit(),
            payload: UnsafeCell::new(None),
            queued: AtomicBool::new(false),
        }
    }

    /// Queues `this` on the current task, unless it is queued already; returns whether it did. `payload` is
    /// only made if it is needed. In a system call of a user thread; interrupts may be off. Takes no lock.
    #[inline]
    pub fn queue(this: ArcBorrow<'_, T>, payload: impl FnOnce() -> Option<T::Payload>) -> bool {
        let work = this.task_work();
        if work.queued.load(Ordering::Relaxed) || work.queued.swap(true, Ordering::SeqCst) {
            return false;
        }
        let Some(payload) = payload() else {
            work.queued.store(false, Ordering::Release);
            return false;
        };
        IN_FLIGHT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: By the type invariant the flag just set makes the payload ours.
        unsafe { *work.payload.get() = Some((this.into(), payload)) };
        // SAFETY: As above for the item; it stays in place, for the payload holds a count of `this`.
        let added =
            unsafe { bindings::dlh_task_work_add_current(work.item.get(), Some(Self::entry)) };
        if added != 0 {
            // The task is exiting and makes no system calls, so it cannot be here; nobody waits for this.
            // SAFETY: Not linked, so still ours.
            let payload = unsafe { (*work.payload.get()).take() };
            work.queued.store(false, Ordering::Release);
            drop(payload);
            IN_FLIGHT.fetch_sub(1, Ordering::Release);
        }
        added == 0
    }

    /// Called on the task that it was queued on.
    ///
    /// # Safety
    ///
    /// `item` is the field of a `TaskWork<T>` that was queued, and is not linked any more.
    unsafe extern "C" fn entry(item: *mut bindings::dlh_task_work) {
        let offset = offset_of!(Self, item);
        // SAFETY: `item` is the field of a `TaskWork<T>`: no other item is queued with this function.
        let work = unsafe { &*item.byte_sub(offset).cast::<Self>() };
        // SAFETY: By the type invariant the payload is ours until `queued` is cleared.
        let payload = unsafe { (*work.payload.get()).take() };
        // From here on it may be queued again; what is written before that is seen by this run.
        work.queued.store(false, Ordering::Release);
        fence(Ordering::SeqCst);
        if let Some((this, payload)) = payload {
            T::run(this, payload);
        }
        IN_FLIGHT.fetch_sub(1, Ordering::Release);
    }
}

/// Work items that are queued or running, in the whole module.
static IN_FLIGHT: AtomicI64 = AtomicI64::new(0);

/// Waits until no work item is queued or running. Nobody may queue any more. May sleep.
pub fn wait_for_task_works() {
    // The threads are on their way into the guest or to the VMM, so this is a matter of microseconds
    // unless they wait for memory.
    while IN_FLIGHT.load(Ordering::Acquire) > 0 {
        fsleep(Delta::from_millis(1));
    }
    crate::synchronize_tasks();
}
