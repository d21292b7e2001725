// SPDX-License-Identifier: GPL-2.0

//! Deferrable hypercalls for the guests of a stock KVM host.
//!
//! One way through, one file a step:
//!
//! guest ring -> exit probe ([`host`]) -> ring ([`ring`]) -> VM queue ([`queue`]) -> operation
//! (`kvm_registry`), with statistics ([`stats`]) beside every step, shown by [`debug`].
//!
//! # Locking
//!
//! Outermost first; see `docs/locking.md`.
//!
//! 1. `Host::vms`
//! 2. `VmQueue::rings`
//! 3. `Ring::drain` (held while operations execute)
//! 4. `Ring::publish`
//! 5. `Ring::late`
//! 6. `Ring::progress` (spin lock)

use kernel::prelude::*;

mod debug;
mod functions;
mod host;
mod progress;
mod queue;
mod ring;
mod stats;

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
    },
}

struct KvmDlh {
    host: host::Running,
}

impl kernel::Module for KvmDlh {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let budget = module_parameters::budget_entries.value();
        if !(1..=65536).contains(&budget) {
            pr_err!("budget_entries={} is not between 1 and 65536\n", budget);
            return Err(EINVAL);
        }
        match Host::start(budget) {
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
