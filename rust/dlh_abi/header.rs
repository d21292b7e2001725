// SPDX-License-Identifier: GPL-2.0

//! Where the words of a ring's header lie, in bytes from the start of the ring
//! (`struct kvm_dlh_ring_hdr`).

use crate::Cookie;

/// The words of a header that say what is in the ring, copied out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingWords {
    /// [`TAIL`].
    pub tail: u32,
    /// [`DONE`].
    pub done: u32,
    /// [`COOKIE`].
    pub cookie: Cookie,
}

/// Guest, `u32`: the position after the last entry.
pub const TAIL: usize = 0;
/// Guest, `u64`: calls that found the ring full.
pub const DROPPED: usize = 8;
/// Host, `u32`: every position before this one is finished.
pub const DONE: usize = 64;
/// Host, `u32`: [`RING_ACTIVE`](crate::RING_ACTIVE).
pub const FLAGS: usize = 68;
/// Host, `u64`: the [`Cookie`](crate::Cookie).
pub const COOKIE: usize = 72;
/// Host, `u64`: entries that were not executed.
pub const DECLINED: usize = 80;
/// Host, `u32`: the size the host accepted.
pub const ENTRIES: usize = 88;
/// Host, `u32`: [`ABI_VERSION`](crate::ABI_VERSION).
pub const VERSION: usize = 92;
