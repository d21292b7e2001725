// SPDX-License-Identifier: GPL-2.0

//! The free-page map of a VM: what is known of each guest page, and how reports become long runs.
//!
//! Two bits a page, kept in blocks of 2 MiB that exist only where something was reported. This crate
//! holds the arithmetic; `ksm-bridge` keeps the blocks and decides when a state changes.

#![cfg_attr(not(any(CONFIG_RUST, test)), no_std)]
#![forbid(unsafe_code)]

mod block;
mod coalesce;

pub use block::{Block, PageState, Pieces, BLOCK_PAGES};
pub use coalesce::coalesce;
