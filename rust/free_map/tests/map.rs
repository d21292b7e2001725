// SPDX-License-Identifier: GPL-2.0

//! Properties of the free-page map against models that are too simple to be wrong.

use std::collections::BTreeSet;

use dlh_abi::{Gfn, GfnRange};
use free_map::{coalesce, Block, PageState, Pieces, BLOCK_PAGES};
use proptest::prelude::*;

fn range() -> impl Strategy<Value = GfnRange> {
    (0u64..4096, 1u64..1500).prop_map(|(s, n)| GfnRange::new(Gfn(s), n).unwrap())
}

fn pages(ranges: &[GfnRange]) -> BTreeSet<u64> {
    ranges.iter().flat_map(|r| r.start().0..r.end().0).collect()
}

fn state() -> impl Strategy<Value = PageState> {
    use PageState::*;
    prop::sample::select(vec![Unknown, Reported, Merged, Kept])
}

proptest! {
    #[test]
    fn coalescing_keeps_the_pages_and_leaves_gaps(mut v in prop::collection::vec(range(), 0..40)) {
        let before = pages(&v);
        let kept = coalesce(&mut v);
        prop_assert_eq!(pages(&v[..kept]), before);
        for pair in v[..kept].windows(2) {
            prop_assert!(pair[0].end() < pair[1].start());
        }
    }

    #[test]
    fn pieces_tile_the_range_within_blocks(r in range()) {
        let p: Vec<_> = Pieces::of(r).collect();
        prop_assert_eq!(p[0].start(), r.start());
        prop_assert_eq!(p[p.len() - 1].end(), r.end());
        for pair in p.windows(2) {
            prop_assert_eq!(pair[0].end(), pair[1].start());
            prop_assert_eq!(pair[1].start().0 % BLOCK_PAGES, 0);
        }
        for piece in &p {
            prop_assert_eq!(Block::number(piece.start()), Block::number(Gfn(piece.end().0 - 1)));
        }
    }

    #[test]
    fn a_block_remembers_each_page(ops in prop::collection::vec((0u64..512, 1u64..700, state()), 0..30)) {
        let mut block = Block::new();
        let mut model = [PageState::Unknown; BLOCK_PAGES as usize];
        for (start, n, state) in ops {
            // In the seventh block, so that block-relative arithmetic is exercised.
            let first = 7 * BLOCK_PAGES + start;
            block.set(GfnRange::new(Gfn(first), n).unwrap(), state);
            let end = (start + n).min(BLOCK_PAGES) as usize;
            model[start as usize..end].fill(state);
        }
        let mut census = [0u32; 4];
        for (i, s) in model.iter().enumerate() {
            prop_assert_eq!(block.get(Gfn(7 * BLOCK_PAGES + i as u64)), *s);
            census[*s as usize] += 1;
        }
        prop_assert_eq!(block.census(), census);
    }
}
