// SPDX-License-Identifier: GPL-2.0

//! The states of the 512 pages of one 2 MiB block.

use dlh_abi::{Gfn, GfnRange};

/// Pages in a block.
pub const BLOCK_PAGES: u64 = 512;

const PAGES_A_WORD: u64 = 32;
const WORDS: usize = (BLOCK_PAGES / PAGES_A_WORD) as usize;

/// What the host knows of a guest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageState {
    /// Nothing: the guest may be using it.
    Unknown = 0,
    /// The guest has named it free and waits for the host.
    Reported = 1,
    /// Its contents were released; it reads as the zero page until the guest writes.
    Merged = 2,
    /// It was reported but had to be kept: wrong kind of memory, pinned, locked.
    Kept = 3,
}

impl PageState {
    const fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Unknown,
            1 => Self::Reported,
            2 => Self::Merged,
            _ => Self::Kept,
        }
    }
}

/// The states of one block, two bits a page.
#[derive(Clone, Debug)]
pub struct Block {
    words: [u64; WORDS],
}

const _: () = assert!(size_of::<Block>() * 16_384 == (BLOCK_PAGES << 12) as usize);

impl Default for Block {
    fn default() -> Self {
        Self::new()
    }
}

impl Block {
    /// A block whose pages are all [`PageState::Unknown`].
    pub const fn new() -> Self {
        Self { words: [0; WORDS] }
    }

    /// The number of the block that `gfn` lies in.
    pub const fn number(gfn: Gfn) -> u64 {
        gfn.0 / BLOCK_PAGES
    }

    const fn place(gfn: Gfn) -> (usize, u64) {
        let page = gfn.0 % BLOCK_PAGES;
        ((page / PAGES_A_WORD) as usize, 2 * (page % PAGES_A_WORD))
    }

    /// The state of a page of this block.
    pub const fn get(&self, gfn: Gfn) -> PageState {
        let (word, shift) = Self::place(gfn);
        PageState::from_bits(self.words[word] >> shift)
    }

    /// Sets the state of every page of `range` that lies in the block of its first page.
    pub fn set(&mut self, range: GfnRange, state: PageState) {
        // The state in each of a word's pages.
        let all = state as u64 * (u64::MAX / 3);
        let block_end = (Block::number(range.start()) + 1) * BLOCK_PAGES;
        let end = range.end().0.min(block_end);
        let mut gfn = range.start().0;
        while gfn < end {
            let (word, shift) = Self::place(Gfn(gfn));
            let pages = (PAGES_A_WORD - shift / 2).min(end - gfn);
            let mask = (u64::MAX >> (64 - 2 * pages)) << shift;
            self.words[word] = (self.words[word] & !mask) | (all & mask);
            gfn += pages;
        }
    }

    /// How many pages are in each state, in the order of [`PageState`].
    pub fn census(&self) -> [u32; 4] {
        // Each of the four patterns is found as the places where both bits agree with it.
        const LOW: u64 = 0x5555_5555_5555_5555;
        let mut count = [0; 4];
        for w in self.words {
            let (low, high) = (w & LOW, (w >> 1) & LOW);
            count[1] += (low & !high).count_ones();
            count[2] += (high & !low).count_ones();
            count[3] += (high & low).count_ones();
        }
        count[0] = BLOCK_PAGES as u32 - count[1] - count[2] - count[3];
        count
    }
}

/// Cuts a range where blocks begin.
#[derive(Clone, Debug)]
pub struct Pieces {
    next: u64,
    end: u64,
}

impl Pieces {
    /// The pieces of `range`, each within one block, in ascending order.
    pub const fn of(range: GfnRange) -> Self {
        Self { next: range.start().0, end: range.end().0 }
    }
}

impl Iterator for Pieces {
    type Item = GfnRange;

    fn next(&mut self) -> Option<GfnRange> {
        let block_end = (Block::number(Gfn(self.next)) + 1) * BLOCK_PAGES;
        let pages = self.end.min(block_end).checked_sub(self.next)?;
        let piece = GfnRange::new(Gfn(self.next), pages).ok()?;
        self.next += pages;
        Some(piece)
    }
}
