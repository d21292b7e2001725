// SPDX-License-Identifier: GPL-2.0

//! Properties of the free-page map against models that are too simple to be wrong.

use std::collections::BTreeSet;

use dlh_abi::{Gfn, GfnRange};
use free_map::{coalesce, extend, stamps, states, PageState};
use proptest::prelude::*;

fn range() -> impl Strategy<Value = GfnRange> {
    (0u64..4096, 1u64..1500).prop_map(|(s, n)| GfnRange::new(Gfn(s), n).unwrap())
}

fn pages(ranges: &[GfnRange]) -> BTreeSet<u64> {
    ranges.iter().flat_map(|r| r.start().0..r.end().0).collect()
}

fn state() -> impl Strategy<Value = PageState> {
    use PageState::*;
    prop::sample::select(vec![Unknown, Reported, Merged, CameBack])
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
    fn a_run_is_extended_by_its_neighbour_only(run in range(), next in range()) {
        let mut longer = run;
        if extend(&mut longer, next) {
            prop_assert_eq!(run.end(), next.start());
            prop_assert_eq!(pages(&[longer]), pages(&[run, next]));
        } else {
            prop_assert!(longer == run && run.end() != next.start());
        }
        let next = GfnRange::new(run.end(), next.pages()).unwrap();
        let mut longer = run;
        prop_assert!(extend(&mut longer, next));
        prop_assert_eq!(pages(&[longer]), pages(&[run, next]));
    }

    #[test]
    fn each_page_is_remembered(
        size in 1u64..700,
        ops in prop::collection::vec((0u64..800, 0u64..800, state()), 0..30),
    ) {
        let mut words = vec![0; states::words(size) as usize];
        // What lies behind the last page of the last word is as good as any other.
        let room = words.len() * states::PAGES_A_WORD as usize;
        let mut model = vec![PageState::Unknown; room];
        for (start, count, state) in ops {
            let (first, end) = ((start as usize).min(room), ((start + count) as usize).min(room));
            let mut expected = [0u64; 4];
            for s in &model[first..end] {
                expected[*s as usize] += 1;
            }
            prop_assert_eq!(states::set(&mut words, start..start + count, state), expected);
            model[first..end].fill(state);
        }
        for (i, s) in model.iter().enumerate() {
            prop_assert_eq!(states::get(&words, i as u64), *s);
        }
        prop_assert_eq!(states::get(&words, room as u64), PageState::Unknown);
    }

    /// A run is where it was set, and as long.
    #[test]
    fn runs_are_found(
        changes in prop::collection::vec((0u64..200, 0u64..90, state()), 0..12),
        start in 0u64..210,
        len in 0u64..210,
        wanted in state(),
    ) {
        let mut map = vec![0; states::words(200) as usize];
        for (page, count, state) in changes {
            states::set(&mut map, page..page + count, state);
        }
        // What is behind the last word is in no state.
        let there = states::words(200) * states::PAGES_A_WORD;
        let is = |page: &u64| *page < there && states::get(&map, *page) == wanted;
        let mut rest = start..start + len;
        let mut found = Vec::new();
        while let Some(run) = states::first_run(&map, rest.clone(), wanted) {
            prop_assert!(run.start >= rest.start && run.start < run.end && run.end <= rest.end);
            rest.start = run.end;
            found.extend(run);
        }
        prop_assert_eq!(found, (start..start + len).filter(is).collect::<Vec<_>>());
    }

    /// A page is as old as the last merge of a block that has the same place as its own: with a place for each
    /// block, of its own block.
    #[test]
    fn a_page_is_as_old_as_the_last_merge_at_its_place(
        size in 1u64..6_000_000,
        ops in prop::collection::vec((0u64..6_000_000, 1u64..5000, 0u32..100_000), 1..20),
        others in prop::collection::vec(0u64..6_000_000, 20),
        begin in any::<u32>(),
    ) {
        let mut times = vec![begin; stamps::stamps(size) as usize];
        let places = times.len() as u64;
        prop_assert!(times.len().is_power_of_two() && places <= stamps::MOST);
        let mut now = begin;
        let mut merges = Vec::new();
        for (start, count, wait) in ops {
            let (start, end) = (start % size, (start % size + count).min(size));
            now = now.wrapping_add(wait);
            stamps::stamp(&mut times, start..end, now);
            merges.push((start, end, now));
        }
        let named = merges.iter().flat_map(|&(start, end, _)| [start, end - 1]);
        let pages: Vec<u64> = named.chain(others.into_iter().map(|page| page % size)).collect();
        for page in pages {
            // The first block of a merge from which on one has the place of the page's.
            let hit = |&&(start, end, _): &&(u64, u64, u32)| {
                let (first, last) = (start / 512, (end - 1) / 512);
                (page / 512 + places - first % places) % places <= last - first
            };
            let merged = merges.iter().rev().find(hit).map_or(begin, |&(_, _, at)| at);
            prop_assert_eq!(stamps::age(&times, page, now), now.wrapping_sub(merged));
            // So it is never thought older than it is.
            let own = merges.iter().rev().find(|&&(start, end, _)| (start..end).contains(&page));
            if let Some(&(_, _, at)) = own {
                prop_assert!(stamps::age(&times, page, now) <= now.wrapping_sub(at));
            }
        }
    }
}
