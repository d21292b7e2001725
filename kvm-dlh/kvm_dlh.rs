// SPDX-License-Identifier: GPL-2.0

//! Deferrable hypercalls for the guests of a stock KVM host.
//!
//! One way through, one file a step:
//!
//! guest ring -> exit probe ([`host`]) -> ring ([`ring`]) -> VM queue ([`queue`]) -> operation
//! (`kvm_registry`, [`trace`]), with statistics ([`stats`]) beside every step, shown by [`debug`].
//! The other way in: hypercall ([`functions`]) -> [`inserted`] -> VM queue.
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
//! 7. `Ring::late`, `Host::ticker`
//! 8. spin locks: `Unfinished::counts`, `VmQueue::inserted`, `Ring::runner`, `Table::writers`, a doorbell's

use kernel::{prelude::*, time::Delta};

mod birth;
mod budget;
mod debug;
mod failure;
mod functions;
mod host;
mod inserted;
mod patience;
mod queue;
mod ring;
mod stats;
mod trace;

use budget::Budget;
use host::Host;

module! {
    type: KvmDlh,
    name: "kvm_dlh",
    authors: ["The kvm-dlh developers"],
    description: "Deferrable low-overhead hypercalls for KVM guests",
    license: "GPL",
    params: {
        budget_entries: u32 {
            default: 512,
            description: "Entries executed at most before a vCPU may go on (1 to 65536)",
        },
        budget_us: u32 {
            default: 50,
            description: "Microseconds spent on them at most, but for the last one (1 to 1000000)",
        },
        max_defer_us: u32 {
            default: 10000,
            description: "Microseconds that an entry waits at most for its vCPU to exit by itself (100 to 1000000; 0: for ever)",
        },
    },
}

struct KvmDlh {
    host: host::Running,
}

impl kernel::Module for KvmDlh {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let entries = module_parameters::budget_entries.value();
        if !(1..=65536).contains(&entries) {
            pr_err!("budget_entries={} is not between 1 and 65536\n", entries);
            return Err(EINVAL);
        }
        let us = module_parameters::budget_us.value();
        if !(1..=1_000_000).contains(&us) {
            pr_err!("budget_us={} is not between 1 and 1000000\n", us);
            return Err(EINVAL);
        }
        let defer_us = module_parameters::max_defer_us.value();
        if defer_us != 0 && !(100..=1_000_000).contains(&defer_us) {
            pr_err!("max_defer_us={} is not between 100 and 1000000, nor 0\n", defer_us);
            return Err(EINVAL);
        }
        let budget = Budget { entries, time: Delta::from_micros(us.into()) };
        match Host::start(budget, Delta::from_micros(defer_us.into())) {
            Ok(host) => Ok(Self { host }),
            Err(host::StartError::Missing(missing)) => {
                let what = match missing.error {
                    ENOENT => "is missing",
                    EBUSY => "is owned by another tracer or live patch",
                    _ => "cannot be hooked",
                };
                pr_err!("this kernel's KVM cannot be extended: {} {}\n", missing.name, what);
                Err(missing.error)
            }
            Err(host::StartError::Other(e)) => Err(e),
        }
    }
}

impl Drop for KvmDlh {
    fn drop(&mut self) {
        self.host.stop();
    }
}
