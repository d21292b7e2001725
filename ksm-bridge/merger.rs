// SPDX-License-Identifier: GPL-2.0

//! The merger of one VM: takes what was reported, joins neighbours, releases, and only then says so.

use dlh_abi::{Contents, Error as CallError, Gfn, GfnRange, Status};
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
use kvm_ops::{complete_all, Token};
use kvm_vm::{Memslots, SlotError, Span, Vm, VmRef};
use kvm_worker::{Job, Pace, Turn};

use crate::{again::Again, map::Map, refilled::Refilled, stats::Stats};

/// Requests that may wait; more are declined, and the guest tries again later.
const MOST_WAITING: usize = 256;
/// Pages of them together: 1 GiB, as many as Linux guests lend in eight reports. So much is taken on at once, and
/// whoever waits for a request waits for no more than twice that. A larger request is accepted only when there is no other.
const MOST_PAGES: u64 = 1 << 18;

/// Pages somebody waits for.
struct Request {
    frames: GfnRange,
    contents: Contents,
    token: Token,
    /// What is said in the end.
    status: Status,
}

/// The requests that wait.
///
/// # Invariants
///
/// `list` never grows beyond the capacity it was made with, and has `pages` pages; none is added once `closed`. `vm` is
/// `Some` while there are any.
struct Requests {
    list: KVec<Request>,
    pages: u64,
    /// Keeps the VM until its worker has looked.
    vm: Option<VmRef>,
    closed: bool,
}

/// What the worker works on.
///
/// # Invariants
///
/// Both have room for [`MOST_WAITING`]; `taken` is exchanged with `Requests::list`.
struct Batch {
    taken: KVec<Request>,
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
    requests: SpinLock<Requests>,
    #[pin]
    batch: Mutex<Batch>,
}

impl Merger {
    /// A merger for one VM. May sleep.
    pub(crate) fn new(policy: Policy, allow: Arc<Allow>) -> Result<Arc<Self>> {
        let list = KVec::with_capacity(MOST_WAITING, GFP_KERNEL_ACCOUNT)?;
        let taken = KVec::with_capacity(MOST_WAITING, GFP_KERNEL_ACCOUNT)?;
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
                requests <- new_spinlock!(Requests { list, pages: 0, vm: None, closed: false }),
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
        if !self.may_release() {
            self.declined_by_policy(1);
            // For now: root may think better of it.
            return Err((token, CallError::Busy));
        }
        let mut requests = self.requests.lock();
        if requests.closed {
            return Err((token, CallError::Gone));
        }
        let first = requests.list.is_empty();
        if first {
            if self.pace.is_exhausted() {
                drop(requests);
                self.stats.busy();
                return Err((token, CallError::Busy));
            }
            requests.vm = vm.try_get();
        }
        if requests.vm.is_none() {
            return Err((token, CallError::Gone));
        }
        // Never overflows: a range has less than 2^52 pages, and all but the first less than the bound.
        let pages = requests.pages + frames.pages();
        let request = Request { frames, contents, token, status: Status::OK };
        let left_over = if first || pages <= MOST_PAGES {
            requests.list.push_within_capacity(request).err().map(|full| full.0)
        } else {
            Some(request)
        };
        match left_over {
            None => {
                requests.pages = pages;
                // Those after the first are found by whom it has woken.
                Ok(first)
            }
            Some(Request { token, .. }) => {
                drop(requests);
                self.stats.busy();
                Err((token, CallError::Busy))
            }
        }
    }

