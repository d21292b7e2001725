// SPDX-License-Identifier: GPL-2.0

//! When the pages of a memslot were last merged, for the share of those that come back soon.
//!
//! One time for each 2 MiB block, up to [`MOST`] of them; in a larger memslot blocks share one, and a page
//! looks as if it had been merged when the last of its neighbours was.

use core::ops::Range;

/// log2 of the pages in a block.
const BLOCK_SHIFT: u32 = 9;
/// Times kept for a memslot at most: 16 KiB, 8 GiB without sharing.
pub const MOST: u64 = 4096;

/// How many times are kept for a memslot of `pages` pages. A power of two.
pub const fn stamps(pages: u64) -> u64 {
    let blocks = pages.div_ceil(1 << BLOCK_SHIFT);
    if blocks >= MOST {
        MOST
    } else {
        blocks.next_power_of_two()
    }
}

/// `pages` were merged at `now`, in milliseconds of a clock that may wrap.
pub fn stamp(stamps: &mut [u32], pages: Range<u64>, now: u32) {
    if pages.is_empty() {
        return;
    }
    let (first, last) = (pages.start >> BLOCK_SHIFT, (pages.end - 1) >> BLOCK_SHIFT);
    if last - first >= stamps.len() as u64 {
        stamps.fill(now);
        return;
    }
    for block in first..=last {
        let place = place(stamps, block);
        if let Some(stamp) = stamps.get_mut(place) {
            *stamp = now;
        }
    }
}

/// Milliseconds since `page` was merged.
pub fn age(stamps: &[u32], page: u64, now: u32) -> u32 {
    let stamp = stamps.get(place(stamps, page >> BLOCK_SHIFT));
    stamp.map_or(u32::MAX, |stamp| now.wrapping_sub(*stamp))
}

fn place(stamps: &[u32], block: u64) -> usize {
    (block & (stamps.len() as u64).wrapping_sub(1)) as usize
}
