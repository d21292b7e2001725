// SPDX-License-Identifier: GPL-2.0

//! The beginning of a VM: KVM tells of it where nothing may sleep, so the queue is made a moment later, on
//! the same thread, before KVM_CREATE_VM returns to the VMM.

use kernel::{alloc::flags::__GFP_NOWARN, prelude::*, sync::Arc};
use kvm_hooks::{Deferred, TaskWork};
use kvm_vm::{Vm, VmRef};

use crate::host::Host;

/// A VM that is to get its queue.
pub(crate) struct Birth {
    host: Arc<Host>,
    work: TaskWork<Birth>,
}

impl Birth {
    /// Has the queue of `vm` made. Without memory for that, the VM's first contact makes it. On the VMM's
    /// thread; does not sleep.
    pub(crate) fn announce(host: Arc<Host>, vm: &Vm) {
        let birth = Self { host, work: TaskWork::new() };
        if let Ok(birth) = Arc::new(birth, GFP_ATOMIC | __GFP_NOWARN) {
            TaskWork::queue(birth.as_arc_borrow(), || vm.try_get());
        }
    }
}

impl Deferred for Birth {
    type Payload = VmRef;

    fn task_work(&self) -> &TaskWork<Self> {
        &self.work
    }

    fn run(this: Arc<Self>, vm: VmRef) {
        // Its first contact tries again.
        let _ = this.host.queue_of(&vm);
    }
}
