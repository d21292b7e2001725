// SPDX-License-Identifier: GPL-2.0

//! The merger of one VM: takes what was reported, joins neighbours, releases, and only then says so.

use core::ops::Range;

use dlh_abi::{Contents, Error as CallError, Gfn, GfnRange};
use free_map::{coalesce, extend, PageState};
use kernel::{
    fmt, new_mutex, new_spinlock,
    prelude::*,
    sync::{Arc, Mutex, SpinLock},
    time::{Instant, Monotonic},
};
use kvm_control::{Allow, Asked, Permission};
use kvm_faults::FaultEvents;
use kvm_merge::{release, Mode, Patience, Terms, Verdict};
use kvm_ops::Token;
use kvm_vm::{Memslots, SlotError, Span, Vm, VmRef};
use kvm_worker::{Job, Pace, Turn};

use crate::{
    again::Again,
    map::Map,
    refilled::Refilled,
    requests::{Request, Requests},
    stats::Stats,
};

/// Requests that may wait; more are declined, and the guest tries again later.
const MOST_WAITING: usize = 256;
/// Pages of them together: 1 GiB, as many as Linux guests lend in eight reports. So much is taken on at once, and
/// whoever waits for a request waits for no more than twice that. A larger request is accepted only when there is no other.
const MOST_PAGES: u64 = 1 << 18;

/// The requests that wait.
///
/// # Invariants
///
/// `requests` has room for [`MOST_WAITING`] until `closed`, and has `pages` pages; it is empty once `closed`. `vm` is
/// `Some` while there are any, and `None` once `closed`.
struct Waiting {
    requests: Requests,
    pages: u64,
    /// Keeps the VM until its worker has looked.
    vm: Option<VmRef>,
    closed: bool,
}

/// What the worker works on.
///
/// # Invariants
///
/// Both have room for [`MOST_WAITING`]; `taken` is exchanged with [`Waiting::requests`].
struct Batch {
    taken: Requests,
    runs: KVec<GfnRange>,
}

/// How to merge: the parameters of the module.
#[derive(Clone, Copy)]
pub(crate) struct Policy {
    pub(crate) mode: Mode,
    /// Share of one CPU that a VM's worker may use.
    pub(crate) cpu_percent: u32,
}

/// The merger.
#[pin_data]
pub(crate) struct Merger {
    allow: Arc<Allow>,
    mode: Mode,
    pace: Pace,
    /// What its times are counted from.
    began: Instant<Monotonic>,
    stats: Stats,
    again: Again,
    refilled: Refilled,
    #[pin]
    map: Map,
    #[pin]
    waiting: SpinLock<Waiting>,
    #[pin]
    batch: Mutex<Batch>,
}

