// SPDX-License-Identifier: GPL-2.0

//! Which VMs there are: their queues, from the first contact or KVM_CREATE_VM to the burial.

use dlh_abi::Error as CallError;
use kernel::{
    impl_has_work, new_mutex, new_work,
    prelude::*,
    rbtree::{RBTree, RBTreeNode},
    sync::{
        atomic::{
            ordering::{Acquire, Relaxed, Release},
            Atomic,
        },
        barrier::{smp_mb, Full},
        rcu, Arc, ArcBorrow, Mutex,
    },
    workqueue::{Work, WorkItem},
};
use kvm_registry::{Contexts, Owner, Registry};
use kvm_vm::{Vcpu, Vm, VmKey};
use own_work::OwnQueue;
use rcu_table::{impl_linked, Link, Reader, Table};

use crate::{
    budget::Budget,
    debug::{Directory, VmDirectory},
    ring::{Queue, RingTables},
};

/// The links of VMs in [`Host::by_vm`].
const BY_VM: u64 = 0;

/// All VMs.
#[pin_data]
pub(crate) struct Host {
    budget: Budget,
    /// The module is on its way out: nothing new is made.
    closing: Atomic<bool>,
    /// Burials, and what is given up late.
    works: Arc<OwnQueue>,
    directory: Directory,
    tables: Arc<RingTables>,
    registry: Arc<Registry<Queue>>,
    /// The VMs that have a queue, by serial: a VM that has ended may share its address with a new one.
    #[pin]
    vms: Mutex<RBTree<u64, Arc<Member>>>,
    next_serial: Atomic<u64>,
    /// VMs by identity, for the end of a VM.
    #[pin]
    by_vm: Table<Member, BY_VM>,
}

/// One VM.
#[pin_data]
struct Member {
    host: Arc<Host>,
    queue: Arc<Queue>,
    /// Made a moment after the queue, by who made that.
    #[pin]
    directory: Mutex<Option<VmDirectory>>,
    #[pin]
    burial: Work<Member>,
    by_vm: Link<Member>,
}

impl_linked! {
    impl Linked<BY_VM> for Member { self.by_vm }
}

impl_has_work! {
    impl HasWork<Self> for Member { self.burial }
}

impl Member {
    /// May sleep.
    fn new(host: &Arc<Host>, queue: Arc<Queue>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                host: host.clone(),
                queue,
                directory <- new_mutex!(None),
                burial <- new_work!("Member::burial"),
                by_vm: Link::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// KVM destroys the VM. Must not sleep: the rest is done by a work.
    fn mark_dead(this: ArcBorrow<'_, Self>) {
        // Another VM at the same address, without a queue, may end before this one is buried. Nothing is
        // counted then: the last count must not be dropped here, where nothing may sleep.
        if this.queue.mark_dead() {
            // Never refused: it is queued once in the life of a VM.
            let _ = this.host.works.enqueue::<Arc<Self>, 0>(this.into());
        }
    }
}

impl WorkItem for Member {
    type Pointer = Arc<Member>;

