// SPDX-License-Identifier: GPL-2.0

//! The exported functions, and the one registry they work on.

use core::{ffi::c_void, ptr::null_mut};

use dlh_bindings as bindings;
use kernel::{
    error::code::{EBUSY, ENODEV},
    prelude::*,
    sync::{
        atomic::{
            ordering::{Acquire, Full, Release},
            Atomic,
        },
        Arc,
    },
};

use crate::{complete_all, Contexts, Feed, Registry};

/// Who owns the registry: knows all VMs.
pub trait Owner: Send + Sync + 'static {
    /// What calls come from.
    type Feed: Feed;

    /// The registry.
    fn registry(&self) -> &Registry<Self::Feed>;

    /// Calls `visit` for every VM that has a queue. May sleep.
    fn for_each_vm(&self, visit: &dyn Fn(&Contexts));
}

/// The published owner, with its type erased.
struct Entry {
    owner: *const c_void,
    register: unsafe fn(*const c_void, *const bindings::kvm_dlh_ops) -> Result,
    unregister: unsafe fn(*const c_void, *const bindings::kvm_dlh_ops),
    complete_all: unsafe fn(&[bindings::kvm_dlh_token], i32),
}

/// Set while an owner is published. Other modules reach it only through our exported symbols, so they
/// are gone before it is.
static ENTRY: Atomic<*mut Entry> = Atomic::new(null_mut());

/// The exported functions work on this owner's registry until it is dropped.
///
/// # Invariants
///
/// `ENTRY` points to `entry`, whose `owner` is the object that `owner` counts.
pub struct Published<O: Owner> {
    owner: Arc<O>,
    entry: KBox<Entry>,
}

// SAFETY: The entry is immutable; the owner is `Send` and `Sync`.
unsafe impl<O: Owner> Send for Published<O> {}
// SAFETY: As above.
unsafe impl<O: Owner> Sync for Published<O> {}

impl<O: Owner> Published<O> {
    /// Publishes `owner`. To be called while the module loads: nobody can call the exported functions
    /// before that has succeeded.
    pub fn new(owner: Arc<O>) -> Result<Self> {
        let entry = KBox::new(
            Entry {
                owner: Arc::as_ptr(&owner).cast(),
                register: register::<O>,
                unregister: unregister::<O>,
                complete_all: complete_all::<O::Feed>,
            },
            GFP_KERNEL,
        )?;
        let raw = core::ptr::from_ref(&*entry).cast_mut();
        ENTRY.cmpxchg(null_mut(), raw, Full).map_err(|_| EBUSY)?;
        // INVARIANT: Set just above.
        Ok(Self { owner, entry })
    }
}

impl<O: Owner> Drop for Published<O> {
    fn drop(&mut self) {
        debug_assert!(core::ptr::eq(self.entry.owner, Arc::as_ptr(&self.owner).cast()));
        ENTRY.store(null_mut(), Release);
    }
}

/// # Safety
///
/// `owner` is a live `O`; `ops` is what C promised.
unsafe fn register<O: Owner>(owner: *const c_void, ops: *const bindings::kvm_dlh_ops) -> Result {
    // SAFETY: By the caller's promise.
    unsafe { (*owner.cast::<O>()).registry().register(&*ops) }
}

/// # Safety
///
/// As [`register`].
unsafe fn unregister<O: Owner>(owner: *const c_void, ops: *const bindings::kvm_dlh_ops) {
    // SAFETY: By the caller's promise.
    let owner = unsafe { &*owner.cast::<O>() };
    owner.registry().unregister(ops, |visit| owner.for_each_vm(visit));
}

/// Registers an operation; see `include/linux/kvm_dlh.h`.
///
/// # Safety
///
/// `ops` points to a table that stays valid and unchanged until it has been unregistered, and whose
/// callbacks keep the contract of the header.
#[no_mangle]
pub(crate) unsafe extern "C" fn kvm_dlh_register_ops(ops: *const bindings::kvm_dlh_ops) -> i32 {
    // SAFETY: Set while a module can call this.
    let Some(entry) = (unsafe { ENTRY.load(Acquire).as_ref() }) else {
        return ENODEV.to_errno();
    };
    // SAFETY: The owner is alive while it is published; `ops` by the caller's promise.
    match unsafe { (entry.register)(entry.owner, ops) } {
        Ok(()) => 0,
        Err(e) => e.to_errno(),
    }
}

/// Unregisters an operation; see `include/linux/kvm_dlh.h`.
///
/// # Safety
///
/// `ops` was registered, or is not used by anybody.
#[no_mangle]
pub(crate) unsafe extern "C" fn kvm_dlh_unregister_ops(ops: *const bindings::kvm_dlh_ops) {
    // SAFETY: Set while a module can call this.
    if let Some(entry) = unsafe { ENTRY.load(Acquire).as_ref() } {
        // SAFETY: As in `kvm_dlh_register_ops`.
        unsafe { (entry.unregister)(entry.owner, ops) }
    }
}

/// Completes a call; see `include/linux/kvm_dlh.h`.
///
/// # Safety
///
/// `token` was passed to `execute`, which returned `KVM_DLH_PENDING`, and is completed once.
#[no_mangle]
pub(crate) unsafe extern "C" fn kvm_dlh_complete(token: bindings::kvm_dlh_token, status: i32) {
    // SAFETY: Set while a module can call this; every token comes from the published registry.
    if let Some(entry) = unsafe { ENTRY.load(Acquire).as_ref() } {
        // SAFETY: By the caller's promise.
        unsafe { (entry.complete_all)(&[token], status) }
    }
}

/// Completes several calls; see `include/linux/kvm_dlh.h`.
///
/// # Safety
///
/// `tokens` points to `count` of them; each as for [`kvm_dlh_complete`].
#[no_mangle]
pub(crate) unsafe extern "C" fn kvm_dlh_complete_all(
    tokens: *const bindings::kvm_dlh_token,
    count: u32,
    status: i32,
) {
    if count == 0 {
        return;
    }
    // SAFETY: Set while a module can call this; every token comes from the published registry.
    if let Some(entry) = unsafe { ENTRY.load(Acquire).as_ref() } {
        // SAFETY: By the caller's promise.
        unsafe {
            let tokens = core::slice::from_raw_parts(tokens, count as usize);
            (entry.complete_all)(tokens, status)
        }
    }
}
