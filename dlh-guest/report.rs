// SPDX-License-Identifier: GPL-2.0

//! Reporting free pages: place, wait, and call the host only if it does not come by.

use dlh_abi::{Contents, FEATURE_FREE_ANY, PAGE_SIZE};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{ordering::Relaxed, Atomic},
        Arc, Mutex,
    },
    time::{Instant, Monotonic},
};
use kvm_guest::{
    cpu_is_ours,
    hypercall::{self, HostError},
    platform, sleep_to_tick, sleep_us, CpuGuard, Placed, Progress, Report, Reporter, Tally,
    Unreported, FAULT_REPORT_EARLY,
};

use crate::{
    pace::Pace,
    rings::Rings,
    stats::{Event, Stats},
};

/// The shortest and the longest that is slept between two looks, in microseconds. In between it is a quarter of
/// what has been waited, so that pages are kept for hardly longer than the host needs.
///
/// The first is longer than KVM polls for a vCPU that has halted (200 µs): one that wakes up sooner makes it poll longer.
const FIRST_PAUSE_US: u32 = 250;
const LONGEST_PAUSE_US: u32 = 250_000;

/// How long pages stay unreported after a failure, in milliseconds; twice as long after each one more.
const FIRST_RETRY_MS: u32 = 100;
/// The longest: how soon a guest with nothing to do finds out that the host takes pages again.
const LONGEST_RETRY_MS: u32 = 10_000;

/// The reporter.
#[pin_data]
pub(crate) struct FreePages {
    rings: Arc<Rings>,
    pace: Pace,
    timeout_ms: i64,
    retry_ms: Atomic<u32>,
    /// The host is told that this kernel does not rely on the contents of free pages.
    any: Atomic<bool>,
    /// A report, or a question: one of the two at a time, so that only one finds a ring lost.
    #[pin]
    turn: Mutex<()>,
}

/// What came of a question.
pub(crate) enum Answer {
    /// It was not asked: a report is under way.
    Busy,
    /// It was not answered: there is no ring here, or nobody behind it.
    Nothing,
    /// The host has lost the ring.
    Lost,
    /// The host has answered: does it want all reports once more?
    Host {
        /// It does.
        wanted: bool,
    },
}

impl FreePages {
    /// A reporter that calls the host after `timeout_ms` milliseconds without progress. May sleep.
    pub(crate) fn new(rings: Arc<Rings>, pace: Pace, timeout_ms: u32) -> Result<Arc<Self>> {
        let timeout_ms = i64::from(timeout_ms);
        let this = Arc::pin_init(
            pin_init!(Self {
                rings,
                pace,
                timeout_ms,
                retry_ms: Atomic::new(FIRST_RETRY_MS),
                any: Atomic::new(false),
                turn <- new_mutex!(()),
            }),
            GFP_KERNEL,
        )?;
        this.learn();
        Ok(this)
    }

    /// Asks what the host takes. Any context.
    pub(crate) fn learn(&self) {
        let Ok(features) = hypercall::features() else { return };
        let any = features.bits & FEATURE_FREE_ANY != 0 && !platform::free_pages_zeroed();
        self.any.store(any, Relaxed);
    }

    /// What this kernel relies on, as the host understands it.
    fn contents(&self) -> Contents {
        if self.any.load(Relaxed) {
            Contents::Any
        } else {
            Contents::Zeroes
        }
    }

    /// The host has not understood `unknown` calls that said `contents`. If it is one from before the flag,
    /// they are made once more, without; returns how many.
    fn forget_flag(&self, contents: Contents, unknown: u32) -> u32 {
        if contents == Contents::Zeroes || unknown == 0 {
            return 0;
        }
        self.any.store(false, Relaxed);
        unknown
    }

    /// Asks the host whether it wants all reports once more. May sleep.
    pub(crate) fn ask(&self) -> Answer {
        let Some(_turn) = self.turn.try_lock() else { return Answer::Busy };
        let mut question = Report::empty();
        let placed = {
            let here = CpuGuard::new();
            self.rings.local(&here).map(|mut ring| question.ask(&mut ring))
        };
        match placed {
            None => return Answer::Nothing,
            // Cannot be full, with no report under way.
            Some(false) => return Answer::Busy,
            Some(true) => {}
        }
        match self.wait(&mut question) {
            Err(_) => Answer::Lost,
            Ok(Tally { put_off: 1.., .. }) => Answer::Nothing,
            Ok(Tally { wanted, .. }) => Answer::Host { wanted },
        }
    }

    fn stats(&self) -> &Stats {
        self.rings.stats()
    }

