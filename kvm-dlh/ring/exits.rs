// SPDX-License-Identifier: GPL-2.0

//! What leads to rings: exits of their vCPUs, returns of their threads to the VMM, and time.

use kernel::{
    new_mutex,
    prelude::*,
    sync::{rcu, Arc, Mutex},
    task::Task,
    time::Delta,
};
use kvm_hooks::{ExitProbes, Exits, Listening, Tick, Ticker};
use kvm_vm::Vcpu;
use rcu_table::{Reader, Table, Unlinked};

use super::Ring;

/// The links of rings in [`RingTables::by_vcpu`].
pub(super) const BY_VCPU: u64 = 0;
/// The links of rings in [`RingTables::by_task`].
pub(super) const BY_TASK: u64 = 1;

/// The rings of all VMs, as exits find them.
#[pin_data]
pub(crate) struct RingTables {
    /// For the exit path.
    #[pin]
    by_vcpu: Table<Ring, BY_VCPU>,
    /// By the thread that last ran their vCPU, for the return to the VMM.
    #[pin]
    by_task: Table<Ring, BY_TASK>,
    probes: Arc<ExitProbes<RingTables>>,
    /// Has vCPUs exit whose entries have waited for long, where nothing else does.
    #[pin]
    ticker: Mutex<Option<Ticker<RingTables>>>,
}

impl RingTables {
    /// No rings yet; exits are heard of by `probes`. May sleep.
    pub(crate) fn new(probes: Arc<ExitProbes<Self>>) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                by_vcpu <- Table::new(),
                by_task <- Table::new(),
                probes,
                ticker <- new_mutex!(None),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Starts a thread that looks at all rings once in `period`. May sleep.
    pub(crate) fn start_ticker(self: &Arc<Self>, period: Delta) -> Result {
        let ticker = Ticker::start(self.clone(), period)?;
        *self.ticker.lock() = Some(ticker);
        Ok(())
    }

    /// Whether there is such a thread. May sleep.
    pub(crate) fn has_ticker(&self) -> bool {
        self.ticker.lock().is_some()
    }

    /// No exit leads here any more, nor does time. All rings are closed. May sleep.
    pub(crate) fn close(&self) {
        let ticker = self.ticker.lock().take();
        drop(ticker);
        self.probes.close();
    }

    /// Has the host hear of exits. May sleep.
    pub(super) fn listen(self: &Arc<Self>) -> Result<Listening<Self>> {
        self.probes.listen(self)
    }

    /// Has exits of the ring's vCPU lead to it. May sleep.
    pub(crate) fn announce(&self, ring: &Arc<Ring>) -> Result {
        self.by_vcpu.insert(ring.vcpu().as_usize(), ring.clone())?;
        if let Some(ticker) = &*self.ticker.lock() {
            ticker.wake();
        }
        Ok(())
    }

    /// The ring's vCPU is run by another thread now. May sleep.
    pub(super) fn follow(&self, ring: &Arc<Ring>, task: usize) -> Result {
        self.by_task.insert(task, ring.clone())
    }

    /// The ring's vCPU is no longer run by the thread that it was run by. May sleep.
    pub(super) fn unfollow(&self, ring: &Ring) {
        drop(self.by_task.unlink(ring));
    }

    /// Nothing leads to the ring, which is closed, any more. May sleep.
    pub(super) fn forget(&self, ring: &Ring) {
        Unlinked::forget([self.by_vcpu.unlink(ring), self.by_task.unlink(ring)]);
    }

    /// Shows `look` the ring of a vCPU, if it has one. Any context.
    pub(crate) fn with_ring_of<T>(&self, vcpu: &Vcpu, look: impl FnOnce(&Ring) -> T) -> Option<T> {
        let guard = rcu::read_lock();
        self.by_vcpu.find(vcpu.key().as_usize(), Reader::of(&guard)).map(|ring| look(&ring))
    }

    #[inline(never)]
    fn exited_with_ring(&self, vcpu: &Vcpu, reader: Reader<'_>) {
        if let Some(ring) = self.by_vcpu.find(vcpu.key().as_usize(), reader) {
            Ring::exited(ring, vcpu, reader);
        }
    }
}

impl Exits for RingTables {
    #[inline(always)]
    fn exited(&self, vcpu: &Vcpu, reader: Reader<'_>) {
        // Where nothing is, this is all that an exit costs: a few instructions, without a stack frame.
        if !self.by_vcpu.is_vacant(vcpu.key().as_usize()) {
            self.exited_with_ring(vcpu, reader);
        }
    }

    fn left(&self) {
        let guard = rcu::read_lock();
        // A thread may run several vCPUs in turn.
        self.by_task.find_all(Task::current_raw() as usize, Reader::of(&guard), Ring::left);
    }
}

impl Tick for RingTables {
    fn tick(&self) -> bool {
        let mut any = false;
        let guard = rcu::read_lock();
        let reader = Reader::of(&guard);
        self.by_vcpu.for_each(reader, |ring| {
            any = true;
            ring.tick(reader);
        });
        any
    }
}
