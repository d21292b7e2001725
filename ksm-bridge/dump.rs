// SPDX-License-Identifier: GPL-2.0

//! The binary form of the free-page map, for tools; docs/abi.md describes it.

use kernel::{
    alloc::KVec, debugfs::BinaryWriter, fs::file::Offset, prelude::*, sync::Arc,
    uaccess::UserSliceWriter,
};

use crate::{map::Regions, merger::Merger};

/// "DLHMAP" and the version of the form, as the first word.
const MAGIC: u64 = u64::from_le_bytes(*b"DLHMAP\0\x01");
/// Words of the header, and of the description of a memslot.
const HEADER: usize = 4;
const MEMSLOT: usize = 3;
/// Copied under one hold of the map's lock.
const PIECE: usize = 512;

/// The file `map` of a VM.
pub(crate) struct Dump(pub(crate) Arc<Merger>);

/// The word at `index`: header, then descriptions of memslots, then their states one after the other.
fn word(regions: &Regions, index: usize) -> Option<u64> {
    let count = regions.list().len();
    if let Some(described) = index.checked_sub(HEADER) {
        if described < count * MEMSLOT {
            let region = regions.list().get(described / MEMSLOT)?;
            return Some(match described % MEMSLOT {
                0 => region.frames().start().0,
                1 => region.frames().pages(),
                _ => region.states().len() as u64,
            });
        }
    } else {
        return Some(match index {
            0 => MAGIC,
            1 => regions.generation(),
            2 => count as u64,
            _ => 0,
        });
    }
    let mut index = index - HEADER - count * MEMSLOT;
    for region in regions.list() {
        if let Some(word) = region.states().get(index) {
            return Some(*word);
        }
        index -= region.states().len();
    }
    None
}

impl BinaryWriter for Dump {
    fn write_to_slice(&self, writer: &mut UserSliceWriter, offset: &mut Offset) -> Result<usize> {
        let first = usize::try_from(*offset).map_err(|_| EINVAL)? / 8;
        let mut bytes = KVec::with_capacity(8 * PIECE, GFP_KERNEL)?;
        self.0.map().look(|regions| {
            for word in (first..first + PIECE).map_while(|index| word(regions, index)) {
                for byte in word.to_le_bytes() {
                    // There is room for all of them.
                    let _ = bytes.push_within_capacity(byte);
                }
            }
        });
        let skip = (*offset % 8) as usize;
        let piece = bytes.get(skip..).unwrap_or(&[]);
        let piece = piece.get(..piece.len().min(writer.len())).unwrap_or(&[]);
        writer.write_slice(piece)?;
        *offset += piece.len() as Offset;
        Ok(piece.len())
    }
}
