// SPDX-License-Identifier: GPL-2.0

//! Whose memory may be given up: what the parameter `allow` of ksm_bridge says, and what that means for a VMM.
//!
//! A value is a list of words, with `,` or `;` in between:
//!
//! | word | allows |
//! |---|---|
//! | `all` | every VM |
//! | `none` | no VM |
//! | `uid=64055` | VMs whose VMM has this user id |
//! | `cgroup=/machine.slice` | VMs whose VMM is in this cgroup, or below it |
//! | `hugetlb` | memory of hugetlbfs, too, of the VMs that the other words allow |
//!
//! A number or a path alone is one more of the kind before it: `uid=64055,107,hugetlb`.
//!
//! The text itself is kept, and read again for each decision: those are rare, and nothing need be allocated.

#![cfg_attr(not(any(CONFIG_RUST, test)), no_std)]
#![forbid(unsafe_code)]

mod parse;
mod rules;

pub use parse::{BadRule, Why};
pub use rules::{Permission, Rules, Vmm};

/// What a value is at most, in bytes: sysfs shows it, with a newline, on one page.
pub const MOST_BYTES: usize = 4094;
