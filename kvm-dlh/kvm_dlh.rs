// SPDX-License-Identifier: GPL-2.0

//! Deferrable hypercalls for the guests of a stock KVM host.
//!
//! One way through, one file a step:
//!
//! guest ring -> exit probe -> ring ([`ring`]) -> VM queue ([`queue`]) -> operation (`kvm_registry`, [`trace`]),
//! with statistics ([`stats`]) beside every step, shown by [`debug`].
//! The other way in: hypercall ([`events`]) -> its function ([`functions`]) -> rings of the VM ([`rings`]), or a call
//! inserted ([`insert`]) -> VM queue.
//!
//! Above them: which VMs there are ([`host`]), and the way in and out ([`running`]). No file uses one that comes before
//! it: [`running`], [`events`], [`functions`] and [`birth`], [`host`], [`debug`], [`insert`] and [`rings`], [`ring`],
//! [`queue`], [`inserted`] and [`trace`], and the rest.
//!
//! # Locking
//!
//! Outermost first; see `docs/locking.md`.
//!
//! 1. `Registry::changes`
//! 2. `Host::vms`
//! 3. `VmQueue::rings`
//! 4. `Ring::drain` (held while operations execute)
//! 5. `Contexts::tables`
//! 6. `Ring::state`
//! 7. `Ring::late`, `RingTables::ticker`, `Member::directory`
//! 8. spin locks: `Unfinished::counts`, `Inserted::answers`, `Ring::runner`, `Table::writers`, a doorbell's

use kernel::{fmt, prelude::*, time::Delta};

mod birth;
mod budget;
mod caller;
mod debug;
mod events;
mod failure;
mod functions;
mod host;
mod insert;
mod inserted;
mod patience;
mod queue;
mod ring;
mod rings;
mod running;
mod stats;
mod trace;

use budget::Budget;
use params::{kvm_dlh, VERSION};
use running::{Running, StartError};

module! {
    type: KvmDlh,
    name: "kvm_dlh",
    authors: ["The kvm-dlh developers"],
    description: "Deferrable low-overhead hypercalls for KVM guests",
    license: "GPL",
}

struct KvmDlh {
    running: Running,
}

impl kernel::Module for KvmDlh {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let budget = Budget {
            entries: kvm_dlh::budget_entries(),
            time: Delta::from_micros(kvm_dlh::budget_us().into()),
        };
        let defer_us = kvm_dlh::max_defer_us();
        match Running::start(budget, Delta::from_micros(defer_us.into())) {
            Ok(running) => {
                pr_info!(
                    "version {}: hypercalls of guests are deferred; a drain has {} entries or {} us; an entry waits {}\n",
                    VERSION,
                    budget.entries,
                    kvm_dlh::budget_us(),
                    Waits { defer_us, watched: running.watches() }
                );
                Ok(Self { running })
            }
            Err(StartError::Missing(missing)) => {
                let what = match missing.error {
                    ENOENT => "is missing",
                    EBUSY => "is owned by another tracer or live patch",
                    _ => "cannot be hooked",
                };
                pr_err!("this kernel's KVM cannot be extended: {} {}\n", missing.name, what);
                Err(missing.error)
            }
            Err(StartError::Other { what, error }) => {
                pr_err!("cannot start, no {}: {:?}\n", what, error);
                Err(error)
            }
        }
    }
}

/// How long an entry waits, in words.
struct Waits {
    defer_us: u32,
    /// Whether the module sees to it itself.
    watched: bool,
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.defer_us, self.watched) {
            (0, _) => f.write_str("for its vCPU to exit"),
            (us, true) => write!(f, "{us} us at most (the thread kvm_dlh sees to it)"),
            (us, false) => write!(f, "{us} us at most (the host's timer tick sees to it)"),
        }
    }
}

impl Drop for KvmDlh {
    fn drop(&mut self) {
        self.running.stop();
    }
}
