// SPDX-License-Identifier: GPL-2.0

//! The DLH ABI as checked Rust: addresses, entries, and the arithmetic of a ring's indices.
//!
//! This crate decides, for both sides, what a value in shared memory *means*; it never touches
//! shared memory itself. Callers copy a value out once and hand the copy in (DESIGN.md rule 2), so
//! everything here is pure, free of `unsafe`, and runs under cargo as well as in the kernel.
//!
//! C header: `include/uapi/linux/kvm_dlh.h`; `dlh_bindings` asserts that both agree.

#![cfg_attr(not(any(CONFIG_RUST, test)), no_std)]
#![forbid(unsafe_code)]

mod addr;
mod call;
mod consumer;
mod entry;
mod error;
mod free_pages;
pub mod header;
mod producer;
mod size;

pub use addr::{Gfn, GfnRange, Gpa, PAGE_SHIFT, PAGE_SIZE};
pub use call::{Call, Function, Operation};
pub use consumer::{Broken, Consumer, Run};
pub use entry::{Cookie, RawEntry};
pub use error::{Error, Status};
pub use free_pages::{Contents, FreePages, FREE_ANY, FREE_ASK};
pub use header::RingWords;
pub use producer::{has_passed, Producer};
pub use size::{RingSize, HEADER_BYTES};

/// The hypercall number of every DLH function (`KVM_HC_DLH`).
pub const HYPERCALL_NR: u64 = 0x444c_4801;

/// Version of the ABI this crate describes (`KVM_DLH_ABI_VERSION`).
pub const ABI_VERSION: u32 = 1;

/// Feature bit: rings can be set up (`KVM_DLH_F_RING`).
pub const FEATURE_RING: u32 = 1 << 0;
/// Feature bit: trap-inserted calls are accepted (`KVM_DLH_F_CALL`).
pub const FEATURE_CALL: u32 = 1 << 1;
/// Feature bit: [`Operation::FREE_PAGES`] is executed (`KVM_DLH_F_FREE_PAGES`).
pub const FEATURE_FREE_PAGES: u32 = 1 << 2;

/// Feature bit: arrays of calls are accepted (`KVM_DLH_F_CALLS`).
pub const FEATURE_CALLS: u32 = 1 << 3;
/// Feature bit: [`Operation::TRACE`] is executed (`KVM_DLH_F_TRACE`).
pub const FEATURE_TRACE: u32 = 1 << 4;

/// Feature bit: [`FREE_ANY`] is taken (`KVM_DLH_F_FREE_ANY`).
pub const FEATURE_FREE_ANY: u32 = 1 << 5;
/// Feature bit: [`FREE_ASK`] is answered (`KVM_DLH_F_FREE_ASK`).
pub const FEATURE_FREE_ASK: u32 = 1 << 6;

/// Most calls in one array (`KVM_DLH_MAX_CALLS`).
pub const MAX_CALLS: u64 = 512;

/// Ring flag: the host takes entries from this ring (`KVM_DLH_RING_ACTIVE`).
pub const RING_ACTIVE: u32 = 1 << 0;
