// SPDX-License-Identifier: GPL-2.0

//! What is left when KVM_RUN returns, when a ring goes, and when a VM or the module does: nothing.

use std::process::Command;
use std::time::{Duration, Instant};

use dlh_abi::{Call, Function, Operation, RawEntry};

use crate::ktap::{check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping};
use crate::ring::{Ring, NOP};
use crate::stats;
use crate::thread::{wait_until, with_vcpu, PATIENCE};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Vm, VmConfig, BASE};

const MIB: usize = 1 << 20;
const PLACE: u64 = 0x8000_0000;
/// A report of this much filled memory keeps the worker busy for a while.
const SLOW: usize = 256 * MIB;
/// So many reports, while the worker and the vCPU thread look at the same ring.
const MANY: u64 = 200_000;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("a VM whose ring broke with a report pending goes", left_behind),
        Case::new("good entries never break a ring", false_broken),
        Case::new("nothing is pending when KVM_RUN returns", || slow_report(1)),
        Case::new("nor with two rings on one thread", || slow_report(2)),
        Case::new("nothing is pending when RING_TEARDOWN returns", teardown),
        Case::new("a ring that broke on another thread", follow),
        Case::new("the host has let go when it says that it is not there", enosys),
    ]
}

fn report(gpa: u64, bytes: u64) -> Call {
    Call { op: Operation::FREE_PAGES, arg: [gpa, bytes] }
}

fn filled() -> Result<Mapping> {
    let mapping = Mapping::new(Backing::Anonymous, SLOW)?;
    mapping.fill(0, SLOW, |at| at as u64 | 1);
    Ok(mapping)
}

/// A slow report and an entry with a wrong tag behind it, at an exit that KVM handles by itself.
fn left_behind() -> CaseResult {
    let pid = std::process::id();
    let before = stats::directories("kvm_dlh", pid)?.len();
    {
        let mut vm = Vm::new(VmConfig::default())?;
        vm.add_memory(PLACE, filled()?)?;
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
        ring.push(&report(PLACE, SLOW as u64), 1)?;
        spoil(&mut ring)?;
        vm.vcpus[0].exit(Exit::Cpuid)?;
        check_eq!(vm.stats()?.get("rings_broken")?, 1, "rings_broken");
        vm.vcpus[0].exit(Exit::Pio)?;
        check_eq!(vm.stats()?.get("pending")?, 0, "pending after a return to the VMM");
    }
    wait_until(PATIENCE, "the module has forgotten the VM", || {
        stats::directories("kvm_dlh", pid).is_ok_and(|left| left.len() <= before)
    })?;
    Ok(Verdict::Pass)
}

fn spoil(ring: &mut Ring) -> Result<()> {
    let position = ring.tail();
    let raw = ring.prepare(&NOP).ok_or("the ring is full")?;
    ring.write_entry(position, &RawEntry { tag: 1, ..raw });
    ring.publish();
    Ok(())
}

/// The worker moves done while the vCPU thread looks at it.
fn false_broken() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, 64 * MIB)?)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let mut vcpu = vm.vcpus.remove(0);
    let call = report(PLACE, 4096);
    with_vcpu(
        &mut vcpu,
        |vcpu| vcpu.flood(&mut ring, &call, u64::MAX, |stop| stop != Stop::Interrupted),
        || {
            wait_until(PATIENCE, "many reports have been executed", || {
                vm.stats().and_then(|now| now.get("executed")).is_ok_and(|n| n > MANY)
            })
        },
    )?;
    let stats = vm.stats()?;
    println!("# {} entries executed", stats.get("executed")?);
    check_eq!(stats.get("rings_broken")?, 0, "good rings that were declared broken");
    Ok(Verdict::Pass)
}

/// The return comes right after an exit at which the report was taken and not waited for.
fn slow_report(vcpus: usize) -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus, ..VmConfig::default() })?;
    vm.add_memory(PLACE, filled()?)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    ring.push(&NOP, 1)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    if vcpus == 2 {
        let mut other = Ring::set_up(&mut vm, 1, BASE + MIB as u64, 64, 0)?;
        other.push(&NOP, 1)?;
        vm.vcpus[1].exit(Exit::Pio)?;
    }
    ring.push(&report(PLACE, SLOW as u64), 1)?;
    vm.vcpus[0].exit(Exit::Cpuid)?;
    check_eq!(ring.done(), ring.tail(), "done when KVM_RUN has returned");
    check_eq!(vm.stats()?.get("pending")?, 0, "pending when KVM_RUN has returned");
    Ok(Verdict::Pass)
}

fn teardown() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    vm.add_memory(PLACE, filled()?)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    ring.push(&report(PLACE, SLOW as u64), 1)?;
    // Taken at the exit of the hypercall itself, or not at all; never half done.
    let rax = vm.hypercall(0, Function::RingTeardown as u64, ring.id(), 0, 0)?;
    check_eq!(rax, 0, "RING_TEARDOWN");
    check_eq!(vm.stats()?.get("pending")?, 0, "pending after RING_TEARDOWN");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

/// The thread that finds out is not the one that used the ring before. Whether anything stayed shows when
/// the module goes.
fn follow() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    ring.push(&NOP, 1)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    spoil(&mut ring)?;
    let mut vcpu = vm.vcpus.remove(0);
    let id = ring.id();
    with_vcpu(&mut vcpu, |vcpu| vcpu.hypercall(Function::Kick as u64, id, 0, 0), || Ok(()))?;
    vm.vcpus.push(vcpu);
    check_eq!(vm.stats()?.get("rings_broken")?, 1, "rings_broken");
    Ok(Verdict::Pass)
}

/// Removes the modules, and expects a stock host afterwards.
fn enosys() -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    ring.push(&NOP, 1)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    let remover =
        std::thread::spawn(|| Command::new("rmmod").args(["ksm_bridge", "kvm_dlh"]).status());
    let id = ring.id();
    while vm.hypercall(1, Function::Kick as u64, id, 0, 0)? == 0 {}
    // The guest has been told that its ring is none; the memory is its own again.
    let done = ring.done();
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(2) && ring.push(&NOP, 1).is_ok() {
        vm.vcpus[0].exit(Exit::Pio)?;
        check_eq!(ring.done(), done, "done after the host let go");
    }
    let removed = remover.join().map_err(|_| "the thread that removes the modules died")??;
    check_eq!(removed.code(), Some(0), "rmmod");
    let features = vm.hypercall(0, Function::Features as u64, 0, 0, 0)?;
    check_eq!(features, -1000, "FEATURES afterwards");
    Ok(Verdict::Pass)
}
