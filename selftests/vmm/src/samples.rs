// SPDX-License-Identifier: GPL-2.0

//! How calls and exits are spread, not only what they come to: for the benchmarks. In ticks of the guest's
//! time-stamp counter, as in [`measure`](crate::measure).

use std::sync::atomic::Ordering;

use dlh_abi::{Call, Operation};

use crate::{
    ktap::{failed, Result},
    ring::{Ring, NOP},
    stats::directories,
    vm::{Vm, VmConfig, BASE},
};

/// Samples of a distribution: enough for its 99th percentile.
const SAMPLES: u64 = 1000;
/// What there is room for.
const MOST_SAMPLES: u64 = 4096;
/// Where the guest puts them.
const PLACE: u64 = BASE + 0x20_0000;
/// What costs the host the most of what is built in, where nobody listens to it: it looks at the clock.
const TRACE: Call = Call { op: Operation::TRACE, arg: [1, 2] };

/// What the guest has stored, ascending.
fn collect(vm: &Vm, samples: u64) -> Result<Vec<u64>> {
    let (memory, offset) = vm.memory_at(PLACE)?;
    let word = |i: u64| memory.word(offset + 8 * i as usize).load(Ordering::SeqCst);
    let mut all: Vec<u64> = (0..samples).map(word).collect();
    all.sort_unstable();
    Ok(all)
}

fn print(name: &str, sorted: &[u64]) {
    let at = |permille: usize| sorted[(sorted.len() - 1) * permille / 1000];
    println!("{name}_p50 {}", at(500));
    println!("{name}_p99 {}", at(990));
    println!("{name}_max {}", at(1000));
}

/// Prints how long an entry waits for a guest that does not exit by itself, in ticks: `samples` of them. Between
/// two it is busy for `spin_us` at most.
pub(crate) fn latency(spin_us: u64, samples: u64) -> Result<()> {
    if !(1..=MOST_SAMPLES).contains(&samples) {
        return failed(format!("{samples} samples: must be 1 to {MOST_SAMPLES}"));
    }
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 1024, 0)?;
    let spin = spin_us * u64::from(vm.vcpus[0].tsc_khz()?) / 1000;
    // The golden ratio: so they begin at all times between two exits, evenly.
    let step = spin * 618 / 1000 + 7;
    vm.vcpus[0].sample_waits(&mut ring, &NOP, (PLACE, samples), (step, spin))?;
    print("wait", &collect(&vm, samples)?);
    println!("tsc_khz {}", vm.vcpus[0].tsc_khz()?);
    Ok(())
}

/// A guest that has the host trace an event and halts, again and again: the event's first word is the guest's
/// time-stamp counter when it wrote it. Prints how far that is ahead of the host's.
pub(crate) fn idle() -> Result<()> {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 1024, 0)?;
    println!("tsc_offset {}", tsc_offset()?);
    vm.vcpus[0].sample_idle(&mut ring, &TRACE, SAMPLES)
}

/// What KVM says of the only vCPU of this process.
fn tsc_offset() -> Result<i64> {
    let [vm] = &directories("kvm", std::process::id())?[..] else {
        return failed("debugfs does not know this VM");
    };
    let offset = std::fs::read_to_string(vm.join("vcpu0/tsc-offset"))?;
    offset.trim().parse().map_err(|e| format!("tsc-offset {offset:?}: {e}").into())
}

/// Prints how long an exit takes, in ticks: with an empty ring, and with one that a guest floods.
pub(crate) fn drains() -> Result<()> {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 4096, 0)?;
    for (name, call, batch) in [
        ("exit_empty", &NOP, 0),
        ("exit_flood_nop", &NOP, 4096),
        ("exit_flood_trace", &TRACE, 4096),
    ] {
        vm.vcpus[0].sample_exits(&mut ring, call, (PLACE, SAMPLES), batch)?;
        print(name, &collect(&vm, SAMPLES)?);
    }
    println!("tsc_khz {}", vm.vcpus[0].tsc_khz()?);
    Ok(())
}
