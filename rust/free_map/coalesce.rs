// SPDX-License-Identifier: GPL-2.0

//! Neighbouring reports become one run, so that one call to the memory manager covers it.

use dlh_abi::GfnRange;

/// Sorts `ranges` and joins those that touch or overlap; returns how many remain, at the front.
///
/// The remaining runs are ascending, do not touch, and cover just the pages that were covered. Each
/// range is inserted among those before it: guests report neighbours one after the other, so there are
/// few runs at any time. (Not `sort_unstable`: objtool rejects its panics in a module.)
pub fn coalesce(ranges: &mut [GfnRange]) -> usize {
    let mut kept = 0;
    for i in 0..ranges.len() {
        let new = ranges[i];
        if kept == 0 || ranges[kept - 1].end() < new.start() {
            // Mostly they come in order.
            ranges[kept] = new;
            kept += 1;
            continue;
        }
        // The runs that the new range touches: none that end before it, none that begin after it.
        let first = ranges[..kept].partition_point(|r| r.end() < new.start());
        let after = first + ranges[first..kept].partition_point(|r| r.start() <= new.end());
        let joined = join(&ranges[first..after], new);
        if first == after {
            ranges.copy_within(first..kept, first + 1);
            kept += 1;
        } else {
            ranges.copy_within(after..kept, first + 1);
            kept -= after - first - 1;
        }
        ranges[first] = joined;
    }
    kept
}

/// Makes `run` longer by `next`, if that begins where `run` ends: guests mostly report neighbours one after the
/// other.
#[inline]
pub fn extend(run: &mut GfnRange, next: GfnRange) -> bool {
    let longer = GfnRange::new(run.start(), run.pages().wrapping_add(next.pages()));
    match longer {
        Ok(longer) if run.end() == next.start() => {
            *run = longer;
            true
        }
        _ => false,
    }
}

/// The run from the first page of `runs` or `new` to the last.
fn join(runs: &[GfnRange], new: GfnRange) -> GfnRange {
    runs.iter().fold(new, |all, run| {
        let start = all.start().min(run.start());
        let end = all.end().max(run.end());
        // Never fails: it lies between two valid ranges.
        GfnRange::new(start, end.0 - start.0).unwrap_or(all)
    })
}