    /// Places what there is room for; `None` if this CPU has no ring.
    fn place(&self, report: &mut Report<'_>, contents: Contents) -> Option<Placed> {
        let here = CpuGuard::new();
        let mut ring = self.rings.local(&here)?;
        Some(report.place(&mut ring, contents))
    }

    /// Hands everything over.
    ///
    /// # Errors
    ///
    /// `EAGAIN`: some of it has not been executed, and may be at another time.
    fn hand_over(&self, report: &mut Report<'_>) -> Result {
        let mut put_off = 0;
        while report.left() > 0 {
            if self.rings.is_ending() {
                return Err(EAGAIN);
            }
            self.rings.revive();
            let contents = self.contents();
            let tally = match self.place(report, contents) {
                Some(placed) => {
                    self.stats().add(Event::Page, placed.pages);
                    if report.left() > 0 {
                        self.stats().count(Event::Full);
                    }
                    if FAULT_REPORT_EARLY && report.left() == 0 {
                        return Ok(());
                    }
                    let begin = Instant::<Monotonic>::now();
                    self.stats().count(Event::Wait);
                    let waited = self.wait(report);
                    let us = begin.elapsed().as_micros_ceil();
                    self.stats().add(Event::WaitUs, us.unsigned_abs());
                    waited?
                }
                None => self.call(report, contents)?,
            };
            self.stats().add(Event::Range, u64::from(tally.calls - tally.declined));
            self.stats().add(Event::Declined, u64::from(tally.declined));
            put_off += tally.put_off + self.forget_flag(contents, tally.unknown);
        }
        if put_off > 0 {
            return Err(EAGAIN);
        }
        Ok(())
    }

    /// Waits until the host is done with what was placed. It comes by at any exit of the ring's CPU,
    /// and sleeping here makes for one if there is nothing else to do: then the sleep is short, as its end
    /// hardly interrupts anybody. Otherwise a tick ends it, which makes for no exit that there would not be.
    ///
    /// # Errors
    ///
    /// `EAGAIN`: the ring is dead.
    fn wait(&self, report: &mut Report<'_>) -> Result<Tally> {
        let begin = Instant::<Monotonic>::now();
        let mut quiet_since = begin;
        loop {
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
                Progress::Finished(tally) => return Ok(tally),
                Progress::Lost => {
                    self.stats().count(Event::Lost);
                    self.rings.verify();
                    return Err(EAGAIN);
                }
                Progress::Working => {}
            }
            let quarter = u32::try_from(begin.elapsed().as_micros_ceil() / 4);
            let pause = quarter.unwrap_or(u32::MAX).clamp(FIRST_PAUSE_US, LONGEST_PAUSE_US);
            if cpu_is_ours() {
                sleep_us(pause);
            } else {
                sleep_to_tick(pause);
            }
        }
    }

    /// Hands one range over without a ring.
    ///
    /// # Errors
    ///
    /// `EAGAIN`: the host takes none at the moment.
    fn call(&self, report: &mut Report<'_>, contents: Contents) -> Result<Tally> {
        self.stats().count(Event::Synchronous);
        match report.call_next(contents) {
            Ok(pages) => {
                self.stats().add(Event::Page, pages);
                Ok(Tally { calls: 1, ..Tally::default() })
            }
            Err(Some(e)) if e.is_put_off() => {
                self.stats().count(Event::Declined);
                Err(EAGAIN)
            }
            Err(e) => {
                let unknown = u32::from(e.is_some_and(HostError::is_argument));
                Ok(Tally { calls: 1, declined: 1, unknown, ..Tally::default() })
            }
        }
    }

    /// How long pages stay unreported this time.
    fn back_off(&self) -> Unreported {
        if self.rings.is_ending() {
            return Unreported::UntilFreed;
        }
        let ms = self.retry_ms.load(Relaxed);
        self.retry_ms.store(LONGEST_RETRY_MS.min(ms * 2), Relaxed);
        Unreported::For(ms)
    }
}

impl Reporter for FreePages {
    fn report(&self, report: &mut Report<'_>) -> Result<(), Unreported> {
        let bytes = report.bytes();
        self.pace.check().map_err(|ms| {
            self.stats().count(Event::Paced);
            Unreported::For(ms)
        })?;
        self.stats().count(Event::Report);
        let _turn = self.turn.lock();
        self.hand_over(report).map_err(|_| {
            self.stats().count(Event::Failed);
            self.back_off()
        })?;
        self.pace.spend(bytes);
        self.retry_ms.store(FIRST_RETRY_MS, Relaxed);
        Ok(())
    }
}

const _: () = assert!(PAGE_SIZE == kernel::page::PAGE_SIZE as u64);
