// SPDX-License-Identifier: GPL-2.0

//! Deferrable operations, from the side of the module that provides one.
//!
//! C header: `include/linux/kvm_dlh.h`, which says in which context each callback runs.

use core::{ffi::c_void, mem::ManuallyDrop};

use dlh_abi::{Error as CallError, Operation as Number, Status};
use dlh_bindings as bindings;
use kernel::{
    error::{from_result, to_result},
    prelude::*,
    sync::{Arc, ArcBorrow},
    ThisModule,
};
use kvm_vm::Vm;

/// One call that has been accepted and not been completed.
///
/// The guest waits until it is completed, so it must not be kept for long; dropping it completes it
/// as declined ([`CallError::Gone`]).
pub struct Token(bindings::kvm_dlh_token);

// SAFETY: The interface lets any thread complete a token.
unsafe impl Send for Token {}

impl Token {
    /// Completes the call. May take a mutex.
    pub fn complete(self, status: Status) {
        let raw = ManuallyDrop::new(self).0;
        // SAFETY: A token is completed at most once: it has just been consumed.
        unsafe { bindings::kvm_dlh_complete(raw, status.0) }
    }
}

/// Tokens in a row, with room for so many.
///
/// # Invariants
///
/// Each of the list is owned, and has not been completed.
pub struct Tokens(KVec<bindings::kvm_dlh_token>);

// SAFETY: The interface lets any thread complete a token.
unsafe impl Send for Tokens {}

impl Tokens {
    /// None yet. May sleep.
    pub fn with_capacity(capacity: usize) -> Result<Self> {
        // INVARIANT: There are none.
        Ok(Self(KVec::with_capacity(capacity, GFP_KERNEL_ACCOUNT)?))
    }

    /// None, and no room for any.
    pub fn none() -> Self {
        // INVARIANT: There are none.
        Self(KVec::new())
    }

    /// Adds one, or gives it back if there is no room. Any context.
    #[inline]
    pub fn push(&mut self, token: Token) -> Result<(), Token> {
        // INVARIANT: It is owned by the list if it is in there, and by the caller otherwise.
        match self.0.push_within_capacity(ManuallyDrop::new(token).0) {
            Ok(()) => Ok(()),
            Err(full) => Err(Token(full.0)),
        }
    }

    /// Completes the last `count` calls, or all if there are fewer. Those of one ring should be in the order in which
    /// they came: the guest sees it move on once. May take a mutex.
    pub fn complete_last(&mut self, count: usize, status: Status) {
        let first = self.0.len().saturating_sub(count);
        let last = &self.0[first..];
        // SAFETY: By the type invariant, and none is completed again: they are forgotten below.
        unsafe { bindings::kvm_dlh_complete_all(last.as_ptr(), last.len() as u32, status.0) }
        self.0.truncate(first);
    }
}

impl Drop for Tokens {
    fn drop(&mut self) {
        self.complete_last(usize::MAX, CallError::Gone.into());
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        // SAFETY: Not completed before, or `drop` would not run.
        unsafe { bindings::kvm_dlh_complete(self.0, Status::from(CallError::Gone).0) }
    }
}

/// What became of a call.
pub enum Outcome {
    /// It is finished; the token goes back.
    Finished(Token, Status),
    /// The token was kept, and will be completed.
    Pending,
}

/// A deferrable operation.
pub trait Operation: Send + Sync + 'static {
    /// Its number.
    const NUMBER: Number;
    /// The feature bits guests see while it is registered.
    const FEATURE: u32;
    /// What it keeps for each VM.
    type Context: Send + Sync + 'static;

    /// Makes the context, at the first call in a VM. On a thread of the VMM; may sleep.
    fn attach(&self, vm: &Vm) -> Result<Arc<Self::Context>>;

    /// Executes one call, whose arguments are the guest's and unchecked. On a thread of the VMM; may
    /// sleep, but the vCPU waits for it.
    fn execute(
        context: ArcBorrow<'_, Self::Context>,
        vm: &Vm,
        arg: [u64; 2],
        token: Token,
    ) -> Outcome;

    /// The VM or the operation goes away: completes every token that is still held. May sleep.
    fn detach(context: Arc<Self::Context>);
}

