// SPDX-License-Identifier: GPL-2.0

//! One ring for each CPU: when there is one, and when another one is tried.

use dlh_abi::RingSize;
use kernel::{
    cpu::nr_cpu_ids,
    new_mutex, pr_warn_once,
    prelude::*,
    sync::{
        atomic::{
            ordering::{Acquire, Full, Release},
            Atomic,
        },
        Arc, Mutex,
    },
    time::{Instant, Monotonic},
};
use kvm_guest::{hypercall, CpuEvents, CpuGuard, LocalRing, NewRing, RebootEvents, RingTable};

use crate::stats::{Event, Stats};

/// Milliseconds between two attempts to give a CPU a ring.
const RETRY_MS: i64 = 5000;

/// The rings of this machine.
#[pin_data]
pub(crate) struct Rings {
    size: RingSize,
    table: RingTable,
    stats: Stats,
    /// This kernel ends: there are no rings any more.
    ending: Atomic<bool>,
    /// The host has lost a ring since somebody asked last.
    lost: Atomic<bool>,
    #[pin]
    control: Mutex<Control>,
}

struct Control {
    cpus: KVec<Cpu>,
}

/// What is known of a CPU.
#[derive(Clone, Copy, Default)]
struct Cpu {
    online: bool,
    /// When a ring was tried last.
    tried: Option<Instant<Monotonic>>,
}

impl Rings {
    /// No rings yet. May sleep.
    pub(crate) fn new(size: RingSize) -> Result<Arc<Self>> {
        let cpus = KVec::from_elem(Cpu::default(), nr_cpu_ids() as usize, GFP_KERNEL)?;
        Arc::pin_init(
            try_pin_init!(Self {
                size,
                table: RingTable::new()?,
                stats: Stats::new(),
                ending: Atomic::new(false),
                lost: Atomic::new(false),
                control <- new_mutex!(Control { cpus }),
            }),
            GFP_KERNEL,
        )
    }

    /// The statistics.
    pub(crate) fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Number of rings the host takes calls from.
    pub(crate) fn live(&self) -> usize {
        self.table.live()
    }

    /// Whether nothing is to be asked of the host any more.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Acquire)
    }

    /// The ring of this CPU, if it has one that works.
    #[inline]
    pub(crate) fn local<'a>(&self, here: &'a CpuGuard) -> Option<LocalRing<'a>> {
        self.table.local(here)
    }

    /// Puts an event into the host's trace: by way of the ring, or else by a call. May sleep.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the host has no trace.
    pub(crate) fn trace(&self, payload: [u64; 2]) -> Result {
        let deferred = {
            let here = CpuGuard::new();
            self.local(&here).is_some_and(|mut ring| ring.trace(payload))
        };
        if deferred {
            self.stats.count(Event::Traced);
            return Ok(());
        }
        self.stats.count(Event::Synchronous);
        hypercall::trace(payload).map_err(|_| ENODEV)
    }

    /// Whether this CPU has a ring that works; which CPU it is, if not.
    fn has_local(&self) -> Result<(), u32> {
        let here = CpuGuard::new();
        self.local(&here).map(drop).ok_or(here.cpu())
    }

    /// Gives the CPU that this runs on another ring if it has none that works, and none was tried a
    /// short while ago. May sleep.
    pub(crate) fn revive(&self) {
        if self.has_local().is_ok() {
            return;
        }
        let mut control = self.control.lock();
        // Another time, since this may be another CPU by now.
        let Err(cpu) = self.has_local() else { return };
        let Some(state) = control.cpus.get(cpu as usize) else { return };
        let due = state.tried.is_none_or(|tried| tried.elapsed().as_millis() >= RETRY_MS);
        if state.online && due {
            self.set_up(&mut control, cpu);
        }
    }

    /// The host has lost a ring: takes away all that it does not know any more. Where the guest has been
    /// restored or migrated these are all of them, and each would keep a report waiting. May sleep.
    pub(crate) fn verify(&self) {
        let _control = self.control.lock();
        for cpu in 0..nr_cpu_ids() {
            if self.table.get(cpu).is_some_and(|ring| !ring.is_known()) {
                self.tear_down(cpu);
                self.lost.store(true, Release);
            }
        }
    }

    /// Whether the host has lost a ring since this was asked last: it may be another host, and know nothing
    /// of what was reported.
    pub(crate) fn take_lost(&self) -> bool {
        self.lost.xchg(false, Full)
    }

    /// Gives `cpu` a new ring, if that is where this runs. May sleep.
    fn set_up(&self, control: &mut Control, cpu: u32) {
        if self.is_ending() {
            return;
        }
        let Some(state) = control.cpus.get_mut(cpu as usize) else { return };
        state.tried = Some(Instant::now());
        self.tear_down(cpu);
        let ring = NewRing::new(self.size);
        let here = CpuGuard::new();
        if here.cpu() != cpu {
            state.tried = None;
            drop(here);
            return;
        }
        let ring = match ring {
            Ok(ring) => ring.set_up(&here),
            Err(_) => {
                self.stats.count(Event::SetUpFailed);
                pr_warn_once!("no memory for the ring of a CPU\n");
                return;
            }
        };
        match ring.map(|ring| self.table.insert(ring)) {
            Ok(inserted) => {
                self.stats.count(Event::SetUp);
                drop(here);
                // Cannot be: the place was emptied above, and is filled under the lock only.
                drop(inserted);
            }
            Err(e) => {
                drop(here);
                self.stats.count(Event::SetUpFailed);
                pr_warn_once!("a CPU has no ring: {}\n", e);
            }
        }
    }

    /// Takes the ring of `cpu` away, if it has one. May sleep.
    fn tear_down(&self, cpu: u32) {
        if let Some(ring) = self.table.remove(cpu) {
            // Who waits for its calls may hold on to it, but need not wait any longer.
            ring.close();
        }
    }
}

impl CpuEvents for Rings {
    fn online(&self, cpu: u32) {
        let mut control = self.control.lock();
        if let Some(state) = control.cpus.get_mut(cpu as usize) {
            state.online = true;
        }
        self.set_up(&mut control, cpu);
    }

    fn offline(&self, cpu: u32) {
        let mut control = self.control.lock();
        if let Some(state) = control.cpus.get_mut(cpu as usize) {
            *state = Cpu::default();
        }
        self.tear_down(cpu);
    }
}

impl RebootEvents for Rings {
    /// What comes after this kernel uses the memory for something else.
    fn ending(&self) {
        self.ending.store(true, Release);
        let _control = self.control.lock();
        for cpu in 0..nr_cpu_ids() {
            self.tear_down(cpu);
        }
    }
}
