// SPDX-License-Identifier: GPL-2.0

//! A kernel thread that works for one VM, and what it needs for that: turns in the VMM's address space
//! ([`worker`]), a share of a CPU ([`pace`]).

mod pace;
mod worker;

pub use pace::Pace;
pub use worker::{Inside, Job, Turn, Worker};
