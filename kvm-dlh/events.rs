// SPDX-License-Identifier: GPL-2.0

//! What KVM's hooks report, and what that leads to.

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            ordering::{Acquire, Release},
            Atomic,
        },
        Arc, ArcBorrow,
    },
};
use kvm_hooks::{Events, HypercallArgs, Killed};
use kvm_vm::{Vcpu, Vm, VmKey};

use crate::{birth::Births, functions, host::Host};

/// Who hears of hypercalls, and of the beginning and the end of VMs.
pub(crate) struct Receiver {
    host: Arc<Host>,
    births: Births,
    /// All hooks are attached. Until then VMs get their queues at their first contact only.
    started: Atomic<bool>,
}

impl Receiver {
    /// May sleep.
    pub(crate) fn new(host: &Arc<Host>) -> Result<Arc<Self>> {
        let receiver =
            Self { host: host.clone(), births: Births::new()?, started: Atomic::new(false) };
        Ok(Arc::new(receiver, GFP_KERNEL)?)
    }

    /// All hooks are attached.
    pub(crate) fn start(&self) {
        self.started.store(true, Release);
    }
}

impl Events for Receiver {
    fn hypercall(
        this: ArcBorrow<'_, Self>,
        vcpu: &Vcpu,
        call: HypercallArgs,
    ) -> Result<i64, Killed> {
        functions::hypercall(&this.host, vcpu, call)
    }

    fn created(this: ArcBorrow<'_, Self>, vm: &Vm) {
        // A module that fails to load is freed although files of it are open. Nothing fails after the last hook,
        // which is that on hypercalls.
        if this.started.load(Acquire) && !this.host.is_closing() {
            this.births.announce(&this.host, vm);
        }
    }

    fn destroyed(&self, vm: VmKey) {
        self.host.destroyed(vm);
    }
}
