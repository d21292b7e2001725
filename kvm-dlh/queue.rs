// SPDX-License-Identifier: GPL-2.0

//! The queue of one VM: its rings, its trap-inserted calls, and where both are executed.

use dlh_abi::{Call, Error as CallError, Operation, Status};
use kernel::{
    fmt, impl_has_work, new_condvar, new_mutex, new_work,
    prelude::*,
    rbtree::RBTree,
    sync::{
        atomic::{
            ordering::{Acquire, Full, Relaxed},
            Atomic,
        },
        Arc, CondVar, Mutex,
    },
    workqueue::{self, Work, WorkItem},
};
use kvm_registry::{Contexts, Feed, Outcome};
use kvm_vm::{Vcpu, Vm, VmKey};

use crate::{
    host::Host,
    ring::Ring,
    stats::{Event, Stats},
};

/// The feed number of trap-inserted calls; the others are ring numbers, below 4,096.
const INSERTED: u32 = u32::MAX;

/// The queue of one VM.
#[pin_data]
pub(crate) struct VmQueue {
    host: Arc<Host>,
    key: VmKey,
    serial: u64,
    pid: i32,
    dead: Atomic<bool>,
    stats: Stats,
    #[pin]
    contexts: Contexts,
    #[pin]
    rings: Mutex<RBTree<u32, Arc<Ring>>>,
    next_call: Atomic<u32>,
    #[pin]
    inserted: Mutex<KVec<Waiting>>,
    #[pin]
    answered: CondVar,
    #[pin]
    burial: Work<VmQueue>,
}

/// A trap-inserted call whose vCPU waits for it.
struct Waiting {
    call: u32,
    status: Option<Status>,
}

impl_has_work! {
    impl HasWork<Self> for VmQueue { self.burial }
}

impl VmQueue {
    /// A queue for `vm`. May sleep.
    pub(crate) fn new(host: &Arc<Host>, vm: &Vm, serial: u64) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                host: host.clone(),
                key: vm.key(),
                serial,
                pid: vm.pid(),
                dead: Atomic::new(false),
                stats: Stats::new(),
                contexts <- Contexts::new(),
                rings <- new_mutex!(RBTree::new()),
                next_call: Atomic::new(0),
                inserted <- new_mutex!(KVec::new()),
                answered <- new_condvar!(),
                burial <- new_work!("VmQueue::burial"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// The module.
    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Which VM this is.
    pub(crate) fn key(&self) -> VmKey {
        self.key
    }

    /// Its number: unlike the key, never used again.
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    /// The pid of its VMM.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Its statistics.
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
        self.dead.load(Acquire)
    }

    /// Executes a call of feed `feed` (a ring's number, or [`INSERTED`]). On a thread of the VMM.
    pub(crate) fn execute(
        self: &Arc<Self>,
        vm: &Vm,
        call: &Call,
        feed: u32,
        position: u32,
    ) -> Outcome {
        if call.op == Operation::NOP {
            return Outcome::Finished(Status::OK);
        }
        let id = u64::from(feed) << 32 | u64::from(position);
        self.host.registry().execute(&self.contexts, vm, call, self, id)
    }

    /// Executes a trap-inserted call to its end. On the vCPU's thread; may sleep.
    pub(crate) fn insert(self: &Arc<Self>, vm: &Vm, call: &Call) -> Result<Status, CallError> {
        self.stats.count(Event::Inserted);
        let number = self.next_call.fetch_add(1, Relaxed);
        self.inserted
            .lock()
            .push(Waiting { call: number, status: None }, GFP_KERNEL_ACCOUNT)
            .map_err(|_| CallError::NoMemory)?;
        self.stats.submitted(1);
        let outcome = self.execute(vm, call, INSERTED, number);
        let mut inserted = self.inserted.lock();
        let status = loop {
            let Some(place) = inserted.iter().position(|w| w.call == number) else {
                break Status::from(CallError::Gone);
            };
            let answer = match outcome {
                Outcome::Finished(status) => Some(status),
                Outcome::Pending => inserted[place].status,
            };
            if let Some(status) = answer {
                let _ = inserted.remove(place);
                break status;
            }
            self.answered.wait(&mut inserted);
        };
        drop(inserted);
        self.stats.ended(status);
        Ok(status)
    }

    /// The ring of this number.
    pub(crate) fn ring(&self, id: u32) -> Option<Arc<Ring>> {
        self.rings.lock().get(&id).cloned()
    }

    /// Adds a ring; there is none of that number.
    pub(crate) fn add_ring(&self, ring: Arc<Ring>) -> Result {
        self.rings.lock().try_create_and_insert(ring.id(), ring, GFP_KERNEL_ACCOUNT)?;
        self.stats.count(Event::RingSetUp);
        Ok(())
    }

    /// Detaches a ring and forgets it. May sleep.
    pub(crate) fn remove_ring(&self, id: u32, vcpu: Option<&Vcpu>) -> bool {
        let Some(ring) = self.ring(id) else { return false };
        ring.close(vcpu);
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
        true
    }

    /// Detaches all rings. May sleep.
    pub(crate) fn remove_all_rings(&self) {
        loop {
            let first = self.rings.lock().iter().next().map(|(id, _)| *id);
            match first {
                Some(id) => self.remove_ring(id, None),
                None => break,
            };
        }
    }

    /// KVM destroys the VM. Must not sleep: the rest is done by a work.
    pub(crate) fn mark_dead(this: Arc<Self>) {
        // Another VM at the same address, without a queue, may end before this one is buried.
        if this.dead.xchg(true, Full) {
            return;
        }
        this.host.burial_begins();
        // Never refused: it is queued once in the life of a VM.
        let _ = workqueue::system_long().enqueue(this);
    }

    /// One line a ring.
    pub(crate) fn show_rings(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, ring) in self.rings.lock().iter() {
            write!(f, "{id} ")?;
            ring.show_state(f)?;
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
    fn complete(this: Arc<Self>, call: u64, status: Status) {
        let (feed, position) = ((call >> 32) as u32, call as u32);
        if feed != INSERTED {
            if let Some(ring) = this.ring(feed) {
                ring.complete(position, status);
            }
            return;
        }
        let mut inserted = this.inserted.lock();
        if let Some(waiting) = inserted.iter_mut().find(|w| w.call == position) {
            waiting.status = Some(status);
        }
        this.answered.notify_all();
    }
}
