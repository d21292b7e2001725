// SPDX-License-Identifier: GPL-2.0

//! The subjects of the tests, one a file.

pub(crate) mod aftermath;
mod again;
mod bad_input;
mod birth;
mod budget;
mod calls;
pub(crate) mod discovery;
mod files;
pub(crate) mod foreign;
pub(crate) mod free_pages;
mod guest_memfd;
mod held;
mod hostile;
mod hosts;
pub(crate) mod irqchips;
mod kinds;
pub(crate) mod lent;
pub(crate) mod machinery;
pub(crate) mod malformed;
mod nested;
mod operations;
mod private_files;
mod processes;
pub(crate) mod puppet;
pub(crate) mod races;
pub(crate) mod reload;
mod reporting;
pub(crate) mod ring;
pub(crate) mod scale;
pub(crate) mod waits;
mod worker;

use std::path::PathBuf;

use clap::Subcommand;
use dlh_abi::Function;

use crate::ktap::{check_eq, Case, Result};
use crate::ring::{Ring, NOP};
use crate::stats;
use crate::vcpu::Exit;
use crate::vm::{Vm, BASE};

/// What can be tested.
#[derive(Debug, Subcommand)]
#[command(rename_all = "snake_case")]
pub(crate) enum Subject {
    /// Whether the host has the module, and what it says it can do.
    Discovery {
        /// The module is not there.
        #[arg(long = "expect-absent")]
        expect_absent: bool,
        /// The host must say exactly these feature bits.
        #[arg(long = "expect-features", value_name = "BITS")]
        expect_features: Option<u64>,
    },
    /// The VMM itself; needs no module.
    Machinery,
    /// Hypercalls and entries that must be refused.
    BadInput,
    /// Rings that are used as they should be.
    Ring,
    /// The queue of a VM, from its beginning.
    Birth,
    /// Arrays of calls, events, and their order; with ksm_bridge.ko.
    Calls,
    /// Drains whose time is up: the module is inserted with budget_us=1.
    ShortBudget,
    /// Entries that wait for an exit, on a host whose last CPU has no timer tick.
    Tickless {
        /// The module's max_defer_us.
        #[arg(long = "defer-us")]
        defer_us: u64,
    },
    /// Rings whose memory says what no guest should write.
    Malformed,
    /// The operation FREE_PAGES, of ksm_bridge.ko.
    FreePages,
    /// FREE_PAGES for every kind of memory; with huge pages, swap and KSM.
    Kinds,
    /// Whether a guest is to report all that is free once more; with huge pages.
    Again,
    /// FREE_PAGES of private memory over files: a memfd, and files in other file systems.
    PrivateFiles {
        /// Directories to make files in.
        directories: Vec<PathBuf>,
    },
    /// What hosts, and VMMs, do with memory beside giving it to guests. Needs no debugfs. Locks the kernel down at the end.
    Hosts {
        /// There is no debugfs: the cases about rings and FREE_PAGES that can do without come first.
        #[arg(long = "no-debugfs")]
        no_debugfs: bool,
    },
    /// The worker of a VM; the bridge is inserted with merge=share worker_cpu_percent=10.
    Worker,
    /// What is left when KVM_RUN returns and when things go. Removes the modules at the end.
    Aftermath,
    /// What users may keep from going on; on one CPU. Removes the modules at the end.
    Held,
    /// What no sane guest or VMM does; with tracefs.
    Hostile,
    /// Memory, vCPUs and VMs that go away at the wrong moment.
    Races,
    /// VMs whose hypercalls KVM takes for another hypervisor's.
    Foreign,
    /// Nested guests, and memory of guest_memfd.
    Refused,
    /// Very many vCPUs and VMs; VMs in the hands of other processes; every kind of interrupt controller.
    Scale,
    /// Modules that come and go while VMs run; none of ours is inserted at the start.
    Reload {
        /// Where the module files are.
        #[arg(long)]
        modules: PathBuf,
    },
    /// Waits of the VMM's threads; none of ours is inserted at the start. With swap.
    Waits {
        /// Where the folders with module files are.
        #[arg(long)]
        build: PathBuf,
    },
    /// Files of the modules that somebody has open; none of ours is inserted at the start.
    Files {
        /// Where the module files are.
        #[arg(long)]
        modules: PathBuf,
    },
    /// Operations of other modules; none of ours is inserted at the start.
    Operations {
        /// Where the folders with module files are.
        #[arg(long)]
        build: PathBuf,
    },
}

impl Subject {
    /// The cases of the subject.
    pub(crate) fn cases(self) -> Vec<Case> {
        match self {
            Subject::Discovery { expect_absent: true, .. } => discovery::absent(),
            Subject::Discovery { expect_features, .. } => discovery::present(expect_features),
            Subject::Machinery => machinery::cases(),
            Subject::BadInput => bad_input::cases(),
            Subject::Ring => ring::cases(),
            Subject::Birth => birth::cases(),
            Subject::Calls => calls::cases(),
            Subject::ShortBudget => budget::short_cases(),
            Subject::Tickless { defer_us } => budget::tickless_cases(defer_us),
            Subject::Malformed => malformed::cases(),
            Subject::FreePages => free_pages::cases(),
            Subject::Kinds => kinds::cases(),
            Subject::Again => again::cases(),
            Subject::PrivateFiles { directories } => private_files::cases(&directories),
            Subject::Hosts { no_debugfs: false } => hosts::cases(),
            Subject::Hosts { no_debugfs: true } => {
                [ring::cases(), free_pages::cases(), hosts::cases()].into_iter().flatten().collect()
            }
            Subject::Worker => worker::cases(),
            Subject::Aftermath => aftermath::cases(),
            Subject::Held => held::cases(),
            Subject::Hostile => hostile::cases(),
            Subject::Races => races::cases(),
            Subject::Scale => {
                [irqchips::cases(), lent::cases(), scale::cases()].into_iter().flatten().collect()
            }
            Subject::Foreign => foreign::cases(),
            Subject::Refused => {
                [nested::cases(), guest_memfd::cases()].into_iter().flatten().collect()
            }
            Subject::Reload { modules } => reload::cases(modules),
            Subject::Waits { build } => waits::cases(&build),
            Subject::Files { modules } => files::cases(modules),
            Subject::Operations { build } => operations::cases(&build),
        }
    }
}

/// Checks that a new ring at `gpa` works, and takes it down again.
fn check_ring_works(vm: &mut Vm, vcpu: usize, gpa: u64) -> Result<()> {
    let before = stats::are_there().then(|| vm.stats()).transpose()?;
    let mut ring = Ring::set_up(vm, vcpu, gpa, 64, u32::MAX - 1)?;
    ring.push(&NOP, 5)?;
    vm.vcpus[vcpu].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.tail(), "done of a good ring after 5 entries and an exit");
    let result = vm.hypercall(vcpu, Function::RingTeardown as u64, ring.id(), 0, 0)?;
    check_eq!(result, 0, "taking down a good ring");
    if let Some(before) = before {
        let executed = vm.stats()?.since(&before, "executed")?;
        check_eq!(executed, 5, "entries executed from a good ring");
    }
    vm.check_law()
}

/// Checks that the VM has what a test needs to go on, at the usual place.
fn check_vm_works(vm: &mut Vm) -> Result<()> {
    check_ring_works(vm, 0, BASE)
}
