// SPDX-License-Identifier: GPL-2.0

//! Reporting free pages: place, wait, and call the host only if it does not come by.

use dlh_abi::PAGE_SIZE;
use kernel::{
    prelude::*,
    sync::Arc,
    time::{Instant, Monotonic},
};
use kvm_guest::{
    sleep_ms, CpuGuard, Placed, Progress, Report, Reporter, Tally, FAULT_REPORT_EARLY,
};

use crate::{
    rings::Rings,
    stats::{Event, Stats},
};

/// The longest that is slept between two looks, in milliseconds; the first is a timer tick.
const LONGEST_PAUSE_MS: u32 = 16;

/// The reporter.
pub(crate) struct FreePages {
    rings: Arc<Rings>,
    timeout_ms: i64,
}

impl FreePages {
    /// A reporter that calls the host after `timeout_ms` milliseconds without progress. May sleep.
    pub(crate) fn new(rings: Arc<Rings>, timeout_ms: u32) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { rings, timeout_ms: i64::from(timeout_ms) }, GFP_KERNEL)?)
    }

    fn stats(&self) -> &Stats {
        self.rings.stats()
    }

    /// Places what there is room for; `None` if this CPU has no ring.
    fn place(&self, report: &mut Report<'_>) -> Option<Placed> {
        let here = CpuGuard::new();
        let mut ring = self.rings.local(&here)?;
        Some(report.place(&mut ring))
    }

    /// Hands everything over; returns what became of it.
    fn hand_over(&self, report: &mut Report<'_>) -> Result<Tally> {
        let mut sum = Tally::default();
        while report.left() > 0 {
            if self.rings.is_ending() {
                return Err(EAGAIN);
            }
            self.rings.revive();
            let tally = match self.place(report) {
                Some(placed) => {
                    self.stats().add(Event::Page, placed.pages);
                    if report.left() > 0 {
                        self.stats().count(Event::Full);
                    }
                    if FAULT_REPORT_EARLY && report.left() == 0 {
                        return Ok(Tally { calls: placed.ranges, ..sum });
                    }
                    self.wait(report)?
                }
                None => self.call(report)?,
            };
            self.stats().add(Event::Range, u64::from(tally.calls - tally.declined));
            self.stats().add(Event::Declined, u64::from(tally.declined));
            sum.calls += tally.calls;
            sum.declined += tally.declined;
            sum.gone += tally.gone;
        }
        Ok(sum)
    }

    /// Waits until the host is done with what was placed. It comes by at any exit of the ring's CPU,
    /// and sleeping here makes for one if there is nothing else to do.
    ///
    /// # Errors
    ///
    /// `EAGAIN`: the ring is dead.
    fn wait(&self, report: &mut Report<'_>) -> Result<Tally> {
        let begin = Instant::<Monotonic>::now();
        let mut quiet_since = begin;
        let mut pause = 1;
        self.stats().count(Event::Wait);
        let result = loop {
            let mut progress = report.poll();
            let late = quiet_since.elapsed().as_millis() >= self.timeout_ms;
            if matches!(progress, Progress::Working) && (late || report.is_detached()) {
                if late {
                    self.stats().count(Event::Timeout);
                }
                self.stats().count(Event::Kick);
                progress = report.kick();
                quiet_since = Instant::now();
            }
            match progress {
                Progress::Finished(tally) => break Ok(tally),
                Progress::Lost => {
                    self.stats().count(Event::Lost);
                    break Err(EAGAIN);
                }
                Progress::Working => {}
            }
            sleep_ms(pause);
            pause = LONGEST_PAUSE_MS.min(pause * 2);
        };
        let waited = begin.elapsed().as_millis();
        self.stats().add(Event::WaitMs, u64::try_from(waited).unwrap_or(0));
        result
    }

    /// Hands one range over without a ring.
    ///
    /// # Errors
    ///
    /// `EAGAIN`: the host takes none any more.
    fn call(&self, report: &mut Report<'_>) -> Result<Tally> {
        self.stats().count(Event::Synchronous);
        match report.call_next() {
            Ok(pages) => {
                self.stats().add(Event::Page, pages);
                Ok(Tally { calls: 1, ..Tally::default() })
            }
            Err(Some(e)) if e.is_gone() => Err(EAGAIN),
            Err(_) => Ok(Tally { calls: 1, declined: 1, gone: 0 }),
        }
    }
}

impl Reporter for FreePages {
    fn report(&self, report: &mut Report<'_>) -> Result {
        self.stats().count(Event::Report);
        let result = match self.hand_over(report) {
            // The host has lost the operation; another time it may have it again.
            Ok(tally) if tally.calls > 0 && tally.gone == tally.calls => Err(EAGAIN),
            Ok(_) => Ok(()),
            Err(e) => Err(e),
        };
        if result.is_err() {
            self.stats().count(Event::Failed);
        }
        result
    }
}

const _: () = assert!(PAGE_SIZE == kernel::page::PAGE_SIZE as u64);
