// SPDX-License-Identifier: GPL-2.0

//! Who makes a call.

use kvm_vm::Vcpu;

/// The feed number of trap-inserted calls; the others are ring numbers, below 4,096.
pub(crate) const INSERTED: u32 = 0xff_ffff;

/// Who makes a call, and from where.
pub(crate) struct Caller<'a> {
    /// The vCPU whose thread this is.
    pub(crate) vcpu: &'a Vcpu,
    /// The number that the VMM gave the vCPU that made the call.
    pub(crate) vcpu_id: u32,
    /// Its ring's number, or [`INSERTED`].
    pub(crate) feed: u32,
    /// The lower half of the guest's time-stamp counter at the call, if known.
    pub(crate) time: Option<u32>,
}
