// SPDX-License-Identifier: GPL-2.0

//! A table that is read where nothing may sleep or wait: on the exit path, in tracepoint probes.

mod link;
mod reader;
mod table;

pub use link::{Link, Linked};
pub use reader::Reader;
pub use table::{Table, Unlinked};
