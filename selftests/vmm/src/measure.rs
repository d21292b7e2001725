// SPDX-License-Identifier: GPL-2.0

//! What calls cost, seen from the guest, in ticks of its time-stamp counter. Where instructions are
//! counted (`-icount shift=0`) a tick is an instruction, of the guest and the host together.

use dlh_abi::{Cookie, Function, RingSize};

use crate::{
    ktap::Result,
    ring::{Ring, NOP},
    vcpu::Vcpu,
    vm::{Vm, VmConfig, BASE},
};

/// Rounds of a measurement; the best of several is taken, as interrupts only ever add.
const LAPS: u64 = 200;
const REPEATS: usize = 5;

/// Calls that are handed over before each exit.
const BATCHES: [u64; 4] = [1, 8, 32, 512];

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

/// Prints `name ticks` lines. Without the module there is only the hypercall that KVM answers.
pub(crate) fn measure() -> Result<()> {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut absent = Ring::unregistered(
        &vm,
        BASE,
        RingSize::try_from(64).map_err(|e| format!("{e:?}"))?,
        Cookie(1),
        0,
    )?;
    let (bare, _) = best(&mut vm.vcpus[0], &mut absent, 0)?;
    println!("other_hypercall {bare:.1}");
    if vm.hypercall(0, Function::Features as u64, 0, 0, 0)? < 0 {
        return Ok(());
    }
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 1024, 0)?;
    let vcpu = &mut vm.vcpus[0];
    // An exit with nothing in the ring; what is added to it below is the calls' own.
    let (empty, timing) = best(vcpu, &mut ring, 0)?;
    println!("other_hypercall_ring_empty {empty:.1}");
    for batch in BATCHES {
        let (all, filling) = best(vcpu, &mut ring, batch)?;
        let a_call = |ticks: f64| ticks / batch as f64;
        println!("deferred_guest_b{batch} {:.1}", a_call(filling - timing));
        println!("deferred_total_b{batch} {:.1}", a_call(all - empty));
    }
    Ok(())
}
