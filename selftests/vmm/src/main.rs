// SPDX-License-Identifier: GPL-2.0

//! A VMM for the tests: it plays guests that do what no ordinary guest does.
//!
//! It runs in the host under test. Each subject in `tests` is a set of cases, printed as KTAP.

mod boot;
mod guest;
mod ktap;
mod measure;
mod memory;
mod ring;
mod stats;
mod tests;
mod thread;
mod vcpu;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    },
    /// Make many VMs, say `ready` with the microseconds it took for each, do the same for a call of each
    /// VM at each line of the input, and keep them until it ends.
    Herd {
        /// How many.
        count: usize,
    },
    /// Keep a VM busy until killed; the races test does that.
    Flood,
}

fn main() -> ExitCode {
    let good = match Arguments::parse().command {
        Command::Ktap { only, subject } => ktap::run(subject.cases(), &only),
        Command::Measure { batch, laps } => {
            match batch.map_or_else(measure::measure, |batch| measure::repeat(batch, laps)) {
                Ok(()) => true,
                Err(error) => {
                    eprintln!("dlh-vmm: {error}");
                    false
                }
            }
        }
        Command::Herd { count } => match herd(count) {
            Ok(()) => true,
            Err(error) => {
                eprintln!("dlh-vmm: {error}");
                false
            }
        },
        Command::Flood => match tests::races::flood_forever() {
            Ok(()) => true,
            Err(error) => {
                eprintln!("dlh-vmm: {error}");
                false
            }
        },
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Small VMs, whose vCPU makes a call when they are made, and again for each line of the input.
fn herd(count: usize) -> ktap::Result<()> {
    let begin = std::time::Instant::now();
    let config = vm::VmConfig { memory: 0, ..vm::VmConfig::default() };
    let mut vms = (0..count).map(|_| vm::Vm::new(config)).collect::<ktap::Result<Vec<_>>>()?;
    println!("ready {}", begin.elapsed().as_micros() as f64 / count.max(1) as f64);
    for line in std::io::stdin().lines() {
        line?;
        let begin = std::time::Instant::now();
        for vm in &mut vms {
            vm.hypercall(0, dlh_abi::Function::Features as u64, 0, 0, 0)?;
        }
        println!("ready {}", begin.elapsed().as_micros() as f64 / count.max(1) as f64);
    }
    Ok(())
}
