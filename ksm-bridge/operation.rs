// SPDX-License-Identifier: GPL-2.0

//! FREE_PAGES: from a guest's arguments to a request of the VM's merger.

use dlh_abi::{
    Error as CallError, FreePages as Said, Operation as Number, FEATURE_FREE_ANY, FEATURE_FREE_ASK,
    FEATURE_FREE_PAGES,
};
use kernel::{
    prelude::*,
    sync::{Arc, ArcBorrow},
};
use kvm_control::{Allow, VmDirectory as Control};
use kvm_faults::{Faults, Watching};
use kvm_ops::{Operation, Outcome, Token};
use kvm_vm::Vm;
use kvm_worker::Worker;

use crate::{
    debug::{Directory, VmDirectory},
    merger::{Merger, Policy},
};

/// The operation.
pub(crate) struct FreePages {
    policy: Policy,
    controls: kvm_control::Directory,
    directory: Directory,
    faults: Arc<Faults<Merger>>,
}

/// What it keeps for a VM: the merger, the thread that runs it, what watches for pages that come back, and what is
/// shown of it.
pub(crate) struct Context {
    worker: Worker<Merger>,
    _watching: Watching<Merger>,
    // Before the one in debugfs: a name that is free there is free here.
    control: Control<Merger>,
    _directory: VmDirectory,
}

impl FreePages {
    pub(crate) fn new(policy: Policy) -> Result<Self> {
        Ok(Self {
            policy,
            controls: kvm_control::Directory::new()?,
            directory: Directory::new()?,
            faults: Faults::new()?,
        })
    }
}

impl Operation for FreePages {
    const NUMBER: Number = Number::FREE_PAGES;
    const FEATURE: u32 = FEATURE_FREE_PAGES | FEATURE_FREE_ANY | FEATURE_FREE_ASK;
    type Context = Context;

    fn attach(&self, vm: &Vm) -> Result<Arc<Context>> {
        let allow = Allow::new()?;
        let merger = Merger::new(self.policy, allow.clone())?;
        // First what may fail for want of threads, last what others notice.
        let worker = Worker::start(vm, merger.clone())?;
        let name = self.directory.name_for(vm)?;
        let control = self.controls.add(&name, allow, merger.clone())?;
        let directory = self.directory.add(&name, &merger)?;
        let watching = self.faults.watch(vm, merger)?;
        let context = Context { worker, _watching: watching, control, _directory: directory };
        let context = Arc::new(context, GFP_KERNEL_ACCOUNT)?;
        context.control.show();
        Ok(context)
    }

    #[inline]
    fn execute(context: ArcBorrow<'_, Context>, vm: &Vm, arg: [u64; 2], token: Token) -> Outcome {
        let (frames, contents) = match Said::parse(arg) {
            Ok(Said::Pages(frames, contents)) => (frames, contents),
            Ok(Said::Question) => {
                let answer =
                    if context.worker.job().answer() { Err(CallError::Again) } else { Ok(()) };
                return Outcome::Finished(token, answer.into());
            }
            Err(e) => return Outcome::Finished(token, e.into()),
        };
        match context.worker.job().accept(vm, frames, contents, token) {
            Ok(first) => {
                if first {
                    context.worker.wake();
                }
                Outcome::Pending
            }
            Err((token, e)) => Outcome::Finished(token, e.into()),
        }
    }

    fn detach(context: Arc<Context>) {
        context.worker.job().close();
        // The worker ends with the context: it finishes what it has taken first.
        drop(context);
    }
}
