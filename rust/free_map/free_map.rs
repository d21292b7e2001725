// SPDX-License-Identifier: GPL-2.0

//! The free-page map of a VM: what is known of each guest page, and how reports become long runs.
//!
//! This crate holds the arithmetic; `ksm-bridge` keeps the words and decides when a state changes.

#![cfg_attr(not(any(CONFIG_RUST, test)), no_std)]
#![forbid(unsafe_code)]

mod coalesce;
pub mod stamps;
pub mod states;

pub use coalesce::{coalesce, extend};
pub use states::{Census, PageState};
