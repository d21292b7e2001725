// SPDX-License-Identifier: GPL-2.0

//! VMs, vCPUs and guest memory as KVM keeps them, behind safe types.
//!
//! Guest memory is reached only through the memslots and the VMM's own page tables, at the time of
//! the access; no pointer to it is kept (DESIGN.md rule 6), and no Rust reference to it ever exists.
//!
//! C header: `include/linux/kvm_host.h`

mod memory;
mod memslot;
mod vcpu;
mod vm;

pub use memory::{Absent, GuestWindow, Place, Presence};
pub use memslot::{Hva, Memslots, SlotError, Span};
pub use vcpu::{Vcpu, VcpuKey, VcpuRef};
pub use vm::{Vm, VmKey, VmRef};
