// SPDX-License-Identifier: GPL-2.0

//! Deferrable operations, from the side of kvm_dlh.ko: who provides which, and calling them.
//!
//! C header: `include/linux/kvm_dlh.h`. Its three functions are below; `helpers/exports.c` exports them.
//!
//! # Locking
//!
//! An operation is called under `Registry::calls` (SRCU). Unregistering clears the slot, waits for the
//! calls that may have seen it, detaches it from every VM, and waits once more for those that were
//! detaching it on their own because a VM ended.

mod contexts;
mod exports;

use core::{ffi::c_void, marker::PhantomData, ptr::null_mut};

use dlh_abi::{
    Call, Error as CallError, Operation, Status, FEATURE_FREE_ANY, FEATURE_FREE_ASK,
    FEATURE_FREE_PAGES,
};
use dlh_bindings as bindings;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            ordering::{Acquire, Relaxed, Release},
            Atomic,
        },
        Arc, Mutex, Srcu,
    },
};
use kvm_vm::Vm;

pub use contexts::Contexts;
pub use exports::{Owner, Published};

/// Numbers of operations are below this.
pub const MAX_OPERATIONS: usize = bindings::KVM_DLH_MAX_OPS as usize;

/// The feature bits that belong to FREE_PAGES.
const FREE_PAGES_BITS: u32 = FEATURE_FREE_PAGES | FEATURE_FREE_ANY | FEATURE_FREE_ASK;

/// `execute` of an operation's table.
type Execute = unsafe extern "C" fn(
    *mut c_void,
    *mut bindings::kvm,
    *const u64,
    bindings::kvm_dlh_token,
) -> i32;

/// Where calls come from, and where their completion goes.
pub trait Feed: Send + Sync + Sized + 'static {
    /// Calls are finished. May sleep.
    fn complete_all(&self, calls: Ended<'_>, status: Status);
}

/// Calls of one feed that end together: at least one. Mostly in the order in which they came: with the last first,
/// whoever shows that they have ended does so once.
#[derive(Clone, Copy)]
pub struct Ended<'a>(&'a [bindings::kvm_dlh_token]);

impl<'a> Ended<'a> {
    /// What they were handed over as, the last first.
    #[inline]
    pub fn ids(self) -> impl Iterator<Item = u64> + 'a {
        self.0.iter().rev().map(|token| token.call)
    }

    /// The same in parts of neighbours that are alike, the last first.
    #[inline]
    pub fn chunk_by(
        self,
        alike: impl Fn(u64, u64) -> bool + 'a,
    ) -> impl Iterator<Item = Self> + 'a {
        self.0.chunk_by(move |a, b| alike(a.call, b.call)).rev().map(Self)
    }
}

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Finished.
    Finished(Status),
    /// [`Feed::complete_all`] will be called, or has been already.
    Pending,
}

/// The operations that are registered, and who is told when one goes.
#[pin_data]
pub struct Registry<F: Feed> {
    slots: [Atomic<*mut bindings::kvm_dlh_ops>; MAX_OPERATIONS],
    #[pin]
    changes: Mutex<()>,
    #[pin]
    calls: Srcu,
    _feed: PhantomData<fn(F)>,
}

impl<F: Feed> Registry<F> {
    /// A registry without operations.
    pub fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            slots: [const { Atomic::new(null_mut()) }; MAX_OPERATIONS],
            changes <- new_mutex!(()),
            calls <- Srcu::new(c"kvm_dlh_operations", kernel::static_lock_class!()),
            _feed: PhantomData,
        })
    }

    /// The feature bits of all operations. May sleep.
    pub fn features(&self) -> u32 {
        let _calls = self.calls.read_lock();
        self.slots.iter().fold(0, |bits, slot| {
            // SAFETY: A table in a slot is valid while the read lock is held.
            bits | unsafe { slot.load(Acquire).as_ref() }.map_or(0, |ops| ops.feature)
        })
    }

    /// The way from a VM, whose contexts are `contexts`, to the operations, none of which goes away until the
    /// result is dropped. The VM must not end meanwhile. May sleep.
    pub fn calls<'a>(&'a self, contexts: &'a Contexts) -> Calls<'a, F> {
        let _lock = self.calls.read_lock();
        // INVARIANT: Just locked; nothing is known yet.
        Calls { slots: &self.slots, contexts, last: None, failed: None, _lock, _feed: PhantomData }
    }

    /// Detaches every operation from a VM that has ended, or whose queue goes. May sleep.
    pub fn detach_vm(&self, contexts: &Contexts) {
        let _calls = self.calls.read_lock();
        for number in 0..MAX_OPERATIONS {
            contexts.detach(number);
        }
    }

    fn register(&self, ops: &bindings::kvm_dlh_ops) -> Result {
        let number = usize::from(ops.number);
        let complete = ops.attach.is_some() && ops.detach.is_some() && ops.execute.is_some();
        if ops.version != bindings::KVM_DLH_OPS_VERSION || number == 0 || !complete {
            return Err(EINVAL);
        }
        // Bits that the ABI gives a meaning belong to their operation.
        let own = if number == usize::from(Operation::FREE_PAGES.0) { FREE_PAGES_BITS } else { 0 };
        if ops.feature & bindings::KVM_DLH_F_RESERVED & !own != 0 {
            return Err(EINVAL);
        }
        let slot = self.slots.get(number).ok_or(EINVAL)?;
        // Built in, and never looked up here.
        if number == usize::from(Operation::TRACE.0) {
            return Err(EBUSY);
        }
        let _changes = self.changes.lock();
        if !slot.load(Relaxed).is_null() {
            return Err(EBUSY);
        }
        slot.store(core::ptr::from_ref(ops).cast_mut(), Release);
        Ok(())
    }

    fn unregister(
        &self,
        ops: *const bindings::kvm_dlh_ops,
        for_each_vm: impl Fn(&dyn Fn(&Contexts)),
    ) {
        let _changes = self.changes.lock();
        let found = self.slots.iter().position(|slot| core::ptr::eq(slot.load(Relaxed), ops));
        let Some(number) = found else { return };
        self.slots[number].store(null_mut(), Release);
        self.calls.synchronize();
        for_each_vm(&|contexts| contexts.detach(number));
        self.calls.synchronize();
    }
}

