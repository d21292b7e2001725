// SPDX-License-Identifier: GPL-2.0

//! The free-page map of one VM: blocks of two bits a page, where something was ever reported.

use dlh_abi::GfnRange;
use free_map::{Block, PageState, Pieces};
use kernel::{fmt, prelude::*, rbtree::RBTree};

/// The map.
pub(crate) struct Map {
    blocks: RBTree<u64, KBox<Block>>,
    count: u64,
}

impl Map {
    /// A map that knows nothing.
    pub(crate) fn new() -> Self {
        Self { blocks: RBTree::new(), count: 0 }
    }

    /// Makes room for `frames`, which lie in memslots: that bounds the map to 1/16,384 of the VM's
    /// memory and its tree. May sleep.
    pub(crate) fn reserve(&mut self, frames: GfnRange) -> Result {
        for piece in Pieces::of(frames) {
            let number = Block::number(piece.start());
            if self.blocks.get(&number).is_none() {
                let block = KBox::new(Block::new(), GFP_KERNEL_ACCOUNT)?;
                self.blocks.try_create_and_insert(number, block, GFP_KERNEL_ACCOUNT)?;
                self.count += 1;
            }
        }
        Ok(())
    }

    /// Sets the state of `frames`, for which room was made.
    pub(crate) fn set(&mut self, frames: GfnRange, state: PageState) {
        for piece in Pieces::of(frames) {
            if let Some(block) = self.blocks.get_mut(&Block::number(piece.start())) {
                block.set(piece, state);
            }
        }
    }

    /// Writes how many pages are in which state, and what the map takes.
    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut census = [0u64; 4];
        for block in self.blocks.values() {
            for (sum, n) in census.iter_mut().zip(block.census()) {
                *sum += u64::from(n);
            }
        }
        writeln!(f, "map_reported {}", census[PageState::Reported as usize])?;
        writeln!(f, "map_merged {}", census[PageState::Merged as usize])?;
        writeln!(f, "map_kept {}", census[PageState::Kept as usize])?;
        writeln!(f, "map_bytes {}", self.count * size_of::<Block>() as u64)
    }
}
