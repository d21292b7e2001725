// SPDX-License-Identifier: GPL-2.0

//! The module's way into KVM, and out of it.

use kernel::{prelude::*, sync::Arc, time::Delta};
use kvm_hooks::{
    doorbell_barrier, synchronize_tasks, timer_tick, wait_for_task_works, ExitProbes, Hooks,
    Missing,
};
use kvm_registry::Published;
use own_work::OwnQueue;

use crate::{budget::Budget, events::Receiver, host::Host, ring::RingTables};

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
    hooks: Option<Hooks<Receiver>>,
    published: Option<Published<Host>>,
    host: Arc<Host>,
}

impl Running {
    /// Attaches the hooks. May sleep.
    pub(crate) fn start(budget: Budget, max_defer: Delta) -> Result<Self, StartError> {
        let works = OwnQueue::new()
            .and_then(|queue| Ok(Arc::new(queue, GFP_KERNEL)?))
            .map_err(StartError::without("workqueue"))?;
        let probes = ExitProbes::find(works.clone())?;
        let host = RingTables::new(probes)
            .and_then(|tables| Host::new(budget, works, tables))
            .map_err(StartError::without("memory"))?;
        let receiver = Receiver::new(&host).map_err(StartError::without("memory"))?;
        let published = Published::new(host.clone())
            .map_err(StartError::without("interface for operations"))?;
        let mut running = Self { hooks: None, published: Some(published), host };
        match running.attach(receiver, max_defer) {
            Ok(()) => Ok(running),
            Err(e) => {
                // The thread runs already, or some of the hooks have been there for a moment.
                running.stop();
                Err(e)
            }
        }
    }

    /// Whether a thread sees to it that no entry waits for too long.
    pub(crate) fn watches(&self) -> bool {
        self.host.tables().has_ticker()
    }

    fn attach(&mut self, receiver: Arc<Receiver>, max_defer: Delta) -> Result<(), StartError> {
        if !max_defer.is_zero() && timer_tick().is_none_or(|tick| max_defer < tick) {
            // At one look it is new, at the next one thread is made to exit, at the third all are: within
            // three periods, and a fourth for what the kernel adds.
            let period = Delta::from_nanos(max_defer.as_nanos() / 4);
            self.host
                .tables()
                .start_ticker(period)
                .map_err(StartError::without("thread that looks at doorbells"))?;
        }
        // Last: from the first hook on there may be VMs, and files of theirs that somebody has open.
        self.hooks = Some(Hooks::attach(receiver.clone())?);
        receiver.start();
        Ok(())
    }

    /// Takes the module out of KVM: on return nothing of it runs, or will. May sleep.
    pub(crate) fn stop(&mut self) {
        // No operation is registered any more: whoever registers one uses our symbols.
        self.published = None;
        self.host.close();
        // Only now may a guest hear that there is nobody: no ring is in our hands any more.
        if let Some(hooks) = &mut self.hooks {
            hooks.admit_none();
        }
        self.host.tables().close();
        wait_for_task_works();
        self.hooks = None;
        self.host.forget_all();
        doorbell_barrier();
        synchronize_tasks();
    }
}