/// An operation that has been called.
///
/// # Invariants
///
/// `execute` is that of the operation's table, and `context` what its `attach` made for the VM.
#[derive(Clone, Copy)]
struct Called {
    op: Operation,
    execute: Execute,
    context: *mut c_void,
}

/// The way from a VM to the operations.
///
/// # Invariants
///
/// The registry's read lock is held: tables in `slots` stay valid. `last` is the operation that was called last,
/// attached to the VM of `contexts`; nobody detaches it while the lock is held and the VM lives.
pub struct Calls<'a, F: Feed> {
    slots: &'a [Atomic<*mut bindings::kvm_dlh_ops>; MAX_OPERATIONS],
    contexts: &'a Contexts,
    last: Option<Called>,
    /// The operation whose context could not be made: that may take long, so it is not tried for each call.
    failed: Option<Operation>,
    _lock: kernel::sync::srcu::Guard<'a>,
    _feed: PhantomData<fn(F)>,
}

impl<F: Feed> Calls<'_, F> {
    /// Executes `call` for `vm`, that of the contexts. `feed` hears of its completion as call number `id` if it is
    /// pending.
    ///
    /// # Context
    ///
    /// A thread of the VMM; may sleep.
    #[inline]
    pub fn execute(&mut self, vm: &Vm, call: &Call, feed: &Arc<F>, id: u64) -> Outcome {
        let Called { execute, context, .. } = match self.last.filter(|last| last.op == call.op) {
            Some(last) => last,
            None => match self.find(vm, call.op) {
                Ok(found) => *self.last.insert(found),
                Err(e) => return Outcome::Finished(e.into()),
            },
        };
        // Owned by the token until it is completed.
        let feed = Arc::into_raw(feed.clone());
        let token = bindings::kvm_dlh_token { feed: feed.cast_mut().cast(), call: id };
        // SAFETY: The context is this operation's for this VM; the arguments are two words of our copy.
        let result = unsafe { execute(context, vm.as_ptr(), call.arg.as_ptr(), token) };
        if result == bindings::KVM_DLH_PENDING as i32 {
            return Outcome::Pending;
        }
        // SAFETY: Any other value gives the token back.
        drop(unsafe { Arc::from_raw(feed) });
        // A foreign module may return anything; what is not an error is success.
        Outcome::Finished(Status(result.min(0)))
    }

    /// The operation `op`, attached to `vm`. May sleep.
    fn find(&mut self, vm: &Vm, op: Operation) -> Result<Called, CallError> {
        if self.failed == Some(op) {
            return Err(CallError::NoMemory);
        }
        let slot = self.slots.get(usize::from(op.0)).ok_or(CallError::Operation)?;
        // SAFETY: A table in a slot is valid while the read lock is held.
        let ops = unsafe { slot.load(Acquire).as_ref() }.ok_or(CallError::Operation)?;
        let Some(context) = self.contexts.get(ops, vm) else {
            self.failed = Some(op);
            return Err(CallError::NoMemory);
        };
        let execute = ops.execute.ok_or(CallError::Operation)?;
        // INVARIANT: From the table in the slot of `op`.
        Ok(Called { op, execute, context })
    }
}

/// Completes tokens that were handed out by [`Calls::execute`].
///
/// # Safety
///
/// The tokens came from a registry with the same `F`, and are completed for the first time.
unsafe fn complete_all<F: Feed>(tokens: &[bindings::kvm_dlh_token], status: i32) {
    for tokens in tokens.chunk_by(|a, b| a.feed == b.feed).rev() {
        let Some(first) = tokens.first() else { continue };
        // SAFETY: By the caller's promise each token owns a count; that of the first lasts until the end.
        let feed = unsafe { Arc::from_raw(first.feed.cast::<F>()) };
        F::complete_all(&feed, Ended(tokens), Status(status.min(0)));
        for _ in tokens.iter().skip(1) {
            // SAFETY: As above; the feeds are the same.
            drop(unsafe { Arc::from_raw(first.feed.cast::<F>()) });
        }
    }
}
