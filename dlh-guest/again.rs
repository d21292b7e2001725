// SPDX-License-Identifier: GPL-2.0

//! Reporting once more what has been reported: where the host has forgotten it, or asks for it.
//!
//! The page allocator reports a free block once. But the host's memory for it may come back meanwhile, without
//! anybody's using it: whoever reads all of a guest's memory (a migration, a dump, a restore) fills the holes in
//! it. So this asks the host from time to time, by a deferred call, whether it wants all reports once
//! more, and finds out at the same time that there is another host. Then it takes the allocator's marks
//! off, part by part.

use kernel::{
    prelude::*,
    sync::{new_mutex, Arc, Mutex},
    time::{Instant, Monotonic},
};
use kvm_guest::{Marks, PageReporting, Round, Sweep, Swept};

use crate::{
    report::{Answer, FreePages},
    rings::Rings,
    stats::{Event, Stats},
};

/// Milliseconds from one question to the next.
pub(crate) const PERIOD_MS: u32 = 10_000;
/// The same, where there is something to wait for.
const SOON_MS: u32 = 1000;
/// Milliseconds between two parts of a sweep.
const PAUSE_MS: u32 = 10;
/// Pageblocks in a part of a sweep: 1 GiB.
const PART: u32 = 512;

/// What is done from time to time.
#[pin_data]
pub(crate) struct Again {
    rings: Arc<Rings>,
    free_pages: Arc<FreePages>,
    reporting: Arc<PageReporting<FreePages>>,
    marks: Marks,
    /// The sweep under way. Only rounds take it, of which there is one at a time.
    #[pin]
    sweep: Mutex<Option<Sweep>>,
}

/// Asks for the first time, before anything is reported. If the host wants all, the marks that are there are those
/// of whoever reported before, to a host that has forgotten it. May sleep.
///
/// # Errors
///
/// `ENOMEM`.
pub(crate) fn begin(rings: &Rings, free_pages: &FreePages) -> Result<Marks> {
    let (marks, mut sweep) = (Marks::new()?, Sweep::default());
    let Answer::Host { wanted } = free_pages.ask() else { return Ok(marks) };
    rings.stats().count(Event::Asked);
    if !wanted {
        return Ok(marks);
    }
    loop {
        let (unmarked, swept) = marks.clear(&mut sweep, PART);
        rings.stats().add(Event::Unmarked, unmarked);
        // Memory that goes just now is not worth waiting for.
        if swept != Swept::Part {
            break;
        }
    }
    Ok(marks)
}

impl Again {
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(
        rings: Arc<Rings>,
        free_pages: Arc<FreePages>,
        reporting: Arc<PageReporting<FreePages>>,
        marks: Marks,
    ) -> Result<Arc<Self>> {
        let sweep = new_mutex!(None);
        Arc::pin_init(
            pin_init!(Self { rings, free_pages, reporting, marks, sweep <- sweep }),
            GFP_KERNEL,
        )
    }

    fn stats(&self) -> &Stats {
        self.rings.stats()
    }

    /// Whether all that is free is to be reported once more.
    ///
    /// # Errors
    ///
    /// Milliseconds after which to ask again.
    fn ask(&self) -> Result<bool, u32> {
        // Here, too: a guest that reports nothing would not find out that there is a host again.
        self.rings.revive();
        match self.free_pages.ask() {
            Answer::Busy | Answer::Lost => Err(SOON_MS),
            Answer::Nothing => Err(PERIOD_MS),
            Answer::Host { wanted } => {
                self.stats().count(Event::Asked);
                // A host that knows no question has forgotten all the same.
                Ok(self.rings.take_lost() || wanted)
            }
        }
    }

    /// Goes on with a sweep; returns after how many milliseconds there is more to do.
    fn go_on(&self, under_way: &mut Option<Sweep>) -> u32 {
        let Some(sweep) = under_way else { return PERIOD_MS };
        let begin = Instant::<Monotonic>::now();
        let (unmarked, swept) = self.marks.clear(sweep, PART);
        self.stats().add(Event::Unmarked, unmarked);
        self.stats().add(Event::UnmarkUs, begin.elapsed().as_micros_ceil().unsigned_abs());
        match swept {
            Swept::Part => return PAUSE_MS,
            Swept::Held => return SOON_MS,
            Swept::All => {}
        }
        *under_way = None;
        self.stats().count(Event::Again);
        self.reporting.again();
        PERIOD_MS
    }
}

impl Round for Again {
    fn round(&self) -> u32 {
        if self.rings.is_ending() {
            return PERIOD_MS;
        }
        let mut sweep = self.sweep.lock();
        if sweep.is_none() {
            match self.ask() {
                Err(ms) => return ms,
                Ok(false) => return PERIOD_MS,
                Ok(true) => {}
            }
            // The host may be another one.
            self.free_pages.learn();
            *sweep = Some(Sweep::default());
        }
        self.go_on(&mut sweep)
    }
}
