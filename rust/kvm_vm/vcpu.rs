// SPDX-License-Identifier: GPL-2.0

//! `struct kvm_vcpu`.

use core::{ops::Deref, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::types::Opaque;

use crate::{Vm, VmRef};

/// The identity of a vCPU, host-wide: good for comparing and looking up, never for reaching it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuKey(usize);

impl VcpuKey {
    /// A number that is distinct among the vCPUs that exist at the same time.
    #[inline]
    pub fn as_usize(self) -> usize {
        self.0
    }
}

/// A vCPU.
///
/// # Invariants
///
/// Wraps a `struct kvm_vcpu` that stays allocated as long as the reference to it lives.
#[repr(transparent)]
pub struct Vcpu(Opaque<bindings::kvm_vcpu>);

impl Vcpu {
    /// # Safety
    ///
    /// `vcpu` points to a `struct kvm_vcpu` that stays allocated for `'a`.
    #[inline]
    pub unsafe fn from_raw<'a>(vcpu: *mut bindings::kvm_vcpu) -> &'a Self {
        // SAFETY: By the caller's promise; `Vcpu` is transparent over `Opaque<kvm_vcpu>`.
        unsafe { &*vcpu.cast() }
    }

    /// The C object.
    #[inline]
    pub fn as_ptr(&self) -> *mut bindings::kvm_vcpu {
        self.0.get()
    }

    /// The vCPU's identity.
    #[inline]
    pub fn key(&self) -> VcpuKey {
        VcpuKey(self.as_ptr() as usize)
    }

    /// The vCPU's place in its VM (`vcpu_idx`), from 0.
    pub fn index(&self) -> u32 {
        // SAFETY: By the type invariant; the field is written once, at creation.
        let index = unsafe { bindings::dlh_vcpu_idx(self.as_ptr()) };
        // KVM numbers vCPUs from 0; a negative index cannot occur and would match no ring.
        u32::try_from(index).unwrap_or(u32::MAX)
    }

    /// The number that the VMM gave it.
    pub fn id(&self) -> u32 {
        // SAFETY: By the type invariant; the field is written once, at creation.
        unsafe { bindings::dlh_vcpu_id(self.as_ptr()) }.unsigned_abs()
    }

    /// The time-stamp counter that its guest reads now; that of a nested guest's host. Any context.
    pub fn guest_tsc(&self) -> u64 {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_vcpu_guest_tsc(self.as_ptr()) }
    }

    /// The VM it belongs to.
    #[inline]
    pub fn vm(&self) -> &Vm {
        const KVM: usize = bindings::dlh_offset_DLH_VCPU_KVM as usize;
        // SAFETY: By the type invariant, with the offset of this kernel; written once, at creation. A vCPU
        // keeps its VM allocated: KVM frees vCPUs before it frees the VM.
        unsafe { Vm::from_raw(self.as_ptr().byte_add(KVM).cast::<*mut bindings::kvm>().read()) }
    }

    /// Whether a thread is inside KVM_RUN for it, that is, whether the guest may be entered again
    /// before the VMM has a say.
    pub fn is_in_run(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_vcpu_in_run(self.as_ptr()) }
    }

    /// Whether the current thread is inside KVM_RUN for it, in the VMM's address space.
    #[inline]
    pub fn runs_here(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_vcpu_runs_here(self.as_ptr()) }
    }

    /// Whether KVM_RUN waits for an event (an interrupt, a page) before the guest is entered again. On the
    /// vCPU's own thread.
    pub fn will_block(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_vcpu_will_block(self.as_ptr()) }
    }

    /// Whether calls from its present state are refused: SMM, a nested guest, an encrypted VM
    /// (DESIGN.md rule 4). On the vCPU's own thread.
    pub fn is_refused(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::dlh_vcpu_is_refused(self.as_ptr()) }
    }

    /// A reference that keeps the vCPU, through its VM, or `None` if the VM is being destroyed. Any
    /// context.
    #[inline]
    pub fn try_get(&self) -> Option<VcpuRef> {
        let vm = self.vm().try_get()?;
        // INVARIANT: A vCPU is freed only with its VM, which was just counted.
        Some(VcpuRef { vcpu: NonNull::from(self), _vm: vm })
    }
}

/// A vCPU with a counted reference to its VM, which keeps both.
///
/// # Invariants
///
/// `vcpu` is a vCPU of `_vm`.
///
/// # Context
///
/// Dropping it may destroy the VM, which sleeps.
pub struct VcpuRef {
    vcpu: NonNull<Vcpu>,
    _vm: VmRef,
}

// SAFETY: What may be done with a `Vcpu` on a foreign thread is reading constant fields and a flag.
unsafe impl Send for VcpuRef {}
// SAFETY: As above.
unsafe impl Sync for VcpuRef {}

impl Deref for VcpuRef {
    type Target = Vcpu;

    #[inline]
    fn deref(&self) -> &Vcpu {
        // SAFETY: By the type invariant the vCPU is allocated.
        unsafe { self.vcpu.as_ref() }
    }
}
