// SPDX-License-Identifier: GPL-2.0

//! What calls cost, seen from the guest, in ticks of its time-stamp counter. Where instructions are
//! counted (`-icount shift=0`) a tick is an instruction, of the guest and the host together.

use dlh_abi::{Cookie, Function, RingSize, HEADER_BYTES, HYPERCALL_NR};

use crate::{
    ktap::{check_eq, Result},
    ring::{Ring, NOP},
    vcpu::Vcpu,
    vm::{Vm, VmConfig, BASE},
};

/// Rounds of a measurement; the best of several is taken, as interrupts only ever add.
const LAPS: u64 = 200;
const REPEATS: usize = 5;

/// Calls that are handed over before each exit.
const BATCHES: [u64; 4] = [1, 8, 32, 512];

/// Where the guest has no memory.
const MMIO: u64 = 0x4000_0000;

/// A hypercall that KVM answers by itself.
const OTHER: u64 = 0x7fff;
/// What it answers.
const KVM_ENOSYS: i64 = -1000;

fn best(vcpu: &mut Vcpu, ring: &mut Ring, batch: u64) -> Result<(f64, f64)> {
    let mut best = (f64::MAX, f64::MAX);
    for _ in 0..REPEATS {
        let (all, filling) = vcpu.measure(ring, &NOP, batch, LAPS)?;
        let lap = |ticks: u64| ticks as f64 / LAPS as f64;
        best = (best.0.min(lap(all)), best.1.min(lap(filling)));
    }
    Ok(best)
}

/// Repeats one batch size, and prints what a round comes to: something to look at with a profiler.
pub(crate) fn repeat(batch: u64, laps: u64) -> Result<()> {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 1024, 0)?;
    let (all, _) = vm.vcpus[0].measure(&mut ring, &NOP, batch, laps)?;
    println!("round_b{batch} {:.1}", all as f64 / laps as f64);
    Ok(())
}

/// Prints what an entry costs with a ring on each of `vcpus` vCPUs, filled in turn, 32 before each exit.
pub(crate) fn producers(vcpus: usize) -> Result<()> {
    const BATCH: u64 = 32;
    let mut vm = Vm::new(VmConfig { vcpus, ..VmConfig::default() })?;
    let place = |i: usize| BASE + 0x1_0000 * i as u64;
    let mut rings = (0..vcpus)
        .map(|i| Ring::set_up(&mut vm, i, place(i), 1024, 0))
        .collect::<Result<Vec<_>>>()?;
    let mut sum = 0.0;
    for (vcpu, ring) in vm.vcpus.iter_mut().zip(&mut rings) {
        let (empty, _) = best(vcpu, ring, 0)?;
        sum += best(vcpu, ring, BATCH)?.0 - empty;
    }
    println!("deferred_total_b{BATCH} {:.1}", sum / (vcpus as u64 * BATCH) as f64);
    Ok(())
}

/// Exits with CPUID and nothing else, with an empty ring if the module is there: for something that looks from
/// outside.
pub(crate) fn exits(laps: u64) -> Result<()> {
    let mut vm = Vm::new(VmConfig::default())?;
    if vm.hypercall(0, Function::Features as u64, 0, 0, 0)? >= 0 {
        Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    }
    let ticks = vm.vcpus[0].measure_exit(laps)?;
    println!("exit {:.1}", ticks as f64 / laps as f64);
    Ok(())
}

/// Ticks of a lap: the best of several repeats.
fn best_lap(mut laps: impl FnMut(u64) -> Result<u64>) -> Result<f64> {
    let mut best = u64::MAX;
    for _ in 0..REPEATS {
        best = best.min(laps(LAPS)?);
    }
    Ok(best as f64 / LAPS as f64)
}

/// Ticks of a hypercall that is made again and again, and answers `expected`.
fn hypercall(vcpu: &mut Vcpu, number: u64, arguments: [u64; 3], expected: i64) -> Result<f64> {
    best_lap(|laps| {
        let (ticks, result) = vcpu.measure_hypercall(number, arguments, laps)?;
        check_eq!(result, expected, "result of a hypercall that is measured");
        Ok(ticks)
    })
}

