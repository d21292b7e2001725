// SPDX-License-Identifier: GPL-2.0

//! The module as a whole: which VMs and rings there are, and what the hooks' reports lead to.

use dlh_abi::Error as CallError;
use kernel::{
    new_mutex,
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
    task::Task,
    time::Delta,
};
use kvm_hooks::{
    doorbell_barrier, synchronize_tasks, timer_tick, wait_for_task_works, Events, ExitProbes,
    Hooks, HypercallArgs, Killed, Listening, Missing, Tick, Ticker,
};
use kvm_registry::{Contexts, Owner, Published, Registry};
use kvm_vm::{Vcpu, Vm, VmKey};
use own_work::OwnQueue;
use rcu_table::{Reader, Table, Unlinked};

use crate::{
    birth::Births,
    budget::Budget,
    debug::{Directory, VmDirectory},
    functions,
    queue::VmQueue,
    ring::Ring,
};

/// The links of rings in [`Host::by_vcpu`].
pub(crate) const BY_VCPU: u64 = 0;
/// The links of rings in [`Host::by_task`].
pub(crate) const BY_TASK: u64 = 1;
/// The links of queues in [`Host::by_vm`].
pub(crate) const BY_VM: u64 = 0;

/// Everything the module knows.
#[pin_data]
pub(crate) struct Host {
    budget: Budget,
    /// All hooks are attached. Until then VMs get their queues at their first contact only.
    started: Atomic<bool>,
    /// The module is on its way out: nothing new is made.
    closing: Atomic<bool>,
    /// Burials, and what is given up late.
    works: Arc<OwnQueue>,
    births: Births,
    probes: Arc<ExitProbes<Host>>,
    directory: Directory,
    /// Rings by vCPU, for the exit path.
    #[pin]
    by_vcpu: Table<Ring, BY_VCPU>,
    /// Rings by the thread that last ran their vCPU, for the return to the VMM.
    #[pin]
    by_task: Table<Ring, BY_TASK>,
    #[pin]
    registry: Registry<VmQueue>,
    /// The VMs that have a queue, by serial: a VM that has ended may share its address with a new one.
    #[pin]
    vms: Mutex<RBTree<u64, Member>>,
    next_serial: Atomic<u64>,
    /// VMs by identity, for the end of a VM.
    #[pin]
    by_vm: Table<VmQueue, BY_VM>,
    /// Has vCPUs exit whose entries have waited for long, where nothing else does.
    #[pin]
    ticker: Mutex<Option<Ticker<Host>>>,
}

struct Member {
    queue: Arc<VmQueue>,
    /// Made a moment after the queue, by who made that.
    directory: Option<VmDirectory>,
}

/// Why the module could not start.
pub(crate) enum StartError {
    /// A hook point of KVM.
    Missing(Missing),
    /// Anything else.
    Other {
        /// What there is none of.
        what: &'static str,
        error: Error,
    },
}

impl From<Missing> for StartError {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

impl StartError {
    /// There is no `what`.
    fn without(what: &'static str) -> impl FnOnce(Error) -> Self {
        move |error| Self::Other { what, error }
    }
}

/// The module at work.
pub(crate) struct Running {
    hooks: Option<Hooks<Host>>,
    published: Option<Published<Host>>,
    host: Arc<Host>,
}

impl Host {
    /// Attaches the hooks. May sleep.
    pub(crate) fn start(budget: Budget, max_defer: Delta) -> Result<Running, StartError> {
        let works = OwnQueue::new()
            .and_then(|queue| Ok(Arc::new(queue, GFP_KERNEL)?))
            .map_err(StartError::without("workqueue"))?;
        let probes = ExitProbes::find(works.clone())?;
        let births = Births::new().map_err(StartError::without("memory"))?;
        let host = Arc::pin_init(
            try_pin_init!(Self {
                budget,
                started: Atomic::new(false),
                closing: Atomic::new(false),
                works,
                births,
                probes,
                directory: Directory::new()?,
                by_vcpu <- Table::new(),
                by_task <- Table::new(),
                registry <- Registry::new(),
                vms <- new_mutex!(RBTree::new()),
                next_serial: Atomic::new(0),
                by_vm <- Table::new(),
                ticker <- new_mutex!(None),
            }? Error),
            GFP_KERNEL,
        )
        .map_err(StartError::without("memory"))?;
        let published = Published::new(host.clone())
            .map_err(StartError::without("interface for operations"))?;
        let mut running = Running { hooks: None, published: Some(published), host };
        match running.attach(max_defer) {
            Ok(()) => Ok(running),
            Err(e) => {
                // The thread runs already, or some of the hooks have been there for a moment.
                running.stop();
                Err(e)
            }
        }
    }

