// SPDX-License-Identifier: GPL-2.0

//! Releasing guest pages to the shared zero page, on a thread of the VMM.
//!
//! One way through: memslots ([`release()`]) -> VMAs and their kind ([`vma`]) -> what each kind needs, of
//! which files need the most ([`file`]). Beside it: what is there again ([`resident`]).

mod file;
mod release;
mod resident;
mod vma;

pub use release::{release, Mode, Verdict};
pub use resident::in_shared_file;
