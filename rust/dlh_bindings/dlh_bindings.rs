// SPDX-License-Identifier: GPL-2.0

//! Generated bindings to the C helpers, the operation interface and the ABI header, offsets of fields in
//! KVM's structures, and the proof that the ABI header and `dlh_abi` say the same.
//!
//! C headers: `rust/dlh_bindings/helpers.h`, `rust/dlh_bindings/offsets.h`, `include/linux/kvm_dlh.h`,
//! `include/uapi/linux/kvm_dlh.h`.

#![allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

use kernel::ffi;
use pin_init::MaybeZeroable;

include!(env!("DLH_BINDINGS"));
include!(env!("DLH_OFFSETS"));

mod abi;