impl Merger {
    /// A merger for one VM. May sleep.
    pub(crate) fn new(policy: Policy, allow: Arc<Allow>) -> Result<Arc<Self>> {
        let requests = Requests::with_capacity(MOST_WAITING)?;
        let taken = Requests::with_capacity(MOST_WAITING)?;
        let runs = KVec::with_capacity(MOST_WAITING, GFP_KERNEL_ACCOUNT)?;
        Arc::pin_init(
            pin_init!(Self {
                allow,
                mode: policy.mode,
                pace: Pace::new(policy.cpu_percent),
                began: Instant::now(),
                stats: Stats::new(),
                again: Again::new(),
                refilled: Refilled::new(),
                map <- Map::new(),
                waiting <- new_spinlock!(Waiting { requests, pages: 0, vm: None, closed: false }),
                batch <- new_mutex!(Batch { taken, runs }),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// The free-page map.
    pub(crate) fn map(&self) -> &Map {
        &self.map
    }

    /// The guest asks whether it is to report all that is free once more. On a thread of the VMM; may sleep.
    pub(crate) fn answer(&self) -> bool {
        let now = self.began.elapsed().as_millis();
        self.again.answer(now, || self.refilled.is_much(&self.map))
    }

    /// Whether anything of the VM's memory may be given up now. Any thread; may sleep.
    fn may_release(&self) -> bool {
        self.allow.permission() != Permission::Nothing
    }

    /// Requests of the VM are declined because root does not allow it.
    fn declined_by_policy(&self, requests: u64) {
        self.stats.policy(requests);
    }

    /// Accepts pages the guest does not use until `token` is completed, or gives the token back with
    /// the reason. Returns whether the worker is to be woken. On a thread of the VMM; may sleep.
    pub(crate) fn accept(
        &self,
        vm: &Vm,
        frames: GfnRange,
        contents: Contents,
        token: Token,
    ) -> Result<bool, (Token, CallError)> {
        let mut waiting = self.waiting.lock();
        let mut first = waiting.requests.is_empty();
        if first {
            drop(waiting);
            // Of those that join others the worker asks, as it does of all before it gives anything up.
            if !self.may_release() {
                self.declined_by_policy(1);
                // For now: root may think better of it.
                return Err((token, CallError::Busy));
            }
            waiting = self.waiting.lock();
            first = waiting.requests.is_empty();
            if first && self.pace.is_exhausted() {
                drop(waiting);
                self.stats.busy();
                return Err((token, CallError::Busy));
            }
            if first && !waiting.closed {
                waiting.vm = vm.try_get();
            }
            if waiting.vm.is_none() {
                return Err((token, CallError::Gone));
            }
        }
        // Never overflows: a range has less than 2^52 pages, and all but the first less than the bound.
        let pages = waiting.pages + frames.pages();
        let added = if first || pages <= MOST_PAGES {
            waiting.requests.push(frames, contents, token)
        } else {
            Err(token)
        };
        match added {
            Ok(()) => {
                waiting.pages = pages;
                // Those after the first are found by whom it has woken.
                Ok(first)
            }
            Err(token) => {
                drop(waiting);
                self.stats.busy();
                Err((token, CallError::Busy))
            }
        }
    }

    /// Accepts nothing more, and completes what waits as declined. May sleep.
    pub(crate) fn close(&self) {
        let (requests, vm) = {
            let mut waiting = self.waiting.lock();
            waiting.closed = true;
            waiting.pages = 0;
            (core::mem::replace(&mut waiting.requests, Requests::none()), waiting.vm.take())
        };
        // Before those who wait hear of it: mostly they have it as well, and this is not the last reference.
        drop(vm);
        // Declined, as all that is dropped.
        drop(requests);
    }

    /// Writes `name value` lines.
    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.stats.show(f)?;
        self.map.show(f)?;
        writeln!(f, "map_refilled {}", self.refilled.count(&self.map))?;
        writeln!(f, "asked_again {}", self.again.told())
    }

    /// Milliseconds since it was made; wraps.
    fn now(&self) -> u32 {
        self.began.elapsed().as_millis() as u32
    }

    /// Finds out what of `taken`, which has `pages` pages, is to be released, and fills `runs` with that. Returns what
    /// the guest relies on finding there: runs have parts of several requests, so what one of them relies on goes for
    /// all. On the worker.
    fn choose(
        &self,
        slots: &Memslots<'_>,
        taken: &mut [Request],
        pages: u64,
        runs: &mut KVec<GfnRange>,
    ) -> Contents {
        self.stats.reported(taken.len() as u64, pages);
        let assigned = slots.vm().has_assigned_devices();
        let mut check = Check { slots, assigned, last: None };
        let mut contents = Contents::Any;
        for request in taken {
            if request.contents == Contents::Zeroes {
                contents = Contents::Zeroes;
            }
            match check.check(request.frames, &self.stats) {
                Ok(()) if runs.last_mut().is_some_and(|last| extend(last, request.frames)) => {}
                // There is room for as many runs as for requests.
                Ok(()) => drop(runs.push_within_capacity(request.frames)),
                Err(e) => request.status = e.into(),
            }
        }
        contents
    }

    /// Notes in the map that `runs` are free. On the worker; may sleep.
    fn note(&self, slots: &Memslots<'_>, runs: &[GfnRange]) {
        self.map.forget_deleted(slots);
        for frames in runs {
            // Without memory for it the pages are merged all the same, and the map does not know.
            let _ = self.map.reported(slots, *frames);
        }
    }

    /// Releases `runs` of what was `taken`; those who are better reported again are told so. Returns whether it has come
    /// to the end. On the worker; may sleep.
    fn release(&self, with: With<'_>, taken: &mut [Request], runs: &[GfnRange]) -> bool {
        let With { turn, vm, contents } = with;
        let now = self.now();
        let mut passing = Passing::default();
        self.stats.runs(runs.len() as u64);
        let at_end = release(
            turn,
            &mut Patience::new(),
            // Root may change its mind.
            || self.terms(contents),
            // Devices may be assigned at any time, and pin the memory then.
            || (!vm.has_assigned_devices()).then(|| vm.memslots()),
            runs,
            |part, verdict| {
                self.stats.judged(part.pages(), verdict);
                // What passes sooner is declined, and reported again by itself.
                if verdict == Verdict::Pinned {
                    self.again.kept();
                }
                match verdict {
                    Verdict::Merged => self.map.merged(part, now),
                    _ => self.map.set(part, PageState::Unknown),
                }
                if verdict == Verdict::Hugetlb {
                    let declined = decline(part.start()..part.end(), taken);
                    self.declined_by_policy(declined);
                }
                if verdict.is_passing() {
                    passing.add(part, taken);
                }
            },
        );
        passing.decline(taken);
        at_end
    }

    /// What may be released now, and how. On the worker; may sleep.
    fn terms(&self, contents: Contents) -> Option<Terms> {
        let hugetlb = match self.allow.permission() {
            Permission::Nothing => return None,
            Permission::Ordinary => false,
            Permission::All => true,
        };
        Some(Terms { mode: self.mode, hugetlb, contents })
    }
}

/// Declines those of `taken` that name one of `frames`, for now; returns how many that were not declined before.
fn decline(frames: Range<Gfn>, taken: &mut [Request]) -> u64 {
    let mut declined = 0;
    for Request { frames: named, status, .. } in taken {
        if status.is_ok() && named.start() < frames.end && frames.start < named.end() {
            *status = CallError::Busy.into();
            declined += 1;
        }
    }
    declined
}

/// Neighbours that were kept for what passes, and are declined together.
#[derive(Default)]
struct Passing(Option<Range<Gfn>>);

impl Passing {
    fn add(&mut self, part: GfnRange, taken: &mut [Request]) {
        match &mut self.0 {
            Some(frames) if frames.end == part.start() => frames.end = part.end(),
            _ => {
                self.decline(taken);
                self.0 = Some(part.start()..part.end());
            }
        }
    }

    fn decline(&mut self, taken: &mut [Request]) {
        if let Some(frames) = self.0.take() {
            decline(frames, taken);
        }
    }
}

/// What the worker has for a batch.
struct With<'a> {
    turn: &'a mut Turn,
    vm: &'a Vm,
    /// What the guest relies on finding there afterwards.
    contents: Contents,
}

/// What can be said of a request before anything is released.
struct Check<'a> {
    slots: &'a Memslots<'a>,
    assigned: bool,
    /// The memslot that was looked up last.
    last: Option<Span>,
}

impl Check<'_> {
    /// One range, one memslot: what does not fit is the guest's mistake.
    #[inline]
    fn check(&mut self, frames: GfnRange, stats: &Stats) -> Result<(), CallError> {
        if self.assigned {
            stats.assigned();
            return Err(CallError::Refused);
        }
        let holds = |slot: &Span| {
            slot.frames.start() <= frames.start() && frames.end() <= slot.frames.end()
        };
        if self.last.as_ref().is_some_and(holds) {
            return Ok(());
        }
        match self.slots.translate_all(frames) {
            Ok(_) => {
                self.last = self.slots.slot_of(frames.start()).ok();
                Ok(())
            }
            Err(SlotError::None) => Err(CallError::Memory),
            Err(kept) => {
                // The guest's mistake, too, but a harmless one.
                stats.judged(frames.pages(), kept.into());
                Err(CallError::Memory)
            }
        }
    }
}

