// SPDX-License-Identifier: GPL-2.0

//! The states of the pages of one memslot, two bits a page, in words that the caller owns.

use core::ops::Range;

/// Pages whose states are in one word; the first page's are its lowest bits.
pub const PAGES_A_WORD: u64 = 32;

/// What the host knows of a guest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageState {
    /// Nothing: the guest may be using it.
    Unknown = 0,
    /// The guest has named it free and waits for the host.
    Reported = 1,
    /// Its contents were released; the guest has not been seen to write to it since.
    Merged = 2,
    /// It was merged, and the guest has written to it since.
    CameBack = 3,
}

impl PageState {
    const fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Unknown,
            1 => Self::Reported,
            2 => Self::Merged,
            _ => Self::CameBack,
        }
    }
}

/// How many pages are in each state, in the order of [`PageState`].
pub type Census = [u64; 4];

/// How many words the states of `pages` pages take: 1/16,384 of the memory, rounded up.
pub const fn words(pages: u64) -> u64 {
    pages.div_ceil(PAGES_A_WORD)
}

/// The state of a page; [`PageState::Unknown`] where there are no words for it.
pub fn get(words: &[u64], page: u64) -> PageState {
    let (word, shift) = place(page);
    PageState::from_bits(words.get(word).map_or(0, |word| word >> shift))
}

/// The first run of pages in `state` among `pages`; none if there are no words for any.
pub fn first_run(words: &[u64], pages: Range<u64>, state: PageState) -> Option<Range<u64>> {
    let start = skip(words, pages.clone(), |is| is != state);
    let end = skip(words, start..pages.end, |is| is == state);
    (start < end).then_some(start..end)
}

/// The first of `pages` that there is a word for and that `go_on` does not let pass; the end if there is none.
fn skip(words: &[u64], pages: Range<u64>, go_on: impl Fn(PageState) -> bool) -> u64 {
    let mut page = pages.start;
    while page < pages.end {
        let (index, shift) = place(page);
        let Some(word) = words.get(index) else { break };
        let first = PageState::from_bits(word >> shift);
        if !go_on(first) {
            return page;
        }
        // Mostly all of a word is alike.
        let alike = shift == 0 && *word == every(first);
        page += if alike { PAGES_A_WORD } else { 1 };
    }
    page.min(pages.end)
}

/// Sets the state of `pages`; those that there are no words for are left out. Returns how many were in
/// which state before.
pub fn set(words: &mut [u64], pages: Range<u64>, state: PageState) -> Census {
    let mut before = [0; 4];
    let mut page = pages.start;
    while page < pages.end {
        let (word, shift) = place(page);
        let Some(word) = words.get_mut(word) else { break };
        let count = (PAGES_A_WORD - shift / 2).min(pages.end - page);
        let mask = (u64::MAX >> (64 - 2 * count)) << shift;
        count_states(*word, mask, count, PageState::from_bits(*word >> shift), &mut before);
        *word = (*word & !mask) | (every(state) & mask);
        page += count;
    }
    before
}

/// A word with all of its pages in a state.
const fn every(state: PageState) -> u64 {
    state as u64 * (u64::MAX / 3)
}

const fn place(page: u64) -> (usize, u64) {
    ((page / PAGES_A_WORD) as usize, 2 * (page % PAGES_A_WORD))
}

/// Adds up how many of the `count` pages that `mask` has both bits of are in which state. `first` is the state of
/// the first of them.
#[inline]
fn count_states(word: u64, mask: u64, count: u64, first: PageState, census: &mut Census) {
    if (word ^ every(first)) & mask == 0 {
        // Mostly they are alike, and counting bits takes long without an instruction for it.
        census[first as usize] += count;
    } else {
        count_each(word, mask, census);
    }
}

fn count_each(word: u64, mask: u64, census: &mut Census) {
    const LOW: u64 = 0x5555_5555_5555_5555;
    let pages = mask & LOW;
    let (low, high) = (word, word >> 1);
    census[0] += u64::from((!low & !high & pages).count_ones());
    census[1] += u64::from((low & !high & pages).count_ones());
    census[2] += u64::from((!low & high & pages).count_ones());
    census[3] += u64::from((low & high & pages).count_ones());
}
