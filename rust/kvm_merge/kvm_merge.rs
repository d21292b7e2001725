// SPDX-License-Identifier: GPL-2.0

//! Releasing guest pages to the shared zero page, on a thread of the VMM.

mod release;
mod worker;

pub use release::{release, Verdict};
pub use worker::{Job, Worker};
