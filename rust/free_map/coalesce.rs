// SPDX-License-Identifier: GPL-2.0

//! Neighbouring reports become one run, so that one call to the memory manager covers it.

use dlh_abi::GfnRange;

/// Sorts `ranges` and joins those that touch or overlap; returns how many remain, at the front.
///
/// The remaining runs are ascending, do not touch, and cover just the pages that were covered.
pub fn coalesce(ranges: &mut [GfnRange]) -> usize {
    ranges.sort_unstable_by_key(|r| r.start());
    let mut kept = 0;
    for i in 0..ranges.len() {
        let r = ranges[i];
        if kept > 0 {
            let last = ranges[kept - 1];
            if r.start() <= last.end() {
                let end = last.end().max(r.end());
                if let Ok(joined) = GfnRange::new(last.start(), end.0 - last.start().0) {
                    ranges[kept - 1] = joined;
                    continue;
                }
            }
        }
        ranges[kept] = r;
        kept += 1;
    }
    kept
}