impl Job for Merger {
    fn is_due(&self) -> bool {
        !self.waiting.lock().requests.is_empty()
    }

    fn work(&self, turn: &mut Turn) {
        let mut batch = self.batch.lock();
        let Batch { taken, runs } = &mut *batch;
        let (pages, vm) = {
            let mut waiting = self.waiting.lock();
            core::mem::swap(&mut waiting.requests, taken);
            (core::mem::take(&mut waiting.pages), waiting.vm.take())
        };
        let Some(vm) = vm else { return };
        let (contents, kept) = {
            let slots = vm.memslots();
            let contents = self.choose(&slots, taken.all(), pages, runs);
            let kept = if runs.len() > 1 { coalesce(runs) } else { runs.len() };
            self.note(&slots, &runs[..kept]);
            (contents, kept)
        };
        let with = With { turn: &mut *turn, vm: &vm, contents };
        if !self.release(with, taken.all(), &runs[..kept]) {
            // Some of it is as it was. The guest is to report all of it again.
            for frames in &runs[..kept] {
                self.map.set(*frames, PageState::Unknown);
            }
            let mut declined = 0;
            for request in taken.all().iter_mut().filter(|request| request.status.is_ok()) {
                request.status = CallError::Busy.into();
                declined += 1;
            }
            if !self.may_release() {
                self.declined_by_policy(declined);
            }
        }
        runs.clear();
        // Before those who wait hear of it: mostly they have it as well, and this is not the last reference.
        drop(vm);
        // Only now may the guest use any of them again (DESIGN.md rule 1).
        // Inside, the guest sees it at once.
        let inside = turn.enter();
        taken.complete();
        drop(inside);
        self.pace.worked();
    }
}

impl Asked for Merger {
    fn again(&self) {
        self.again.want();
    }
}

impl FaultEvents for Merger {
    fn written(&self, gfn: Gfn, generation: u64) {
        if let Some(age) = self.map.written(gfn, generation, self.now()) {
            self.stats.came_back(age);
        }
    }
}