/// A registered operation; dropping it unregisters, which waits until no callback runs.
///
/// # Invariants
///
/// `provided.ops` is registered with kvm_dlh.ko.
pub struct Registration<T: Operation> {
    provided: Pin<KBox<Provided<T>>>,
}

/// The table, and the operation behind it.
#[repr(C)]
struct Provided<T> {
    ops: bindings::kvm_dlh_ops,
    operation: T,
}

// SAFETY: Registering and unregistering may happen on different threads.
unsafe impl<T: Operation> Send for Registration<T> {}
// SAFETY: There are no methods on a shared reference.
unsafe impl<T: Operation> Sync for Registration<T> {}

impl<T: Operation> Registration<T> {
    /// Registers the operation.
    ///
    /// # Errors
    ///
    /// `EBUSY`: the number is taken; `EINVAL`: it is out of range.
    pub fn new(module: &'static ThisModule, operation: T) -> Result<Self> {
        let ops = bindings::kvm_dlh_ops {
            version: bindings::KVM_DLH_OPS_VERSION,
            number: T::NUMBER.0,
            feature: T::FEATURE,
            owner: module.as_ptr().cast(),
            attach: Some(attach::<T>),
            detach: Some(detach::<T>),
            execute: Some(execute::<T>),
        };
        let provided = KBox::pin(Provided { ops, operation }, GFP_KERNEL)?;
        // SAFETY: The table stays in place until `drop` has unregistered it, and its callbacks keep
        // the interface's contract.
        to_result(unsafe { bindings::kvm_dlh_register_ops(&provided.ops) })?;
        // INVARIANT: Just registered.
        Ok(Self { provided })
    }
}

impl<T: Operation> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::kvm_dlh_unregister_ops(&self.provided.ops) }
    }
}

/// `attach` of the table.
///
/// # Safety
///
/// `ops` was registered by [`Registration::new`]; `kvm` is alive; `context` is a place for the result.
unsafe extern "C" fn attach<T: Operation>(
    ops: *const bindings::kvm_dlh_ops,
    kvm: *mut bindings::kvm,
    context: *mut *mut c_void,
) -> i32 {
    from_result(|| {
        // SAFETY: The interface passes the table it was given, which is the first field of this.
        let provided = unsafe { &*ops.cast::<Provided<T>>() };
        // SAFETY: The interface passes a live VM.
        let made = provided.operation.attach(unsafe { Vm::from_raw(kvm) })?;
        // SAFETY: The interface passes a place for it; it comes back in `detach`.
        unsafe { *context = Arc::into_raw(made).cast_mut().cast() };
        Ok(0)
    })
}

/// `detach` of the table.
///
/// # Safety
///
/// `context` came from [`attach`], and is not used again.
unsafe extern "C" fn detach<T: Operation>(context: *mut c_void) {
    // SAFETY: Made in `attach`, and handed back once.
    T::detach(unsafe { Arc::from_raw(context.cast::<T::Context>()) });
}

/// `execute` of the table.
///
/// # Safety
///
/// `context` came from [`attach`] for `kvm`, which is alive; `arg` points to two words; `token` is fresh.
unsafe extern "C" fn execute<T: Operation>(
    context: *mut c_void,
    kvm: *mut bindings::kvm,
    arg: *const u64,
    token: bindings::kvm_dlh_token,
) -> i32 {
    // SAFETY: Made in `attach` and not detached while this runs.
    let context = unsafe { ArcBorrow::from_raw(context.cast::<T::Context>()) };
    // SAFETY: The interface passes two words, private to this call.
    let arg = unsafe { [*arg, *arg.add(1)] };
    // SAFETY: The interface passes a live VM.
    let vm = unsafe { Vm::from_raw(kvm) };
    match T::execute(context, vm, arg, Token(token)) {
        Outcome::Finished(back, status)
            if (back.0.feed, back.0.call) == (token.feed, token.call) =>
        {
            // The return value completes it. What is not an error is success.
            let _ = ManuallyDrop::new(back);
            status.0.min(0)
        }
        Outcome::Finished(other, status) => {
            // Not this call's: this one was kept, and is pending.
            other.complete(status);
            bindings::KVM_DLH_PENDING as i32
        }
        Outcome::Pending => bindings::KVM_DLH_PENDING as i32,
    }
}
