// SPDX-License-Identifier: GPL-2.0

//! `struct kvm`.

use core::{ops::Deref, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::{
    prelude::*,
    str::{CStr, CString},
    types::Opaque,
};

/// The identity of a VM: good for comparing and looking up, never for reaching it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmKey(usize);

impl VmKey {
    /// A number that is distinct among the VMs that exist at the same time.
    #[inline]
    pub fn as_usize(self) -> usize {
        self.0
    }
}

/// A VM.
///
/// # Invariants
///
/// Wraps a `struct kvm` that stays allocated as long as the reference to it lives: it came from a
/// vCPU that runs, from KVM's own callback, or from a [`VmRef`].
#[repr(transparent)]
pub struct Vm(Opaque<bindings::kvm>);

// SAFETY: Every method is a read of fields KVM lets any thread read, or takes KVM's own locks.
unsafe impl Sync for Vm {}
// SAFETY: As above; a `struct kvm` belongs to no thread.
unsafe impl Send for Vm {}

impl Vm {
    /// # Safety
    ///
    /// `kvm` points to a `struct kvm` that stays allocated for `'a`.
    #[inline]
    pub unsafe fn from_raw<'a>(kvm: *mut bindings::kvm) -> &'a Self {
        // SAFETY: By the caller's promise; `Vm` is transparent over `Opaque<kvm>`.
        unsafe { &*kvm.cast() }
    }

    /// The C object.
    #[inline]
    pub fn as_ptr(&self) -> *mut bindings::kvm {
        self.0.get()
    }

    /// The VM's identity.
    #[inline]
    pub fn key(&self) -> VmKey {
        VmKey(self.as_ptr() as usize)
    }

    /// The thread that made it, as in the names of KVM's own debugfs directories: one of the VMM's, not
    /// always the one that the VMM's pid names.
    pub fn creator(&self) -> i32 {
        // SAFETY: By the type invariant; the field is written once, at creation.
        unsafe { bindings::dlh_kvm_pid(self.as_ptr()) }
    }

    /// The name of its directory in KVM's part of debugfs, `<tid>-<fd>`, or `None` if it has none.
    pub fn name(&self) -> Option<CString> {
        let mut name = [0; bindings::DLH_KVM_NAME as usize];
        // SAFETY: By the type invariant; there is room for the name, and it ends with a zero.
        unsafe { bindings::dlh_kvm_name(self.as_ptr(), name.as_mut_ptr()) };
        let name = CStr::from_bytes_until_nul(name.as_slice()).ok()?;
        let name = name.to_str().ok().filter(|name| !name.is_empty())?;
        CString::try_from_fmt(fmt!("{name}")).ok()
    }

    /// Whether the current task has the address space of the VMM.
    #[inline]
    pub fn is_current(&self) -> bool {
        // SAFETY: By the type invariant; `kvm->mm` is written once, at creation.
        unsafe { bindings::dlh_kvm_is_current(self.as_ptr()) }
    }

    /// Whether the VMM has told KVM of devices that it assigns: their DMA pins all of the guest's memory. Any
    /// context.
    pub fn has_assigned_devices(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_kvm_has_assigned_devices(self.as_ptr()) }
    }

    /// A number that changes whenever a memslot does. Any context.
    #[inline]
    pub fn generation(&self) -> u64 {
        const SLOTS: usize = bindings::dlh_offset_DLH_KVM_MEMSLOTS as usize;
        const GENERATION: usize = bindings::dlh_offset_DLH_MEMSLOTS_GENERATION as usize;
        // SAFETY: By the type invariant, with the offsets of this kernel. The pointer is to one of two
        // structures embedded in `struct kvm`; both words may change, and are read in one access each.
        unsafe {
            let slots = self.as_ptr().byte_add(SLOTS).cast::<*const u8>().read_volatile();
            slots.byte_add(GENERATION).cast::<u64>().read_volatile()
        }
    }

    /// A counted reference, or `None` if the VM is already being destroyed. Any context.
    #[inline]
    pub fn try_get(&self) -> Option<VmRef> {
        // SAFETY: By the type invariant.
        if !unsafe { bindings::dlh_kvm_get_safe(self.as_ptr()) } {
            return None;
        }
        // INVARIANT: The count was just raised.
        Some(VmRef(NonNull::from(self)))
    }
}

/// A counted reference to a VM (`kvm_get_kvm`).
///
/// # Invariants
///
/// Owns one count of the VM's `users_count`.
///
/// # Context
///
/// Dropping it may destroy the VM, which sleeps.
pub struct VmRef(NonNull<Vm>);

// SAFETY: The count may be released on any thread.
unsafe impl Send for VmRef {}
// SAFETY: `Vm` is `Sync`.
unsafe impl Sync for VmRef {}

impl Deref for VmRef {
    type Target = Vm;

    #[inline]
    fn deref(&self) -> &Vm {
        // SAFETY: By the type invariant the VM is alive.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for VmRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this count is ours to give back.
        unsafe { bindings::dlh_kvm_put(self.as_ptr()) }
    }
}
