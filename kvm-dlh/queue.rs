// SPDX-License-Identifier: GPL-2.0

//! The queue of one VM: where its calls are executed, and where their completion goes.

use dlh_abi::{Call, Operation, Status};
use kernel::{
    new_mutex,
    prelude::*,
    rbtree::RBTree,
    str::CString,
    sync::{Arc, Mutex},
};
use kvm_hooks::inline_atomic::{AtomicBool, Ordering};
use kvm_registry::{Calls, Contexts, Ended, Feed, Outcome, Registry};

use crate::{
    budget::Budget,
    caller::{Caller, INSERTED},
    inserted::Inserted,
    stats::Stats,
    trace,
};

/// A ring, as its VM's queue sees it: it is told which of its entries have ended.
pub(crate) trait Completes: Send + Sync + 'static {
    /// Pending entries are finished, the last first. May sleep, but not for the VMM.
    fn complete_all(&self, op: Operation, positions: impl Iterator<Item = u32>, status: Status);
}

/// Names a call in its VM: it goes out with a token and comes back when that is completed.
#[derive(Clone, Copy)]
struct CallId {
    feed: u32,
    position: u32,
    op: Operation,
}

impl CallId {
    fn pack(self) -> u64 {
        // Operation numbers are below 64, feeds below 2^24.
        u64::from(self.op.0) << 56 | u64::from(self.feed) << 32 | u64::from(self.position)
    }

    /// Whether two packed ones are of the same feed and operation.
    fn is_akin(one: u64, other: u64) -> bool {
        one >> 32 == other >> 32
    }

    fn unpack(id: u64) -> Self {
        Self {
            feed: (id >> 32) as u32 & INSERTED,
            position: id as u32,
            op: Operation((id >> 56) as u16),
        }
    }
}

/// The rings of one VM, by number.
type ById<R> = RBTree<u32, Arc<R>>;

/// The queue of one VM, whose rings are of the type `R`.
#[pin_data]
pub(crate) struct VmQueue<R: Completes> {
    serial: u64,
    name: CString,
    budget: Budget,
    registry: Arc<Registry<Self>>,
    dead: AtomicBool,
    stats: Stats,
    #[pin]
    contexts: Contexts,
    #[pin]
    rings: Mutex<ById<R>>,
    #[pin]
    inserted: Inserted,
}

impl<R: Completes> VmQueue<R> {
    /// A queue of VM number `serial`, shown under `name`, which reaches the operations of `registry`. May sleep.
    pub(crate) fn new(
        serial: u64,
        name: CString,
        budget: Budget,
        registry: &Arc<Registry<Self>>,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                serial,
                name,
                budget,
                registry: registry.clone(),
                dead: AtomicBool::new(false),
                stats: Stats::new(),
                contexts <- Contexts::new(),
                rings <- new_mutex!(RBTree::new()),
                inserted <- Inserted::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Its number: unlike the VM's address, never used again.
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    /// What its directory is called.
    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }

    /// What a drain may do before the vCPU goes on.
    #[inline]
    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Its statistics.
    #[inline]
    pub(crate) fn stats(&self) -> &Stats {
        &self.stats
    }

    /// What operations keep for it.
    pub(crate) fn contexts(&self) -> &Contexts {
        &self.contexts
    }

    /// Its rings.
    pub(crate) fn rings(&self) -> &Mutex<ById<R>> {
        &self.rings
    }

    /// The ring of this number.
    pub(crate) fn ring(&self, id: u32) -> Option<Arc<R>> {
        self.rings.lock().get(&id).cloned()
    }

    /// The calls that were inserted by a trap and have not come to their end.
    pub(crate) fn inserted(&self) -> &Inserted {
        &self.inserted
    }

    /// Whether KVM has destroyed the VM.
    #[inline]
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// KVM destroys the VM. Returns whether that is news. Any context.
    pub(crate) fn mark_dead(&self) -> bool {
        !self.dead.swap(true, Ordering::SeqCst)
    }

    /// Executes `call` if it is one of those that are built in. Does not sleep.
    pub(crate) fn execute_builtin(&self, caller: &Caller<'_>, call: &Call) -> Option<Status> {
        match call.op {
            Operation::NOP => Some(Status::OK),
            Operation::TRACE => {
                trace::emit(self.serial, caller, call.arg);
                Some(Status::OK)
            }
            _ => None,
        }
    }

    /// The way to the operations: none goes away until the result is dropped. May sleep.
    pub(crate) fn calls(&self) -> Calls<'_, Self> {
        self.registry.calls(&self.contexts)
    }

    /// Hands a call, the one at `position` of its feed, to its operation. On a thread of the VMM.
    #[inline]
    pub(crate) fn execute(
        self: &Arc<Self>,
        calls: &mut Calls<'_, Self>,
        caller: &Caller<'_>,
        call: &Call,
        position: u32,
    ) -> Outcome {
        let id = CallId { feed: caller.feed, position, op: call.op }.pack();
        calls.execute(caller.vcpu.vm(), call, self, id)
    }
}

impl<R: Completes> Feed for VmQueue<R> {
    fn complete_all(&self, calls: Ended<'_>, status: Status) {
        for calls in calls.chunk_by(CallId::is_akin) {
            let Some(first) = calls.ids().next().map(CallId::unpack) else { continue };
            let positions = calls.ids().map(|id| CallId::unpack(id).position);
            if first.feed == INSERTED {
                positions.for_each(|position| self.inserted.answer(position, status));
            } else if let Some(ring) = self.ring(first.feed) {
                ring.complete_all(first.op, positions, status);
            }
        }
    }
}
