// SPDX-License-Identifier: GPL-2.0

//! On which terms memory is released, and what became of it.

use dlh_abi::Contents;
use kvm_vm::SlotError;

/// What became of some guest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Released: they read as zeroes now.
    Merged,
    /// Kept: no memslot, nothing mapped there, or not by the VMM.
    NoMemslot,
    /// Kept: the memslot is read-only.
    ReadOnly,
    /// Kept: the memslot is backed by guest_memfd.
    Private,
    /// Kept: neither anonymous memory, shmem nor hugetlbfs, or not readable and writable. Private memory over
    /// a file of another kind is released where the guest does not rely on its contents.
    Kind,
    /// Kept: no ordinary pages.
    PfnMap,
    /// Kept: locked in memory.
    Locked,
    /// Kept: armed for userfaultfd.
    Userfault,
    /// Kept: pinned for DMA.
    Pinned,
    /// Kept: the rest of the huge page is in use, or was not reported together with them.
    Partial,
    /// Kept: a private mapping, and the file behind it has something there, which would be seen then; the guest
    /// relies on not finding it.
    File,
    /// Kept: others had locks that are not waited for.
    Busy,
    /// Kept: of hugetlbfs, which the terms leave out.
    Hugetlb,
}

impl Verdict {
    /// Whether the pages were kept for what passes, so that it is worth while to report them again. Pins are no such
    /// thing: those of a device model or of an io_uring stay as long as the VM.
    pub fn is_passing(self) -> bool {
        matches!(self, Self::Busy | Self::Userfault)
    }
}

impl From<SlotError> for Verdict {
    fn from(e: SlotError) -> Self {
        match e {
            SlotError::None => Self::NoMemslot,
            SlotError::ReadOnly => Self::ReadOnly,
            SlotError::Private => Self::Private,
        }
    }
}

/// What became of the pages at the front.
pub(crate) struct Step {
    /// How many, at least one.
    pub(crate) pages: u64,
    pub(crate) verdict: Verdict,
}

/// When the zero page is mapped into the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// When somebody reads there.
    Release,
    /// At once, for private anonymous memory.
    Share,
}

/// What to release, and how.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// When the zero page is mapped.
    pub mode: Mode,
    /// Whether memory of hugetlbfs is released, too.
    pub hugetlb: bool,
    /// What the guest relies on finding there afterwards.
    pub contents: Contents,
}

/// The largest multiple of `size` that is not above `value`. (Not a division: what it panics with is more
/// than objtool knows.)
pub(crate) fn round_down(value: u64, size: u64) -> u64 {
    value - value.checked_rem(size).unwrap_or(0)
}
