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
    },
    /// Keep a VM busy with a call until killed; the tests do that.
    Flood { op: u16, arg0: u64, arg1: u64 },
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
        Command::Flood { op, arg0, arg1 } => {
            match tests::races::flood_forever(&Call { op: Operation(op), arg: [arg0, arg1] }) {
                Ok(()) => true,
                Err(error) => {
                    eprintln!("dlh-vmm: {error}");
                    false
                }
            }
        }
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