    /// What a drain may do before the vCPU goes on.
    #[inline]
    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Whether the module is on its way out.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Acquire)
    }

    /// The operations.
    pub(crate) fn registry(&self) -> &Registry<VmQueue> {
        &self.registry
    }

    /// The module's own workqueue.
    pub(crate) fn works(&self) -> &OwnQueue {
        &self.works
    }

    /// Has the host hear of exits. May sleep.
    pub(crate) fn listen(self: &Arc<Self>) -> Result<Listening<Host>> {
        self.probes.listen(self)
    }

    /// The queue of the VM of `vcpu`, made if there is none yet. On the vCPU's thread; may sleep.
    pub(crate) fn queue_of_vcpu(self: &Arc<Self>, vcpu: &Vcpu) -> Result<Arc<VmQueue>, CallError> {
        {
            let guard = rcu::read_lock();
            if let Some(ring) = self.by_vcpu.find(vcpu.key().as_usize(), Reader::of(&guard)) {
                if !ring.queue().is_dead() {
                    return Ok(ring.queue().clone());
                }
            }
        }
        self.queue_of(vcpu.vm())
    }

    /// The queue of the living VM at `key`, if it has one.
    fn known(&self, key: usize) -> Option<Arc<VmQueue>> {
        let guard = rcu::read_lock();
        // The newest one at that address comes first.
        let queue = self.by_vm.find(key, Reader::of(&guard))?;
        (!queue.is_dead()).then(|| queue.into())
    }

    /// The queue of `vm`, made if there is none yet. On a thread of the VMM, which the memory for it is
    /// charged to; may sleep.
    pub(crate) fn queue_of(self: &Arc<Self>, vm: &Vm) -> Result<Arc<VmQueue>, CallError> {
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
        let queue = VmQueue::new(self, serial, name).map_err(no_memory)?;
        let member = Member { queue: queue.clone(), directory: None };
        let node =
            RBTreeNode::new(serial, member, GFP_KERNEL_ACCOUNT).map_err(|_| CallError::NoMemory)?;
        {
            let mut vms = self.vms.lock();
            let found = self.known(key);
            let closing = self.is_closing();
            if found.is_some() || closing {
                drop(vms);
                // Another vCPU was faster, or the module goes. What was made goes outside the lock, too.
                drop((node, queue));
                return if closing { Err(CallError::Gone) } else { found.ok_or(CallError::Gone) };
            }
            // It is in no table yet, so this does not fail.
            self.by_vm.insert(key, queue.clone()).map_err(no_memory)?;
            vms.insert(node);
        }
        // By who made the queue only, so that the name is taken once. The VM lives as long as this takes, and
        // the module waits for it, so that its member is there. Without memory it is not shown.
        if let Ok(directory) = self.directory.add(&queue) {
            if let Some(member) = self.vms.lock().get_mut(&serial) {
                member.directory = Some(directory);
            }
        }
        Ok(queue)
    }

    /// Has exits of the ring's vCPU lead to it. May sleep.
    pub(crate) fn announce_ring(&self, ring: &Arc<Ring>) -> Result {
        self.by_vcpu.insert(ring.vcpu().as_usize(), ring.clone())?;
        if let Some(ticker) = &*self.ticker.lock() {
            ticker.wake();
        }
        Ok(())
    }

    /// The ring's vCPU is run by another thread now. May sleep.
    pub(crate) fn follow(&self, ring: &Arc<Ring>, task: usize) -> Result {
        self.by_task.insert(task, ring.clone())
    }

    /// The ring's vCPU is no longer run by the thread that it was run by. May sleep.
    pub(crate) fn unfollow(&self, ring: &Ring) {
        drop(self.by_task.unlink(ring));
    }

    /// Nothing leads to the ring, which is closed, any more. May sleep.
    pub(crate) fn forget_ring(&self, ring: &Ring) {
        Unlinked::forget([self.by_vcpu.unlink(ring), self.by_task.unlink(ring)]);
    }

    /// The VM with the lowest serial not below `from`.
    fn next_vm(&self, from: u64) -> Option<Arc<VmQueue>> {
        let vms = self.vms.lock();
        let cursor = vms.cursor_lower_bound(&from)?;
        let (_, member) = cursor.current();
        Some(member.queue.clone())
    }

    /// The VM of this queue is gone: everything kept for it goes. May sleep.
    pub(crate) fn bury(&self, queue: Arc<VmQueue>) {
        queue.remove_all_rings();
        self.registry.detach_vm(queue.contexts());
        let member = self.vms.lock().remove(&queue.serial());
        drop(member);
        drop(self.by_vm.unlink(&queue));
    }
}

