// SPDX-License-Identifier: GPL-2.0

//! How much of what was merged is there again: pages of a shared file that the map takes for merged.
//!
//! Mostly somebody has read the guest's memory. But the VMM may also have written there on the guest's behalf
//! (what the guest reads from a disk), which nobody says: so it is a hint, and being wrong costs one round of
//! reports.

use dlh_abi::Gfn;
use kernel::{
    current,
    mm::Mm,
    sync::{
        aref::ARef,
        atomic::{ordering::Relaxed, Atomic},
    },
};
use kvm_merge::in_shared_file;

use crate::map::Map;

/// Pages of the map that are looked at for one question of the guest: 4 GiB of its memory.
const PIECE: u64 = 1 << 20;
/// The same between two looks at the map.
const STEP: u64 = 1 << 15;
/// Counted for one question at most.
const MOST: u64 = 1 << 16;
/// Fewer are not worth a round of reports: 4 MiB.
const FEW: u64 = 1024;

/// Looks for them in one VM.
pub(crate) struct Refilled {
    /// The VMM's memory.
    mm: Option<ARef<Mm>>,
    /// Where the next question goes on.
    next: Atomic<u64>,
}

/// What was found in a part of the map.
#[derive(Default)]
struct Found {
    merged: u64,
    there: u64,
    /// Where to go on; nowhere if that was the end.
    next: Option<Gfn>,
}

impl Refilled {
    /// For the VM of the current process.
    pub(crate) fn new() -> Self {
        let mm = current!().mm().map(|mm| ARef::from(&**mm));
        Self { mm, next: Atomic::new(0) }
    }

    /// Looks at `pages` pages of the map from `from` on, as far as `most` are found.
    fn look(&self, map: &Map, from: Gfn, pages: u64, most: u64) -> Found {
        let mut found = Found { next: Some(from), ..Found::default() };
        let Some(mm) = &self.mm else { return Found::default() };
        let end = from.0.saturating_add(pages);
        while let Some(next) = found.next {
            if next.0 >= end || found.there >= most {
                break;
            }
            let (span, next) = map.merged_from(next, STEP);
            if let Some(span) = span {
                found.merged += span.frames.pages();
                found.there += in_shared_file(mm, span, most - found.there);
            }
            found.next = next;
        }
        found
    }

    /// All of them. May sleep; waits for nobody.
    pub(crate) fn count(&self, map: &Map) -> u64 {
        self.look(map, Gfn(0), u64::MAX, u64::MAX).there
    }

    /// Whether much of what was merged is there again, in a part of the map; another one each time. May
    /// sleep; waits for nobody.
    pub(crate) fn is_much(&self, map: &Map) -> bool {
        let from = Gfn(self.next.load(Relaxed));
        let found = self.look(map, from, PIECE, MOST);
        self.next.store(found.next.map_or(0, |next| next.0), Relaxed);
        found.there >= FEW && found.there >= found.merged / 4
    }
}