/// Ticks of a store that KVM puts aside for the VMM: what it has of its own to defer a guest's request. The
/// guest exits for each all the same.
fn coalesced_store(vm: &mut Vm) -> Result<f64> {
    // What KVM's ring of one page holds, and no more: a full one has the VMM look.
    const STORES: u64 = 100;
    let mut least = u64::MAX;
    vm.coalesce(MMIO)?;
    for _ in 0..REPEATS {
        least = least.min(vm.vcpus[0].measure_store(MMIO, STORES)?);
        check_eq!(vm.vcpus[0].take_coalesced()?, STORES, "stores that KVM has put aside");
    }
    Ok(least as f64 / STORES as f64)
}

/// Prints `name ticks` lines. Without the module there are only an exit and the hypercall that KVM answers.
pub(crate) fn measure() -> Result<()> {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let mut absent = Ring::unregistered(
        &vm,
        BASE,
        RingSize::try_from(64).map_err(|e| format!("{e:?}"))?,
        Cookie(1),
        0,
    )?;
    println!("exit {:.1}", best_lap(|laps| vm.vcpus[0].measure_exit(laps))?);
    println!("hypercall {:.1}", hypercall(&mut vm.vcpus[0], OTHER, [0; 3], KVM_ENOSYS)?);
    println!("coalesced_mmio {:.1}", coalesced_store(&mut vm)?);
    if vm.hypercall(0, Function::Features as u64, 0, 0, 0)? < 0 {
        return Ok(());
    }
    let call = [Function::Call as u64, NOP.op.0.into(), 0];
    println!("inserted_b1 {:.1}", hypercall(&mut vm.vcpus[0], HYPERCALL_NR, call, 0)?);
    let mut array = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    for _ in 0..32 {
        // Any tags will do there.
        array.place(&NOP)?;
    }
    vm.hypercall(0, Function::RingTeardown as u64, array.id(), 0, 0)?;
    let calls = [Function::Calls as u64, BASE + HEADER_BYTES as u64, 32];
    let all = hypercall(&mut vm.vcpus[0], HYPERCALL_NR, calls, 32)?;
    println!("inserted_b32 {:.1}", all / 32.0);

    // Another VM has a ring; then another vCPU; then this one.
    let mut other = Vm::new(VmConfig::default())?;
    let others = Ring::set_up(&mut other, 0, BASE, 64, 0)?;
    println!("exit_other_vm {:.1}", best_lap(|laps| vm.vcpus[0].measure_exit(laps))?);
    let second = Ring::set_up(&mut vm, 1, BASE + 0x10_0000, 64, 0)?;
    println!("exit_other_vcpu {:.1}", best_lap(|laps| vm.vcpus[0].measure_exit(laps))?);
    vm.hypercall(1, Function::RingTeardown as u64, second.id(), 0, 0)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 1024, 0)?;
    println!("exit_ring_empty {:.1}", best_lap(|laps| vm.vcpus[0].measure_exit(laps))?);
    let vcpu = &mut vm.vcpus[0];
    // Once around: none of its pages is new then.
    vcpu.measure(&mut ring, &NOP, 512, 4)?;
    // An exit with nothing in the ring; what is added to it below is the calls' own.
    let (empty, timing) = best(vcpu, &mut ring, 0)?;
    for batch in BATCHES {
        let (all, filling) = best(vcpu, &mut ring, batch)?;
        let a_call = |ticks: f64| ticks / batch as f64;
        println!("deferred_guest_b{batch} {:.1}", a_call(filling - timing));
        println!("deferred_total_b{batch} {:.1}", a_call(all - empty));
    }
    vm.hypercall(0, Function::RingTeardown as u64, ring.id(), 0, 0)?;
    let (bare, _) = best(&mut vm.vcpus[0], &mut absent, 0)?;
    println!("round {bare:.1}");
    other.hypercall(0, Function::RingTeardown as u64, others.id(), 0, 0)?;
    println!("exit_after_all {:.1}", best_lap(|laps| vm.vcpus[0].measure_exit(laps))?);
    Ok(())
}
