// SPDX-License-Identifier: GPL-2.0

//! Releasing guest pages to the shared zero page, on a thread of the VMM.
//!
//! One way through: memslots ([`release()`]) -> VMAs and their kind ([`vma`]) -> what each kind needs, of
//! which files need the most ([`file`]).

mod file;
mod release;
mod vma;

pub use release::{release, Mode, Verdict};
