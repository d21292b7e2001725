// SPDX-License-Identifier: GPL-2.0

//! The binary form of the free-page map, for tools; docs/abi.md describes it.

use debugfs::Binary;
use kernel::sync::Arc;

use crate::{map::Regions, merger::Merger};

/// "DLHMAP" and the version of the form, as the first word.
const MAGIC: u64 = u64::from_le_bytes(*b"DLHMAP\0\x01");
/// Words of the description of a memslot.
const MEMSLOT: usize = 3;

/// The file `map` of a VM.
pub(crate) struct Dump(pub(crate) Arc<Merger>);

/// A piece of the file, which is made from its beginning.
struct Piece<'a> {
    bytes: &'a mut [u8],
    filled: usize,
    /// Words, and bytes of the first word after them, that come before the piece.
    before: (usize, usize),
}

impl Piece<'_> {
    /// The next words of the file. Returns whether there is room for more.
    fn put(&mut self, words: &[u64]) -> bool {
        let first = self.before.0.min(words.len());
        self.before.0 -= first;
        for word in words.iter().skip(first) {
            let word = word.to_le_bytes();
            let word = word.get(core::mem::take(&mut self.before.1)..).unwrap_or(&[]);
            let room = self.bytes.get_mut(self.filled..).unwrap_or(&mut []);
            let len = word.len().min(room.len());
            room[..len].copy_from_slice(&word[..len]);
            self.filled += len;
            if self.filled == self.bytes.len() {
                return false;
            }
        }
        true
    }
}

/// Fills a piece: header, descriptions of memslots, their states one after the other. Takes a few steps for
/// each memslot and word of the piece: this is done under the map's lock.
fn fill(regions: &Regions, piece: &mut Piece<'_>) {
    let list = regions.list();
    if !piece.put(&[MAGIC, regions.generation(), list.len() as u64, 0]) {
        return;
    }
    // Whole descriptions before the piece need not be made.
    let described = (piece.before.0 / MEMSLOT).min(list.len());
    piece.before.0 -= described * MEMSLOT;
    let more = list.iter().skip(described).all(|region| {
        let frames = region.frames();
        piece.put(&[frames.start().0, frames.pages(), region.states().len() as u64])
    });
    if more {
        let _ = list.iter().all(|region| piece.put(region.states()));
    }
}

impl Binary for Dump {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> usize {
        let Ok(first) = usize::try_from(offset / 8) else { return 0 };
        let mut piece = Piece { bytes, filled: 0, before: (first, (offset % 8) as usize) };
        self.0.map().look(|regions| fill(regions, &mut piece));
        piece.filled
    }
}