    /// Accepts nothing more, and completes what waits as declined. May sleep.
    pub(crate) fn close(&self) {
        let (list, vm) = {
            let mut requests = self.requests.lock();
            requests.closed = true;
            (core::mem::take(&mut requests.list), requests.vm.take())
        };
        // Before those who wait hear of it: mostly they have it as well, and this is not the last reference.
        drop(vm);
        for Request { token, .. } in list {
            token.complete(CallError::Gone.into());
        }
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

    /// Finds out what of `taken` is to be released, and fills `runs` with that. On the worker.
    fn choose(&self, vm: &Vm, taken: &mut [Request], runs: &mut KVec<GfnRange>) {
        let slots = vm.memslots();
        let pages = taken.iter().map(|request| request.frames.pages()).sum();
        self.stats.reported(taken.len() as u64, pages);
        let mut check = Check { slots: &slots, assigned: vm.has_assigned_devices(), last: None };
        for request in taken {
            match check.check(request.frames, &self.stats) {
                Ok(()) if runs.last_mut().is_some_and(|last| extend(last, request.frames)) => {}
                // There is room for as many runs as for requests.
                Ok(()) => drop(runs.push_within_capacity(request.frames)),
                Err(e) => request.status = e.into(),
            }
        }
    }

    /// Notes in the map that `runs` are free. On the worker; may sleep.
    fn note(&self, vm: &Vm, runs: &[GfnRange]) {
        let slots = vm.memslots();
        self.map.forget_deleted(&slots);
        for frames in runs {
            // Without memory for it the pages are merged all the same, and the map does not know.
            let _ = self.map.reported(&slots, *frames);
        }
    }

    /// Releases a run of what was `taken`; those who are better reported again are told so. Returns whether it has come
    /// to the end. On the worker; may sleep.
    fn release(&self, with: &mut With<'_>, taken: &mut [Request], frames: GfnRange) -> bool {
        let With { turn, patience, vm, contents, now } = with;
        let mut passing: Option<(Gfn, Gfn)> = None;
        self.stats.run();
        let at_end = release(
            turn,
            patience,
            // Root may change its mind.
            || self.terms(*contents),
            // Devices may be assigned at any time, and pin the memory then.
            || (!vm.has_assigned_devices()).then(|| vm.memslots()),
            frames,
            |part, verdict| {
                self.stats.judged(part.pages(), verdict);
                // What passes sooner is declined, and reported again by itself.
                if verdict == Verdict::Pinned {
                    self.again.kept();
                }
                match verdict {
                    Verdict::Merged => self.map.merged(part, *now),
                    _ => self.map.set(part, PageState::Unknown),
                }
                if verdict == Verdict::Hugetlb {
                    self.decline(part, taken);
                }
                if verdict.is_passing() {
                    let first = passing.map_or(part.start(), |(first, _)| first);
                    passing = Some((first, part.end()));
                }
            },
        );
        if let Some((first, end)) = passing {
            // Parts come in ascending order. What lies between two of these is reported again as well.
            for request in taken {
                let Request { frames, status, .. } = request;
                if frames.start() < end && first < frames.end() && status.is_ok() {
                    *status = CallError::Busy.into();
                }
            }
        }
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

    /// Declines those of `taken` that name a page of `part`, for now: root may think better of it.
    fn decline(&self, part: GfnRange, taken: &mut [Request]) {
        for Request { frames, status, .. } in taken {
            if status.is_ok() && frames.start() < part.end() && part.start() < frames.end() {
                *status = CallError::Busy.into();
                self.declined_by_policy(1);
            }
        }
    }
}

/// What the worker has for a batch.
struct With<'a> {
    turn: &'a mut Turn,
    patience: Patience,
    vm: &'a Vm,
    /// What the guest relies on finding there afterwards.
    contents: Contents,
    /// When it began.
    now: u32,
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
        !self.requests.lock().list.is_empty()
    }

    fn work(&self, turn: &mut Turn) {
        let mut batch = self.batch.lock();
        let Batch { taken, runs } = &mut *batch;
        let vm = {
            let mut requests = self.requests.lock();
            core::mem::swap(&mut requests.list, taken);
            requests.pages = 0;
            requests.vm.take()
        };
        let Some(vm) = vm else { return };
        self.choose(&vm, taken, runs);
        let kept = if runs.len() > 1 { coalesce(runs) } else { runs.len() };
        self.note(&vm, &runs[..kept]);
        // Runs have parts of several requests: what one of them relies on goes for all.
        let any = taken.iter().all(|request| request.contents == Contents::Any);
        let contents = if any { Contents::Any } else { Contents::Zeroes };
        let mut with = With {
            turn: &mut *turn,
            patience: Patience::new(),
            vm: &vm,
            contents,
            now: self.now(),
        };
        if !runs[..kept].iter().all(|frames| self.release(&mut with, taken, *frames)) {
            // Some of it is as it was. The guest is to report all of it again.
            for frames in &runs[..kept] {
                self.map.set(*frames, PageState::Unknown);
            }
            let mut declined = 0;
            for request in taken.iter_mut().filter(|request| request.status.is_ok()) {
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
        // The last first: each ring moves on in one step. Inside, the guest sees it at once.
        let last_first = core::iter::from_fn(|| taken.pop());
        let inside = turn.enter();
        complete_all(last_first.map(|request| (request.token, request.status)));
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
