// SPDX-License-Identifier: GPL-2.0

//! What the hooks report, and what is reported when one cannot be made.

use kernel::{prelude::*, str::CStr, sync::ArcBorrow};
use kvm_vm::{Vcpu, Vm, VmKey};
use rcu_table::Reader;

use crate::Killed;

/// The registers of a DLH hypercall.
#[derive(Clone, Copy, Debug)]
pub struct HypercallArgs {
    /// RBX: the function.
    pub function: u64,
    /// RCX, RDX, RSI.
    pub arg: [u64; 3],
}

/// Who hears of hypercalls, and of the beginning and the end of VMs.
pub trait Events: Send + Sync + Sized + 'static {
    /// A DLH hypercall at CPL 0. Returns what the guest finds in RAX.
    ///
    /// # Errors
    ///
    /// The task is being killed. KVM_RUN ends with EINTR, and the guest, should anybody run it again, is at the
    /// instruction that made the call.
    ///
    /// # Context
    ///
    /// On the vCPU's thread inside KVM_RUN; may sleep; `kvm->srcu` is not held.
    fn hypercall(
        this: ArcBorrow<'_, Self>,
        vcpu: &Vcpu,
        call: HypercallArgs,
    ) -> Result<i64, Killed>;

    /// KVM has made this VM; from here on it ends by its reference count.
    ///
    /// # Context
    ///
    /// On the VMM's thread, inside ftrace: must not sleep; spin locks may be taken, task work queued.
    fn created(this: ArcBorrow<'_, Self>, vm: &Vm);

    /// KVM is destroying this VM: its key may be reused once this has returned.
    ///
    /// # Context
    ///
    /// Inside ftrace: must not sleep; spin locks may be taken.
    fn destroyed(&self, vm: VmKey);
}

/// Who hears of exits.
pub trait Exits: Send + Sync + Sized + 'static {
    /// The guest of this vCPU has just exited.
    ///
    /// # Context
    ///
    /// On the vCPU's thread; interrupts off; the guest's PKRU is loaded, so user memory must not be
    /// touched; no locks may be taken.
    fn exited(&self, vcpu: &Vcpu, reader: Reader<'_>);

    /// The current task is about to return from KVM_RUN to its VMM.
    ///
    /// # Context
    ///
    /// On the vCPU's thread; spin locks may be taken; must not sleep. Reported for every vCPU's return.
    fn left(&self);
}

/// A hook that could not be made.
#[derive(Debug)]
pub struct Missing {
    /// The function or tracepoint of KVM.
    pub name: &'static CStr,
    /// `ENOENT`: this kernel has none of that name; `EBUSY`: somebody else owns it; others as ftrace
    /// reports them.
    pub error: Error,
}
