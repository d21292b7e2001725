// SPDX-License-Identifier: GPL-2.0

//! FREE_PAGES: from a guest's arguments to a request of the VM's merger.

use dlh_abi::{GfnRange, Gpa, Operation as Number, FEATURE_FREE_PAGES};
use kernel::{
    prelude::*,
    sync::{Arc, ArcBorrow},
};
use kvm_merge::Worker;
use kvm_ops::{Operation, Outcome, Token};
use kvm_vm::Vm;

use crate::{
    debug::{Directory, VmDirectory},
    merger::Merger,
};

/// The operation.
pub(crate) struct FreePages {
    directory: Directory,
}

/// What it keeps for a VM: the merger and the thread that runs it.
pub(crate) struct Context {
    worker: Worker<Merger>,
    _directory: VmDirectory,
}

impl FreePages {
    pub(crate) fn new() -> Self {
        Self { directory: Directory::new() }
    }
}

impl Operation for FreePages {
    const NUMBER: Number = Number::FREE_PAGES;
    const FEATURE: u32 = FEATURE_FREE_PAGES;
    type Context = Context;

    fn attach(&self, vm: &Vm) -> Result<Arc<Context>> {
        let merger = Merger::new(vm)?;
        let directory = self.directory.add(&merger)?;
        let worker = Worker::start(merger)?;
        Ok(Arc::new(Context { worker, _directory: directory }, GFP_KERNEL_ACCOUNT)?)
    }

    fn execute(
        context: ArcBorrow<'_, Context>,
        vm: &Vm,
        [gpa, bytes]: [u64; 2],
        token: Token,
    ) -> Outcome {
        let frames = match GfnRange::from_bytes(Gpa(gpa), bytes) {
            Ok(frames) => frames,
            Err(e) => return Outcome::Finished(token, e.into()),
        };
        match context.worker.job().accept(vm, frames, token) {
            Ok(()) => {
                context.worker.wake();
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
