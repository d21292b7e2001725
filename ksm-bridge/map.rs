// SPDX-License-Identifier: GPL-2.0

//! The free-page map of one VM: two bits a page for each memslot of which pages were reported.
//!
//! What is shown of it to tools is in [`dump`](crate::dump).

use dlh_abi::{Gfn, GfnRange, PAGE_SIZE};
use free_map::{stamps, states, Census, PageState};
use kernel::{
    alloc::{KVVec, Vec},
    fmt, new_spinlock,
    prelude::*,
    sync::SpinLock,
};
use kvm_vm::{Hva, Memslots, Span};

/// Pages whose states are changed under one hold of the lock.
const AT_ONCE: u64 = 1 << 18;

/// What is known of one memslot.
pub(crate) struct Region {
    slot: Span,
    states: KVVec<u64>,
    stamps: KVVec<u32>,
}

/// What is known of all.
///
/// # Invariants
///
/// `regions` are ascending and do not overlap; `census` says how many of their pages are in which state.
pub(crate) struct Regions {
    list: KVVec<Region>,
    census: Census,
    generation: u64,
}

/// The map. Regions are added and removed by the worker only; states may be changed by anybody.
#[pin_data]
pub(crate) struct Map {
    #[pin]
    regions: SpinLock<Regions>,
}

impl Region {
    /// Nothing is known yet. May sleep.
    fn new(slot: Span) -> Result<Self> {
        let zeroed = |count: u64| usize::try_from(count).map_err(|_| EOVERFLOW);
        let pages = slot.frames.pages();
        Ok(Self {
            slot,
            states: Vec::zeroed(zeroed(states::words(pages))?, GFP_KERNEL_ACCOUNT)?,
            stamps: Vec::zeroed(zeroed(stamps::stamps(pages))?, GFP_KERNEL_ACCOUNT)?,
        })
    }

    /// The frames of the memslot.
    pub(crate) fn frames(&self) -> GfnRange {
        self.slot.frames
    }

    /// The states, as words of [`free_map::states`].
    pub(crate) fn states(&self) -> &[u64] {
        &self.states
    }

    /// Whether all of `frames` lie here.
    fn holds(&self, frames: GfnRange) -> bool {
        self.frames().start() <= frames.start() && frames.end() <= self.frames().end()
    }

    /// The part of `frames` that lies here, in pages from the beginning of the memslot.
    fn pages_of(&self, frames: GfnRange) -> core::ops::Range<u64> {
        let start = self.frames().start().0;
        let first = frames.start().0.max(start) - start;
        let end = frames.end().0.min(self.frames().end().0).max(start) - start;
        first..end.max(first)
    }
}

impl Regions {
    /// All of them, ascending.
    pub(crate) fn list(&self) -> &[Region] {
        &self.list
    }

    /// The generation of the memslots they were last compared with.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// The memory that the states and the times take, in bytes.
    fn bytes(&self) -> usize {
        let bytes = |region: &Region| {
            size_of_val(&*region.states) + size_of_val(&*region.stamps) + size_of::<Region>()
        };
        self.list.iter().map(bytes).sum()
    }

    /// The first region that `frames` reaches into.
    fn first_at(&self, frames: GfnRange) -> usize {
        self.list.partition_point(|region| region.frames().end() <= frames.start())
    }

    fn set(&mut self, frames: GfnRange, state: PageState) {
        self.set_from(self.first_at(frames), frames, state, None);
    }

    /// `first` is the first region that `frames` reaches into; `merged_at` is noted as their time.
    fn set_from(
        &mut self,
        first: usize,
        frames: GfnRange,
        state: PageState,
        merged_at: Option<u32>,
    ) {
        for region in self.list.iter_mut().skip(first) {
            let pages = region.pages_of(frames);
            if pages.is_empty() {
                break;
            }
            let count = pages.end - pages.start;
            let before = states::set(&mut region.states, pages.clone(), state);
            if let Some(now) = merged_at {
                stamps::stamp(&mut region.stamps, pages, now);
            }
            for (sum, n) in self.census.iter_mut().zip(before) {
                *sum = sum.wrapping_sub(n);
            }
            self.census[state as usize] = self.census[state as usize].wrapping_add(count);
        }
    }

    fn region_of(&mut self, gfn: Gfn) -> Option<(&mut Region, u64)> {
        let frames = GfnRange::new(gfn, 1).ok()?;
        let first = self.first_at(frames);
        let region = self.list.get_mut(first)?;
        let page = gfn.0.checked_sub(region.frames().start().0)?;
        Some((region, page))
    }
}

impl Map {
    /// A map that knows nothing.
    pub(crate) fn new() -> impl PinInit<Self> {
        let regions = Regions { list: KVVec::new(), census: [0; 4], generation: u64::MAX };
        pin_init!(Self { regions <- new_spinlock!(regions) })
    }

    /// Forgets memslots that have gone or moved. On the worker; may sleep.
    pub(crate) fn forget_deleted(&self, slots: &Memslots<'_>) {
        let generation = slots.vm().generation();
        let count = {
            let mut regions = self.regions.lock();
            if regions.generation == generation {
                return;
            }
            regions.generation = generation;
            regions.list.len()
        };
        for index in (0..count).rev() {
            let slot = self.regions.lock().list.get(index).map(|region| region.slot);
            if slot.is_none_or(|slot| slots.slot_of(slot.frames.start()) == Ok(slot)) {
                continue;
            }
            if let Some(slot) = slot {
                self.set(slot.frames, PageState::Unknown);
            }
            // What it took is freed once the lock is free again.
            let gone = self.regions.lock().list.remove(index);
            drop(gone);
        }
    }

