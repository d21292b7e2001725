// SPDX-License-Identifier: GPL-2.0

//! The queue of one VM: its rings, and where its calls are executed.

use dlh_abi::{Call, Operation, Status};
use kernel::{
    fmt, impl_has_work, new_mutex, new_spinlock, new_work,
    prelude::*,
    rbtree::{RBTree, RBTreeNode},
    str::CString,
    sync::{Arc, ArcBorrow, Mutex, SpinLock},
    workqueue::{Work, WorkItem},
};
use kvm_hooks::{
    inline_atomic::{AtomicBool, AtomicU32, Ordering},
    Killed,
};
use kvm_registry::{Calls, Contexts, Ended, Feed, Outcome};
use kvm_vm::Vcpu;
use rcu_table::{impl_linked, Link};

use crate::{
    host::{Host, BY_VM},
    inserted::Inserted,
    ring::Ring,
    stats::{Event, Stats},
    trace,
};

/// The feed number of trap-inserted calls; the others are ring numbers, below 4,096.
pub(crate) const INSERTED: u32 = 0xff_ffff;

/// Who makes a call, and from where.
pub(crate) struct Caller<'a> {
    /// The vCPU whose thread this is.
    pub(crate) vcpu: &'a Vcpu,
    /// The number that the VMM gave the vCPU that made the call.
    pub(crate) vcpu_id: u32,
    /// Its ring's number, or [`INSERTED`].
    pub(crate) feed: u32,
    /// The lower half of the guest's time-stamp counter at the call, if known.
    pub(crate) time: Option<u32>,
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

/// The queue of one VM.
#[pin_data]
pub(crate) struct VmQueue {
    host: Arc<Host>,
    serial: u64,
    name: CString,
    dead: AtomicBool,
    stats: Stats,
    #[pin]
    contexts: Contexts,
    #[pin]
    rings: Mutex<RBTree<u32, Arc<Ring>>>,
    next_call: AtomicU32,
    #[pin]
    inserted: SpinLock<Inserted>,
    #[pin]
    burial: Work<VmQueue>,
    by_vm: Link<VmQueue>,
}

impl_linked! {
    impl Linked<BY_VM> for VmQueue { self.by_vm }
}

impl_has_work! {
    impl HasWork<Self> for VmQueue { self.burial }
}

impl VmQueue {
    /// A queue of a VM, shown under `name`. May sleep.
    pub(crate) fn new(host: &Arc<Host>, serial: u64, name: CString) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                host: host.clone(),
                serial,
                name,
                dead: AtomicBool::new(false),
                stats: Stats::new(),
                contexts <- Contexts::new(),
                rings <- new_mutex!(RBTree::new()),
                next_call: AtomicU32::new(0),
                inserted <- new_spinlock!(Inserted::new()),
                burial <- new_work!("VmQueue::burial"),
                by_vm: Link::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// The module.
    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Its number: unlike the VM's address, never used again.
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    /// What its directory is called.
    pub(crate) fn name(&self) -> &CStr {
        &self.name
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

    /// Whether KVM has destroyed the VM.
    #[inline]
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
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
        self.host.registry().calls(&self.contexts)
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

    /// The calls that were inserted by a trap and have not come to their end.
    pub(crate) fn inserted(&self) -> &SpinLock<Inserted> {
        &self.inserted
    }

    /// A number for a call that is inserted by a trap.
    pub(crate) fn next_call(&self) -> u32 {
        self.next_call.fetch_add(1, Ordering::Relaxed)
    }

    /// The ring of this number.
    pub(crate) fn ring(&self, id: u32) -> Option<Arc<Ring>> {
        self.rings.lock().get(&id).cloned()
    }

    /// Adds a ring; there is none of that number.
    pub(crate) fn add_ring(&self, ring: Arc<Ring>) -> Result {
        // Its place is made outside of the lock: a VMM at its memory's limit must not keep readers waiting.
        let node = RBTreeNode::new(ring.id(), ring, GFP_KERNEL_ACCOUNT)?;
        let former = self.rings.lock().insert(node);
        drop(former);
        self.stats.count(Event::RingSetUp);
        Ok(())
    }

    /// Detaches a ring and forgets it. May sleep; on the thread of `vcpu`, or without one.
    ///
    /// # Errors
    ///
    /// The thread of `vcpu` is being killed. The ring is detached, and may be worked on.
    pub(crate) fn remove_ring(&self, id: u32, vcpu: Option<&Vcpu>) -> Result<bool, Killed> {
        let Some(ring) = self.ring(id) else { return Ok(false) };
        ring.close(vcpu.is_some())?;
        if let Some(vcpu) = vcpu {
            ring.retire(vcpu.vm());
        }
        self.host.forget_ring(&ring);
        let removed = {
            let mut rings = self.rings.lock();
            // Its vCPU may have set up another one meanwhile.
            match rings.get(&id) {
                Some(found) if Arc::ptr_eq(found, &ring) => rings.remove(&id),
                _ => None,
            }
        };
        drop(removed);
        Ok(true)
    }

    /// Detaches all rings. May sleep.
    pub(crate) fn remove_all_rings(&self) {
        loop {
            let first = self.rings.lock().iter().next().map(|(id, _)| *id);
            match first {
                // Nobody kills whom no vCPU is given.
                Some(id) => drop(self.remove_ring(id, None)),
                None => break,
            }
        }
    }

    /// KVM destroys the VM. Must not sleep: the rest is done by a work.
    pub(crate) fn mark_dead(this: ArcBorrow<'_, Self>) {
        // Another VM at the same address, without a queue, may end before this one is buried. Nothing is
        // counted then: the last count must not be dropped here, where nothing may sleep.
        if !this.dead.swap(true, Ordering::SeqCst) {
            // Never refused: it is queued once in the life of a VM.
            let _ = this.host.works().enqueue::<Arc<Self>, 0>(this.into());
        }
    }

    /// The ring with the lowest number not below `from`.
    fn next_ring(&self, from: u32) -> Option<Arc<Ring>> {
        let rings = self.rings.lock();
        let cursor = rings.cursor_lower_bound(&from)?;
        let (_, ring) = cursor.current();
        Some(ring.clone())
    }

    /// One line a ring. May sleep.
    pub(crate) fn show_rings(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not under the lock: a reader's memory is allocated meanwhile.
        let mut from = 0;
        while let Some(ring) = self.next_ring(from) {
            write!(f, "{} ", ring.id())?;
            ring.show_state(f)?;
            from = ring.id() + 1;
        }
        Ok(())
    }
}

impl WorkItem for VmQueue {
    type Pointer = Arc<VmQueue>;

    fn run(this: Arc<VmQueue>) {
        let host = this.host.clone();
        host.bury(this);
    }
}

impl Feed for VmQueue {
    fn complete_all(&self, calls: Ended<'_>, status: Status) {
        for calls in calls.chunk_by(CallId::is_akin) {
            let Some(first) = calls.ids().next().map(CallId::unpack) else { continue };
            let positions = calls.ids().map(|id| CallId::unpack(id).position);
            if first.feed == INSERTED {
                positions.for_each(|position| self.answer(position, status));
            } else if let Some(ring) = self.ring(first.feed) {
                ring.complete_all(first.op, positions, status);
            }
        }
    }
}
