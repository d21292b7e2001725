// SPDX-License-Identifier: GPL-2.0

//! The merger of one VM: takes what was reported, joins neighbours, releases, and only then says so.

use dlh_abi::{Error as CallError, Gfn, GfnRange, Status};
use free_map::{coalesce, PageState};
use kernel::{
    fmt, new_mutex, new_spinlock,
    prelude::*,
    sync::{Arc, Mutex, SpinLock},
    time::{Instant, Monotonic},
};
use kvm_faults::FaultEvents;
use kvm_merge::{release, Mode, Verdict};
use kvm_ops::Token;
use kvm_vm::{SlotError, Vm, VmRef};
use kvm_worker::{Job, Pace};

use crate::{map::Map, stats::Stats};

/// Requests that may wait; more are declined, and the guest tries again later.
const MOST_WAITING: usize = 256;

/// Pages somebody waits for.
struct Request {
    frames: GfnRange,
    token: Token,
    /// Keeps the memslots' VM until its worker has looked.
    vm: VmRef,
}

/// The requests that wait.
///
/// # Invariants
///
/// `list` never grows beyond the capacity it was made with; none is added once `closed`.
struct Requests {
    list: KVec<Request>,
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
    pace: Pace,
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
    policy: Policy,
    /// What its times are counted from.
    began: Instant<Monotonic>,
    stats: Stats,
    #[pin]
    map: Map,
    #[pin]
    requests: SpinLock<Requests>,
    #[pin]
    batch: Mutex<Batch>,
}

impl Merger {
    /// A merger for one VM. May sleep.
    pub(crate) fn new(policy: Policy) -> Result<Arc<Self>> {
        let list = KVec::with_capacity(MOST_WAITING, GFP_KERNEL_ACCOUNT)?;
        let taken = KVec::with_capacity(MOST_WAITING, GFP_KERNEL_ACCOUNT)?;
        let runs = KVec::with_capacity(MOST_WAITING, GFP_KERNEL_ACCOUNT)?;
        Arc::pin_init(
            pin_init!(Self {
                policy,
                began: Instant::now(),
                stats: Stats::new(),
                map <- Map::new(),
                requests <- new_spinlock!(Requests { list, closed: false }),
                batch <- new_mutex!(Batch { taken, runs, pace: Pace::new() }),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// The free-page map.
    pub(crate) fn map(&self) -> &Map {
        &self.map
    }

    /// Accepts pages the guest does not use until `token` is completed, or gives the token back with
    /// the reason. On a thread of the VMM; may sleep.
    pub(crate) fn accept(
        &self,
        vm: &Vm,
        frames: GfnRange,
        token: Token,
    ) -> Result<(), (Token, CallError)> {
        if vm.has_assigned_devices() {
            self.stats.assigned();
            return Err((token, CallError::Refused));
        }
        // One range, one memslot: what does not fit is the guest's mistake.
        match vm.memslots().translate_all(frames) {
            Ok(_) => {}
            Err(SlotError::None) => return Err((token, CallError::Memory)),
            Err(kept) => {
                // Nothing to do for the worker: the guest's mistake, too, but a harmless one.
                self.stats.judged(frames.pages(), kept.into());
                return Err((token, CallError::Memory));
            }
        }
        let Some(vm) = vm.try_get() else { return Err((token, CallError::Gone)) };
        let mut requests = self.requests.lock();
        if requests.closed {
            return Err((token, CallError::Gone));
        }
        match requests.list.push_within_capacity(Request { frames, token, vm }) {
            Ok(()) => {
                self.stats.reported(frames.pages());
                Ok(())
            }
            Err(full) => {
                drop(requests);
                self.stats.busy();
                let Request { token, .. } = full.0;
                Err((token, CallError::Busy))
            }
        }
    }

    /// Accepts nothing more, and completes what waits as declined. May sleep.
    pub(crate) fn close(&self) {
        let list = {
            let mut requests = self.requests.lock();
            requests.closed = true;
            core::mem::take(&mut requests.list)
        };
        for Request { token, vm, .. } in list {
            token.complete(CallError::Gone.into());
            drop(vm);
        }
    }

    /// Writes `name value` lines.
    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.stats.show(f)?;
        self.map.show(f)
    }

    /// Milliseconds since it was made; wraps.
    fn now(&self) -> u32 {
        self.began.elapsed().as_millis() as u32
    }

    fn release(&self, vm: &Vm, frames: GfnRange) {
        self.stats.run();
        release(
            || vm.memslots(),
            frames,
            self.policy.mode,
            |part, verdict| {
                self.stats.judged(part.pages(), verdict);
                match verdict {
                    Verdict::Merged => self.map.merged(part, self.now()),
                    _ => self.map.set(part, PageState::Unknown),
                }
            },
        );
    }
}

impl Job for Merger {
    fn is_due(&self) -> bool {
        !self.requests.lock().list.is_empty()
    }

    fn work(&self) {
        let mut batch = self.batch.lock();
        let Batch { taken, runs, pace } = &mut *batch;
        core::mem::swap(&mut self.requests.lock().list, taken);
        let Some(vm) = taken.first().and_then(|request| request.vm.try_get()) else { return };
        {
            let slots = vm.memslots();
            self.map.forget_deleted(&slots);
            for request in taken.iter() {
                // Without memory for it the pages are merged all the same, and the map does not know.
                if self.map.reserve(&slots, request.frames).is_ok() {
                    self.map.set(request.frames, PageState::Reported);
                }
            }
        }
        for request in taken.iter() {
            // There is room for as many runs as for requests.
            let _ = runs.push_within_capacity(request.frames);
        }
        let kept = coalesce(runs);
        for frames in &runs[..kept] {
            self.release(&vm, *frames);
        }
        runs.clear();
        // Only now may the guest use any of them again (DESIGN.md rule 1).
        while let Some(Request { token, vm, .. }) = taken.pop() {
            token.complete(Status::OK);
            drop(vm);
        }
        drop(vm);
        pace.keep(self.policy.cpu_percent);
    }

    fn killed(&self) {
        self.close();
    }
}

impl FaultEvents for Merger {
    fn written(&self, gfn: Gfn, generation: u64) {
        if let Some(age) = self.map.written(gfn, generation, self.now()) {
            self.stats.came_back(age);
        }
    }
}