    /// The guest has named `frames` free. Without memory for the memslots that are new the map does not know
    /// them. On the worker; may sleep.
    pub(crate) fn reported(&self, slots: &Memslots<'_>, frames: GfnRange) -> Result {
        {
            let mut regions = self.regions.lock();
            let first = regions.first_at(frames);
            let known = regions.list.get(first).is_some_and(|region| region.holds(frames));
            if known && frames.pages() <= AT_ONCE {
                // Mostly there is room already.
                regions.set_from(first, frames, PageState::Reported, None);
                return Ok(());
            }
        }
        let mut next = frames.start();
        while next < frames.end() {
            next = self.reserve_first(slots, GfnRange::new(next, 1).map_err(|_| EINVAL)?)?;
        }
        self.set(frames, PageState::Reported);
        Ok(())
    }

    /// Makes room in the memslot of `frames`: 1/16,384 of its memory and a fixed part; returns where that
    /// ends.
    fn reserve_first(&self, slots: &Memslots<'_>, frames: GfnRange) -> Result<Gfn> {
        let (known, index, count, room) = {
            let regions = self.regions.lock();
            let index = regions.first_at(frames);
            let known = regions
                .list
                .get(index)
                .filter(|region| region.frames().start() <= frames.start())
                .map(|region| region.frames().end());
            (known, index, regions.list.len(), regions.list.capacity())
        };
        if let Some(end) = known {
            return Ok(end);
        }
        let slot = slots.slot_of(frames.start()).map_err(|_| ENXIO)?;
        let region = Region::new(slot)?;
        let mut larger = KVVec::new();
        if count == room {
            larger = KVVec::with_capacity((2 * room).max(4), GFP_KERNEL_ACCOUNT)?;
        }
        let mut regions = self.regions.lock();
        if larger.capacity() > 0 {
            for region in regions.list.drain_all() {
                // There is room for twice as many.
                let _ = larger.push_within_capacity(region);
            }
            core::mem::swap(&mut regions.list, &mut larger);
        }
        // Nobody else adds any, so the place and the room are still there.
        let left_over = regions.list.insert_within_capacity(index, region);
        drop(regions);
        drop(larger);
        left_over.map_err(|_| ENOMEM)?;
        Ok(slot.frames.end())
    }

    /// Sets the state of `frames`, where there is room. Any context that may take spin locks.
    pub(crate) fn set(&self, frames: GfnRange, state: PageState) {
        let mut next = frames.start();
        while next < frames.end() {
            let pages = AT_ONCE.min(frames.end().0 - next.0);
            let Ok(part) = GfnRange::new(next, pages) else { return };
            self.regions.lock().set(part, state);
            next = part.end();
        }
    }

    /// `frames`, which are not very many, were merged at `now`, in milliseconds.
    pub(crate) fn merged(&self, frames: GfnRange, now: u32) {
        let mut regions = self.regions.lock();
        let first = regions.first_at(frames);
        regions.set_from(first, frames, PageState::Merged, Some(now));
    }

    /// The guest writes to `gfn`. If that was merged, it has come back: returns how many milliseconds
    /// after. Any context that may take spin locks.
    pub(crate) fn written(&self, gfn: Gfn, generation: u64, now: u32) -> Option<u32> {
        let mut regions = self.regions.lock();
        if regions.generation != generation {
            // The frame may be another memslot's by now.
            return None;
        }
        let (region, page) = regions.region_of(gfn)?;
        if states::get(&region.states, page) != PageState::Merged {
            return None;
        }
        let age = stamps::age(&region.stamps, page, now);
        regions.set(GfnRange::new(gfn, 1).ok()?, PageState::CameBack);
        Some(age)
    }

    /// The first merged pages behind `from`, among the next `most` at most, and where they lie in the VMM; and where
    /// to look further: nowhere if that was the last memslot. Any context that may take spin locks.
    pub(crate) fn merged_from(&self, from: Gfn, most: u64) -> (Option<Span>, Option<Gfn>) {
        let regions = self.regions.lock();
        let Some(region) = regions.list.iter().find(|region| region.frames().end() > from) else {
            return (None, None);
        };
        let (start, pages) = (region.frames().start().0, region.frames().pages());
        let first = from.0.saturating_sub(start);
        let end = pages.min(first.saturating_add(most));
        let run = states::first_run(&region.states, first..end, PageState::Merged);
        let next = Gfn(start + run.as_ref().map_or(end, |run| run.end));
        let span = run.and_then(|run| {
            let frames = GfnRange::new(Gfn(start + run.start), run.end - run.start).ok()?;
            let hva = Hva(region.slot.hva.0 + (run.start * PAGE_SIZE) as usize);
            Some(Span { frames, hva })
        });
        (span, Some(next))
    }

    /// Lets `look` look at all of it. It must not sleep.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Regions) -> T) -> T {
        look(&self.regions.lock())
    }

    /// Writes how many pages are in which state, and what the map takes.
    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (census, count, bytes) =
            self.look(|regions| (regions.census, regions.list.len(), regions.bytes()));
        writeln!(f, "map_reported {}", census[PageState::Reported as usize])?;
        writeln!(f, "map_merged {}", census[PageState::Merged as usize])?;
        writeln!(f, "map_came_back {}", census[PageState::CameBack as usize])?;
        writeln!(f, "map_memslots {count}")?;
        writeln!(f, "map_bytes {bytes}")
    }
}
