// SPDX-License-Identifier: GPL-2.0

//! Releasing guest pages to the shared zero page, on a worker that has the VMM's address space meanwhile.
//!
//! One way through: memslots ([`release()`]) -> VMAs ([`mmap`]) and their kind ([`vma`]) -> what each kind needs,
//! of which files need the most ([`file`]) -> what is said of it ([`verdict`]). Beside it: what is there again ([`resident`]).

mod file;
mod mmap;
mod release;
mod resident;
mod verdict;
mod vma;

pub use release::{release, Patience};
pub use resident::in_shared_file;
pub use verdict::{Mode, Terms, Verdict};