    fn run(this: Arc<Member>) {
        this.host.bury(&this);
    }
}

impl Host {
    /// No VMs yet. Their drains do no more at a time than `budget` says. May sleep.
    pub(crate) fn new(
        budget: Budget,
        works: Arc<OwnQueue>,
        tables: Arc<RingTables>,
    ) -> Result<Arc<Self>> {
        let registry = Arc::pin_init(Registry::new(), GFP_KERNEL)?;
        Arc::pin_init(
            try_pin_init!(Self {
                budget,
                closing: Atomic::new(false),
                works,
                directory: Directory::new()?,
                tables,
                registry,
                vms <- new_mutex!(RBTree::new()),
                next_serial: Atomic::new(0),
                by_vm <- Table::new(),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Whether the module is on its way out.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Acquire)
    }

    /// The rings of all VMs.
    pub(crate) fn tables(&self) -> &Arc<RingTables> {
        &self.tables
    }

    /// The queue of the VM of `vcpu`, made if there is none yet. On the vCPU's thread; may sleep.
    pub(crate) fn queue_of_vcpu(self: &Arc<Self>, vcpu: &Vcpu) -> Result<Arc<Queue>, CallError> {
        let known = self
            .tables
            .with_ring_of(vcpu, |ring| (!ring.queue().is_dead()).then(|| ring.queue().clone()));
        known.flatten().map_or_else(|| self.queue_of(vcpu.vm()), Ok)
    }

    /// The queue of the living VM at `key`, if it has one.
    fn known(&self, key: usize) -> Option<Arc<Queue>> {
        let guard = rcu::read_lock();
        // The newest one at that address comes first.
        let member = self.by_vm.find(key, Reader::of(&guard))?;
        (!member.queue.is_dead()).then(|| member.queue.clone())
    }

    /// The queue of `vm`, made if there is none yet. On a thread of the VMM, which the memory for it is
    /// charged to; may sleep.
    pub(crate) fn queue_of(self: &Arc<Self>, vm: &Vm) -> Result<Arc<Queue>, CallError> {
        let key = vm.key().as_usize();
        if let Some(queue) = self.known(key) {
            return Ok(queue);
        }
        if self.is_closing() {
            return Err(CallError::Gone);
        }
        let no_memory = |_: Error| CallError::NoMemory;
        // Whatever may wait for memory is done outside the lock: other tenants take it, too.
        let serial = self.next_serial.fetch_add(1, Relaxed);
        let name = self.directory.name_for(vm, serial).map_err(no_memory)?;
        let queue = Queue::new(serial, name, self.budget, &self.registry).map_err(no_memory)?;
        let member = Member::new(self, queue.clone()).map_err(no_memory)?;
        let node = RBTreeNode::new(serial, member.clone(), GFP_KERNEL_ACCOUNT)
            .map_err(|_| CallError::NoMemory)?;
        {
            let mut vms = self.vms.lock();
            let found = self.known(key);
            let closing = self.is_closing();
            if found.is_some() || closing {
                drop(vms);
                // Another vCPU was faster, or the module goes. What was made goes outside the lock, too.
                drop((node, member, queue));
                return if closing { Err(CallError::Gone) } else { found.ok_or(CallError::Gone) };
            }
            // It is in no table yet, so this does not fail.
            self.by_vm.insert(key, member.clone()).map_err(no_memory)?;
            vms.insert(node);
        }
        // By who made the queue only, so that the name is taken once. The VM lives as long as this takes, and
        // the module waits for it, so that it is not buried before. Without memory it is not shown.
        if let Ok(directory) = self.directory.add(&queue) {
            *member.directory.lock() = Some(directory);
        }
        Ok(queue)
    }

    /// The VM with the lowest serial not below `from`.
    fn next_vm(&self, from: u64) -> Option<Arc<Member>> {
        let vms = self.vms.lock();
        let cursor = vms.cursor_lower_bound(&from)?;
        let (_, member) = cursor.current();
        Some(member.clone())
    }

    /// KVM destroys the VM at `key`. Must not sleep.
    pub(crate) fn destroyed(&self, key: VmKey) {
        let guard = rcu::read_lock();
        if let Some(member) = self.by_vm.find(key.as_usize(), Reader::of(&guard)) {
            Member::mark_dead(member);
        }
    }

    /// The VM is gone: everything kept for it goes. May sleep.
    fn bury(&self, member: &Member) {
        member.queue.remove_all_rings();
        self.registry.detach_vm(member.queue.contexts());
        self.forget(member);
    }

    /// Nothing leads to the VM any more, and nothing is shown of it. May sleep.
    fn forget(&self, member: &Member) {
        let known = self.vms.lock().remove(&member.queue.serial());
        drop(known);
        let directory = member.directory.lock().take();
        drop(directory);
        drop(self.by_vm.unlink(member));
    }

    /// No VM and no ring is added from here on, and there are no rings any more. VMs may still end by themselves.
    /// May sleep.
    pub(crate) fn close(&self) {
        self.closing.store(true, Release);
        smp_mb(Full);
        let mut after = 0;
        while let Some(member) = self.next_vm(after) {
            member.queue.remove_all_rings();
            after = member.queue.serial() + 1;
        }
    }

    /// Forgets all VMs: no VM's end is heard of any more. May sleep.
    pub(crate) fn forget_all(&self) {
        // Those that were are dealt with.
        self.works.flush();
        while let Some(member) = self.next_vm(0) {
            self.forget(&member);
        }
    }
}

impl Owner for Host {
    type Feed = Queue;

    fn registry(&self) -> &Registry<Queue> {
        &self.registry
    }

    fn for_each_vm(&self, visit: &dyn Fn(&Contexts)) {
        // Not under the lock: what is visited may take its time, and first contacts need it.
        let mut from = 0;
        while let Some(member) = self.next_vm(from) {
            visit(member.queue.contexts());
            from = member.queue.serial() + 1;
        }
    }
}
