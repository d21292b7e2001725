// SPDX-License-Identifier: GPL-2.0

//! Atomics that are compiled into their users.
//!
//! Those of the kernel crate call a C function for each access, which took 230 of the 1,400 instructions
//! of a drain. On x86 the accesses below are the very instructions of the kernel's own `READ_ONCE()`,
//! `smp_load_acquire()`, `xchg()` and `atomic_add()`; for use on the exit path and in drains only. What each
//! variable pairs with, and why that satisfies the kernel's memory model, is in `docs/locking.md`.

pub use core::sync::atomic::{
    fence, AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};
