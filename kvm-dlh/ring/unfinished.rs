// SPDX-License-Identifier: GPL-2.0

//! What of a ring the host still has in its hands, and the reference to the VM that it needs for that.

use kernel::{new_spinlock, prelude::*, sync::SpinLock};
use kvm_hooks::{
    inline_atomic::{fence, AtomicBool, AtomicU32, Ordering},
    wait_killable, wait_until, wake, Killed,
};
use kvm_vm::{Vcpu, VcpuRef};

/// Calls that are not settled yet, and entries that a drain has left in the ring.
#[pin_data]
pub(super) struct Unfinished {
    /// Nothing is outstanding, and nothing was left behind.
    none: AtomicBool,
    /// Threads that wait for the end of something.
    waiters: AtomicU32,
    #[pin]
    counts: SpinLock<Counts>,
}

/// # Invariants
///
/// `outstanding` are the entries that an operation was given and whose end has not been shown to the guest
/// yet; `late` of them were completed on threads that are not the VMM's, and wait for one of those. `hold`
/// is `Some` exactly while there are any, or entries were left behind.
struct Counts {
    outstanding: u32,
    late: u32,
    left_behind: bool,
    hold: Option<VcpuRef>,
}

impl Unfinished {
    /// Nothing.
    pub(super) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            none: AtomicBool::new(true),
            waiters: AtomicU32::new(0),
            counts <- new_spinlock!(Counts { outstanding: 0, late: 0, left_behind: false, hold: None }),
        })
    }

    /// Whether there is nothing. Only drains change that from true to false.
    #[inline]
    pub(super) fn is_none(&self) -> bool {
        self.none.load(Ordering::Acquire)
    }

    /// Calls whose end has not been shown.
    pub(super) fn outstanding(&self) -> u32 {
        self.counts.lock().outstanding
    }

    /// Calls are about to be given to operations: the VM of `vcpu` is kept until they have ended. False if
    /// the VM is being destroyed.
    #[must_use]
    pub(super) fn begin(&self, vcpu: &Vcpu, calls: u32) -> bool {
        let mut counts = self.counts.lock();
        if counts.hold.is_none() {
            counts.hold = vcpu.try_get();
        }
        if counts.hold.is_some() {
            counts.outstanding += calls;
            self.none.store(false, Ordering::Release);
        }
        counts.hold.is_some()
    }

    /// Calls have ended, and the guest has been shown that, or cannot be. May sleep.
    pub(super) fn ended(&self, calls: u32) {
        if calls == 0 {
            return;
        }
        let unneeded = {
            let mut counts = self.counts.lock();
            counts.outstanding -= calls;
            self.release(&mut counts)
        };
        self.tell();
        // May be the last reference to the VM: not under the lock.
        drop(unneeded);
    }

    /// A drain has left entries in the ring, or none. May sleep.
    pub(super) fn leave_behind(&self, vcpu: &Vcpu, left: bool) {
        let unneeded = {
            let mut counts = self.counts.lock();
            if left && counts.hold.is_none() {
                counts.hold = vcpu.try_get();
            }
            counts.left_behind = left && counts.hold.is_some();
            self.release(&mut counts)
        };
        drop(unneeded);
    }

    /// Nothing is taken from the ring any more. May sleep.
    pub(super) fn forget_left_behind(&self) {
        let unneeded = {
            let mut counts = self.counts.lock();
            counts.left_behind = false;
            self.release(&mut counts)
        };
        drop(unneeded);
    }

    fn release(&self, counts: &mut Counts) -> Option<VcpuRef> {
        let none = counts.outstanding == 0 && !counts.left_behind;
        self.none.store(none, Ordering::Release);
        if none {
            counts.hold.take()
        } else {
            None
        }
    }

    /// Another reference to the vCPU on whose behalf something is unfinished, if `choose` says so. Spin
    /// locks may be held.
    pub(super) fn held(&self, choose: impl FnOnce(&Vcpu) -> bool) -> Option<VcpuRef> {
        let counts = self.counts.lock();
        counts.hold.as_ref().filter(|vcpu| choose(vcpu))?.try_get()
    }

    /// Whether the current thread is not one of the VMM for which something is outstanding.
    pub(super) fn is_foreign(&self) -> bool {
        self.counts.lock().hold.as_ref().is_some_and(|vcpu| !vcpu.vm().is_current())
    }

    /// A call was completed on a thread that is not the VMM's.
    pub(super) fn late(&self) {
        self.counts.lock().late += 1;
        self.tell();
    }

    /// Such a call is about to be ended.
    pub(super) fn not_late(&self) {
        self.counts.lock().late -= 1;
    }

    /// Whether calls were completed late, and wait for a thread of the VMM. Spin locks may be held.
    pub(super) fn has_late(&self) -> bool {
        self.counts.lock().late > 0
    }

    /// Has those who wait ask again. Any context.
    #[inline]
    pub(super) fn tell(&self) {
        // Pairs with the barrier in `Waiter::new`: either what changed before this is seen there, or the
        // waiter here.
        fence(Ordering::SeqCst);
        if self.waiters.load(Ordering::Relaxed) > 0 {
            wake(self);
        }
    }

    /// Waits until `done` says so, which is asked after each [`Unfinished::tell`]. May sleep, and be frozen; `done`
    /// must not sleep.
    pub(super) fn wait_killable(&self, done: impl Fn() -> bool) -> Result<(), Killed> {
        let _waiter = Waiter::new(self);
        wait_killable(self, done)
    }

    /// As [`Unfinished::wait_killable`], but nothing else ends it.
    pub(super) fn wait_until(&self, done: impl Fn() -> bool) {
        let _waiter = Waiter::new(self);
        wait_until(self, done)
    }
}

/// Somebody waits, until this is dropped.
struct Waiter<'a>(&'a Unfinished);

impl<'a> Waiter<'a> {
    fn new(unfinished: &'a Unfinished) -> Self {
        unfinished.waiters.fetch_add(1, Ordering::SeqCst);
        Self(unfinished)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiters.fetch_sub(1, Ordering::Relaxed);
    }
}