impl Running {
    /// Whether a thread sees to it that no entry waits for too long.
    pub(crate) fn watches(&self) -> bool {
        self.host.ticker.lock().is_some()
    }

    fn attach(&mut self, max_defer: Delta) -> Result<(), StartError> {
        let host = &self.host;
        if !max_defer.is_zero() && timer_tick().is_none_or(|tick| max_defer < tick) {
            // At one look it is new, at the next one thread is made to exit, at the third all are: within
            // three periods, and a fourth for what the kernel adds.
            let period = Delta::from_nanos(max_defer.as_nanos() / 4);
            let ticker = Ticker::start(host.clone(), period)
                .map_err(StartError::without("thread that looks at doorbells"))?;
            *host.ticker.lock() = Some(ticker);
        }
        // Last: from the first hook on there may be VMs, and files of theirs that somebody has open.
        self.hooks = Some(Hooks::attach(host.clone())?);
        host.started.store(true, Release);
        Ok(())
    }

    /// Takes the module out of KVM: on return nothing of it runs, or will. May sleep.
    pub(crate) fn stop(&mut self) {
        let host = &self.host;
        // No operation is registered any more: whoever registers one uses our symbols.
        self.published = None;
        // No VM and no ring is added from here on. VMs may still end by themselves.
        host.closing.store(true, Release);
        smp_mb(Full);
        let mut after = 0;
        while let Some(queue) = host.next_vm(after) {
            queue.remove_all_rings();
            after = queue.serial() + 1;
        }
        // Only now may a guest hear that there is nobody: no ring is in our hands any more.
        if let Some(hooks) = &mut self.hooks {
            hooks.admit_none();
        }
        let ticker = host.ticker.lock().take();
        drop(ticker);
        host.probes.close();
        wait_for_task_works();
        self.hooks = None;
        // No VM's end is heard of any more; those that were are dealt with.
        host.works.flush();
        while let Some(queue) = host.next_vm(0) {
            drop(host.by_vm.unlink(&queue));
            let member = host.vms.lock().remove(&queue.serial());
            drop(member);
        }
        doorbell_barrier();
        synchronize_tasks();
    }
}

impl Events for Host {
    fn hypercall(
        this: ArcBorrow<'_, Self>,
        vcpu: &Vcpu,
        call: HypercallArgs,
    ) -> Result<i64, Killed> {
        functions::hypercall(&this.into(), vcpu, call)
    }

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

    fn created(this: ArcBorrow<'_, Self>, vm: &Vm) {
        // A module that fails to load is freed although files of it are open. Nothing fails after the last hook,
        // which is that on hypercalls.
        if this.started.load(Acquire) && !this.is_closing() {
            this.births.announce(this, vm);
        }
    }

    fn destroyed(&self, vm: VmKey) {
        let guard = rcu::read_lock();
        if let Some(queue) = self.by_vm.find(vm.as_usize(), Reader::of(&guard)) {
            VmQueue::mark_dead(queue);
        }
    }
}

impl Host {
    #[inline(never)]
    fn exited_with_ring(&self, vcpu: &Vcpu, reader: Reader<'_>) {
        if let Some(ring) = self.by_vcpu.find(vcpu.key().as_usize(), reader) {
            Ring::exited(ring, vcpu, reader);
        }
    }
}

impl Tick for Host {
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

impl Owner for Host {
    type Feed = VmQueue;

    fn registry(&self) -> &Registry<VmQueue> {
        &self.registry
    }

    fn for_each_vm(&self, visit: &dyn Fn(&Contexts)) {
        // Not under the lock: what is visited may take its time, and first contacts need it.
        let mut from = 0;
        while let Some(queue) = self.next_vm(from) {
            visit(queue.contexts());
            from = queue.serial() + 1;
        }
    }
}
