// SPDX-License-Identifier: GPL-2.0

//! A VMM for the tests: it plays guests that do what no ordinary guest does.
//!
//! It runs in the host under test. Each subject in `tests` is a set of cases, printed as KTAP.

mod boot;
mod guest;
mod herd;
mod hyperv;
mod ktap;
mod measure;
mod memory;
mod reclaim;
mod ring;
mod samples;
mod stats;
mod svm;
mod tenant;
mod tests;
mod thread;
mod vcpu;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dlh_abi::{Call, Operation};

#[derive(Debug, Parser)]
#[command(about = "A small VMM that tests kvm_dlh.ko")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the cases of one subject.
    Ktap {
        /// Only the cases with this in their names.
        #[arg(long, value_name = "TEXT", default_value = "")]
        only: String,
        #[command(subcommand)]
        subject: tests::Subject,
    },
    /// Measure what calls cost, in ticks of the guest's time-stamp counter.
    Measure {
        /// Only rounds with this many calls before each exit, for a profiler to look at.
        #[arg(long)]
        batch: Option<u64>,
        /// How many rounds.
        #[arg(long, requires = "batch", default_value_t = 1000)]
        laps: u64,
        /// Only an entry's cost where as many vCPUs have rings.
        #[arg(long, conflicts_with = "batch")]
        vcpus: Option<usize>,
        /// Only this many exits.
        #[arg(long, conflicts_with_all = ["batch", "vcpus"])]
        exits: Option<u64>,
    },
    /// Measure how long entries of a guest wait that does not exit by itself.
    Latency {
        /// Microseconds that the guest is busy for at most between two entries: a tick of the host's.
        #[arg(long, default_value_t = 4_000)]
        spin_us: u64,
        /// How many entries.
        #[arg(long, default_value_t = 1000)]
        samples: u64,
    },
    /// Run a guest that traces its time-stamp counter and halts, again and again: for something that reads the
    /// host's trace, see bench/cases/latency.py.
    Idle,
    /// Measure how long exits take while a guest floods its ring.
    Drains,
    /// Measure what taking memory back costs the host, by reports and by madvise; with ksm_bridge.ko.
    Reclaim {
        /// Only reports of single pages, of memory that is not there any more, this many times over: for a
        /// profiler to look at.
        #[arg(long)]
        laps: Option<u64>,
    },
    /// Make many VMs, say `ready` with the microseconds it took for each, do the same for a call of each
    /// VM at each line of the input, and keep them until it ends.
    Herd {
        /// How many.
        count: usize,
        /// The first call sets up a ring.
        #[arg(long)]
        rings: bool,
    },
    /// Keep a VM busy with a call until killed; the tests do that.
    Flood { op: u16, arg0: u64, arg1: u64 },
    /// Have a thread of a VMM wait until it is killed; the tests do that.
    Wait { how: tests::waits::Wait },
    /// Make a VM, with the memory of this file if one is given, and do what standard input says, a word a line; the
    /// tests do that.
    Obey { memory: Option<PathBuf> },
    /// Report memory of these kinds at each line of the input, and say what came of it.
    Tenant {
        kinds: Vec<tenant::Kind>,
        /// MiB of each kind.
        #[arg(long, default_value_t = 2)]
        mib: usize,
    },
    /// Go through more memory than there is, reporting each piece of it, at each line of the input.
    Sweep {
        kind: tenant::Kind,
        /// MiB in all.
        #[arg(long)]
        mib: usize,
        /// MiB at a time.
        #[arg(long)]
        step: usize,
    },
    /// Lend a VM to whoever holds the other end of standard input; the scale test does that.
    Lend,
    /// Make VMs and let them go, one after the other, and say how many; the scale test does that.
    Vms {
        /// How many at most.
        count: u32,
        /// For how long at most.
        seconds: u64,
        /// VMs that make no use of kvm_dlh, which need not be there: what goes wrong with those is not ours.
        #[arg(long)]
        stock: bool,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Ktap { only, subject } => {
            return if ktap::run(subject.cases(), &only) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
        Command::Measure { vcpus: Some(vcpus), .. } => measure::producers(vcpus),
        Command::Measure { exits: Some(laps), .. } => measure::exits(laps),
        Command::Measure { batch, laps, .. } => {
            batch.map_or_else(measure::measure, |batch| measure::repeat(batch, laps))
        }
        Command::Latency { spin_us, samples } => samples::latency(spin_us, samples),
        Command::Idle => samples::idle(),
        Command::Drains => samples::drains(),
        Command::Reclaim { laps } => laps.map_or_else(reclaim::reclaim, reclaim::repeat),
        Command::Herd { count, rings } => herd::herd(count, rings),
        Command::Flood { op, arg0, arg1 } => {
            tests::races::flood_forever(&Call { op: Operation(op), arg: [arg0, arg1] })
        }
        Command::Wait { how } => tests::waits::wait_for_ever(how),
        Command::Obey { memory } => tests::puppet::obey(memory),
        Command::Tenant { kinds, mib } => tenant::tenant(&kinds, mib),
        Command::Sweep { kind, mib, step } => tenant::sweep(kind, mib, step),
        Command::Lend => tests::lent::lend(),
        Command::Vms { count, seconds, stock } => tests::scale::come_and_go(count, seconds, stock),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dlh-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}
