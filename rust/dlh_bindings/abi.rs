// SPDX-License-Identifier: GPL-2.0

//! `include/uapi/linux/kvm_dlh.h` and `dlh_abi` agree, or this does not compile.

use core::mem::{offset_of, size_of};

use dlh_abi::{Error, Function, Operation, RawEntry, RingSize};

use super::*;

macro_rules! same {
    ($($left:expr, $right:expr;)*) => { $(const _: () = assert!($left as u64 == $right as u64);)* };
}

same! {
    KVM_HC_DLH, dlh_abi::HYPERCALL_NR;
    KVM_DLH_ABI_VERSION, dlh_abi::ABI_VERSION;
    KVM_DLH_F_RING, dlh_abi::FEATURE_RING;
    KVM_DLH_F_CALL, dlh_abi::FEATURE_CALL;
    KVM_DLH_F_FREE_PAGES, dlh_abi::FEATURE_FREE_PAGES;
    KVM_DLH_F_CALLS, dlh_abi::FEATURE_CALLS;
    KVM_DLH_F_TRACE, dlh_abi::FEATURE_TRACE;
    KVM_DLH_F_FREE_ANY, dlh_abi::FEATURE_FREE_ANY;
    KVM_DLH_F_FREE_ASK, dlh_abi::FEATURE_FREE_ASK;
    KVM_DLH_FREE_ANY, dlh_abi::FREE_ANY;
    KVM_DLH_FREE_ASK, dlh_abi::FREE_ASK;
    KVM_DLH_MAX_CALLS, dlh_abi::MAX_CALLS;
    KVM_DLH_RING_ACTIVE, dlh_abi::RING_ACTIVE;
    KVM_DLH_RING_MIN_ENTRIES, RingSize::MIN;
    KVM_DLH_RING_MAX_ENTRIES, RingSize::MAX;

    KVM_DLH_FN_FEATURES, Function::Features;
    KVM_DLH_FN_RING_SETUP, Function::RingSetup;
    KVM_DLH_FN_RING_TEARDOWN, Function::RingTeardown;
    KVM_DLH_FN_KICK, Function::Kick;
    KVM_DLH_FN_CALL, Function::Call;
    KVM_DLH_FN_CALLS, Function::Calls;

    KVM_DLH_OP_NOP, Operation::NOP.0;
    KVM_DLH_OP_FREE_PAGES, Operation::FREE_PAGES.0;
    KVM_DLH_OP_TRACE, Operation::TRACE.0;

    KVM_DLH_EREFUSED, Error::Refused;
    KVM_DLH_EFUNCTION, Error::Function;
    KVM_DLH_EALIGN, Error::Align;
    KVM_DLH_ESIZE, Error::Size;
    KVM_DLH_EMEMORY, Error::Memory;
    KVM_DLH_ENORING, Error::NoRing;
    KVM_DLH_EOPERATION, Error::Operation;
    KVM_DLH_EARGUMENT, Error::Argument;
    KVM_DLH_EBUSY, Error::Busy;
    KVM_DLH_ENOMEM, Error::NoMemory;
    KVM_DLH_EGONE, Error::Gone;
    KVM_DLH_EAGAIN, Error::Again;

    size_of::<kvm_dlh_entry>(), size_of::<RawEntry>();
    offset_of!(kvm_dlh_entry, tag), offset_of!(RawEntry, tag);
    offset_of!(kvm_dlh_entry, op), offset_of!(RawEntry, op);
    offset_of!(kvm_dlh_entry, flags), offset_of!(RawEntry, flags);
    offset_of!(kvm_dlh_entry, __bindgen_anon_1), offset_of!(RawEntry, status);
    offset_of!(kvm_dlh_entry, arg), offset_of!(RawEntry, arg);

    size_of::<kvm_dlh_ring_hdr>(), dlh_abi::HEADER_BYTES;
    offset_of!(kvm_dlh_ring_hdr, tail), dlh_abi::header::TAIL;
    offset_of!(kvm_dlh_ring_hdr, dropped), dlh_abi::header::DROPPED;
    offset_of!(kvm_dlh_ring_hdr, done), dlh_abi::header::DONE;
    offset_of!(kvm_dlh_ring_hdr, flags), dlh_abi::header::FLAGS;
    offset_of!(kvm_dlh_ring_hdr, cookie), dlh_abi::header::COOKIE;
    offset_of!(kvm_dlh_ring_hdr, declined), dlh_abi::header::DECLINED;
    offset_of!(kvm_dlh_ring_hdr, entries), dlh_abi::header::ENTRIES;
    offset_of!(kvm_dlh_ring_hdr, version), dlh_abi::header::VERSION;
}
