// SPDX-License-Identifier: GPL-2.0

//! The beginning of a VM: KVM tells of it where nothing may sleep, so the queue is made a moment later, on
//! the same thread, before KVM_CREATE_VM returns to the VMM.

use kernel::{prelude::*, sync::Arc};
use kvm_hooks::{Deferred, TaskWork};
use kvm_vm::{Vm, VmRef};

use crate::host::Host;

/// Threads that can be between KVM's making of a VM and their way back to user space, which is short.
const AT_ONCE: usize = 32;

/// What is needed to note the VMs that are to get their queues. It is there from the beginning: with
/// preemption off, as ftrace calls, no memory can be had where spin locks sleep (PREEMPT_RT).
pub(crate) struct Births(KVec<Arc<Birth>>);

/// A VM that is to get its queue, or a place for one.
struct Birth {
    work: TaskWork<Birth>,
}

impl Births {
    /// May sleep.
    pub(crate) fn new() -> Result<Self> {
        let mut births = KVec::with_capacity(AT_ONCE, GFP_KERNEL)?;
        for _ in 0..AT_ONCE {
            births.push(Arc::new(Birth { work: TaskWork::new() }, GFP_KERNEL)?, GFP_KERNEL)?;
        }
        Ok(Self(births))
    }

    /// Has the queue of `vm` made. Where more threads than there are places make VMs at the same moment, the
    /// VM's first contact makes it. On the VMM's thread; takes no lock, and allocates nothing.
    pub(crate) fn announce(&self, host: &Arc<Host>, vm: &Vm) {
        let noted = |birth: &Arc<Birth>| {
            TaskWork::queue(birth.as_arc_borrow(), || Some((host.clone(), vm.try_get()?)))
        };
        // Those that are taken say no.
        let _ = self.0.iter().any(noted);
    }
}

impl Deferred for Birth {
    type Payload = (Arc<Host>, VmRef);

    fn task_work(&self) -> &TaskWork<Self> {
        &self.work
    }

    fn run(_this: Arc<Self>, (host, vm): (Arc<Host>, VmRef)) {
        // Its first contact tries again.
        let _ = host.queue_of(&vm);
    }
}
