// SPDX-License-Identifier: GPL-2.0

//! Modules that come and go while VMs run. The subject inserts and removes them by itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::Barrier;
use std::time::Duration;

use dlh_abi::{has_passed, Call, Error, Function, Operation, FEATURE_FREE_PAGES};

use super::{check_ring_works, check_vm_works};
use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping};
use crate::ring::{Ring, NOP};
use crate::stats::{self, vms};
use crate::thread::{wait_until, with_vcpu, PATIENCE};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Vm, VmConfig, BASE};

const FEATURES: u64 = Function::Features as u64;
/// What a host without the module answers.
const KVM_ENOSYS: i64 = -1000;
/// Where memory to report is.
const PLACE: u64 = 0x2000_0000;
const ROUNDS: u32 = 8;

/// What a case is made of.
type Entry = (&'static str, fn(&Modules) -> CaseResult);

pub(super) fn cases(modules: PathBuf) -> Vec<Case> {
    let modules = Rc::new(Modules(modules));
    const CASES: &[Entry] = &[
        ("a VM that was there before the module", vm_was_first),
        ("all vCPUs of a VM that was first make its first call", first_calls),
        ("a VM that outlives the module", vm_outlives),
        ("the module goes while entries flow", goes_in_a_flood),
        ("the module comes and goes while entries flow", comes_and_goes),
        ("the module comes and goes without any VM", without_vms),
        ("the bridge goes while reports flow", bridge_goes),
        ("the module cannot go while the bridge uses it", bridge_holds),
        ("KVM's own module is reloaded below the module", kvm_reloaded),
    ];
    CASES
        .iter()
        .map(|&(name, run)| {
            let modules = modules.clone();
            Case::new(name, move || {
                let result = run(&modules);
                // Whatever happened, the next case finds a stock host.
                let _ = modules.remove("ksm_bridge");
                let _ = modules.remove("kvm_dlh");
                result
            })
        })
        .collect()
}

/// The directory with the module files.
pub(super) struct Modules(pub(super) PathBuf);

impl Modules {
    pub(super) fn insert(&self, name: &str) -> Result<()> {
        run(Command::new("insmod").arg(self.0.join(format!("{name}.ko"))))
    }

    pub(super) fn remove(&self, name: &str) -> Result<()> {
        run(Command::new("rmmod").arg(name))
    }
}

pub(super) fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    failed(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

fn check_absent(vm: &mut Vm) -> Result<()> {
    for function in 0..5 {
        let rax = vm.hypercall(0, function, BASE, 64, 0)?;
        check_eq!(rax, KVM_ENOSYS, "function {function} without the module");
    }
    Ok(())
}

fn vm_was_first(modules: &Modules) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    check_absent(&mut vm)?;
    for _ in 0..3 {
        modules.insert("kvm_dlh")?;
        check!(vm.hypercall(0, FEATURES, 0, 0, 0)? > 0, "FEATURES failed");
        check_vm_works(&mut vm)?;
        modules.remove("kvm_dlh")?;
        check_absent(&mut vm)?;
    }
    Ok(Verdict::Pass)
}

/// They meet in making the VM's queue: it is one, under the VM's name.
fn first_calls(modules: &Modules) -> CaseResult {
    const VCPUS: usize = 8;
    let mut vm = Vm::new(VmConfig { vcpus: VCPUS, ..VmConfig::default() })?;
    for _ in 0..ROUNDS {
        modules.insert("kvm_dlh")?;
        let start = Barrier::new(VCPUS);
        std::thread::scope(|scope| {
            let callers: Vec<_> = vm
                .vcpus
                .iter_mut()
                .map(|vcpu| {
                    scope.spawn(|| {
                        start.wait();
                        vcpu.hypercall(FEATURES, 0, 0, 0)
                    })
                })
                .collect();
            callers.into_iter().try_for_each(|caller| -> Result<()> {
                let rax = caller.join().map_err(|_| "a vCPU thread panicked")??;
                check!(rax > 0, "FEATURES failed");
                Ok(())
            })
        })?;
        let names = stats::directories("kvm_dlh", std::process::id())?;
        check_eq!(names.len(), 1, "queues of one VM: {names:?}");
        check_eq!(vm.stats()?.get("hypercalls")?, VCPUS as u64, "calls that its queue has counted");
        check_vm_works(&mut vm)?;
        modules.remove("kvm_dlh")?;
    }
    Ok(Verdict::Pass)
}

fn vm_outlives(modules: &Modules) -> CaseResult {
    modules.insert("kvm_dlh")?;
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    ring.push(&NOP, 5)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    modules.remove("kvm_dlh")?;
    ring.push(&NOP, 5)?;
    let memory = ring.snapshot();
    for exit in [Exit::Cpuid, Exit::Pio, Exit::Hlt, Exit::Hypercall] {
        vm.vcpus[0].exit(exit)?;
    }
    check!(ring.snapshot() == memory, "a module that is gone wrote to the ring");
    check_absent(&mut vm)?;
    drop((ring, vm));

    // And one that is still there when the module has come back.
    modules.insert("kvm_dlh")?;
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    modules.remove("kvm_dlh")?;
    modules.insert("kvm_dlh")?;
    ring.push(&NOP, 5)?;
    let memory = ring.snapshot();
    for exit in [Exit::Cpuid, Exit::Pio, Exit::Hlt, Exit::Hypercall] {
        vm.vcpus[0].exit(exit)?;
    }
    check!(ring.snapshot() == memory, "the module wrote to a ring of its former life");
    let rax = vm.hypercall(0, Function::Kick as u64, ring.id(), 0, 0)?;
    check_eq!(rax, Error::NoRing.to_rax(), "KICK of a ring of the module's former life");
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn goes_in_a_flood(modules: &Modules) -> CaseResult {
    for round in 0..ROUNDS {
        modules.insert("kvm_dlh")?;
        let mut vm = Vm::new(VmConfig::default())?;
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 1024, round)?;
        let mut vcpu = vm.vcpus.remove(0);
        with_vcpu(
            &mut vcpu,
            |vcpu| vcpu.flood(&mut ring, &NOP, u64::MAX, |stop| stop != Stop::Interrupted),
            || {
                std::thread::sleep(Duration::from_millis(round.into()));
                modules.remove("kvm_dlh")
            },
        )?;
        vm.vcpus.push(vcpu);
        check_absent(&mut vm)?;
        let memory = ring.snapshot();
        vm.vcpus[0].exit(Exit::Pio)?;
        check!(ring.snapshot() == memory, "a module that is gone wrote to the ring");
    }
    Ok(Verdict::Pass)
}

fn comes_and_goes(modules: &Modules) -> CaseResult {
    modules.insert("kvm_dlh")?;
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let mut vcpu = vm.vcpus.remove(0);
    with_vcpu(
        &mut vcpu,
        |vcpu| vcpu.flood(&mut ring, &NOP, u64::MAX, |stop| stop != Stop::Interrupted),
        || {
            for _ in 0..ROUNDS {
                modules.remove("kvm_dlh")?;
                check_absent(&mut vm)?;
                modules.insert("kvm_dlh")?;
                check!(vm.hypercall(0, FEATURES, 0, 0, 0)? > 0, "FEATURES failed");
                // Number 0 is the other vCPU: the first one has been taken out.
                check_ring_works(&mut vm, 0, BASE + 0x10_0000)?;
            }
            Ok(())
        },
    )?;
    vm.vcpus.insert(0, vcpu);
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn without_vms(modules: &Modules) -> CaseResult {
    for _ in 0..ROUNDS {
        modules.insert("kvm_dlh")?;
        modules.insert("ksm_bridge")?;
        modules.remove("ksm_bridge")?;
        modules.remove("kvm_dlh")?;
    }
    Ok(Verdict::Pass)
}

fn bridge_goes(modules: &Modules) -> CaseResult {
    let len = 4 << 20;
    modules.insert("kvm_dlh")?;
    let mut vm = Vm::new(VmConfig::default())?;
    let slot = vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, len)?)?;
    let memory = vm.region(slot).mapping.clone();
    let report = Call { op: Operation::FREE_PAGES, arg: [PLACE, len as u64] };
    for round in 0..ROUNDS {
        modules.insert("ksm_bridge")?;
        let features = vm.hypercall(0, FEATURES, 0, 0, 0)? as u64;
        check!(features & u64::from(FEATURE_FREE_PAGES) != 0, "no FREE_PAGES in {features:#x}");
        memory.fill(0, len, |at| !(at as u64));
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, round)?;
        let mut vcpu = vm.vcpus.remove(0);
        with_vcpu(
            &mut vcpu,
            |vcpu| vcpu.flood(&mut ring, &report, u64::MAX, |stop| stop != Stop::Interrupted),
            || {
                std::thread::sleep(Duration::from_millis(round.into()));
                modules.remove("ksm_bridge")
            },
        )?;
        vm.vcpus.push(vcpu);
        vm.vcpus[0].exit(Exit::Pio)?;
        let last = ring.tail().wrapping_sub(1);
        let passed = || has_passed(ring.done(), last);
        if let Err(error) = wait_until(PATIENCE, "the last report is done", passed) {
            let (done, tail, flags) = (ring.done(), ring.tail(), ring.flags());
            return failed(format!(
                "{error}, round {round}\ndone {done:#x}, tail {tail:#x}, flags {flags}\n{}",
                vm.describe()
            ));
        }
        // Without the bridge nobody touches the memory.
        memory.fill(0, len, |at| at as u64 ^ 0x5555);
        ring.push(&report, 1)?;
        vm.vcpus[0].exit(Exit::Pio)?;
        let status = i64::from(ring.status(ring.tail().wrapping_sub(1)));
        check_eq!(status, Error::Operation.to_rax(), "status of a report without the bridge");
        let lost = memory.first_difference(0, len, |at| at as u64 ^ 0x5555);
        check_eq!(lost, None, "offset of lost data");
        let features = vm.hypercall(0, FEATURES, 0, 0, 0)? as u64;
        check!(features & u64::from(FEATURE_FREE_PAGES) == 0, "FREE_PAGES in {features:#x}");
        vm.stats()?.check_law()?;
    }
    Ok(Verdict::Pass)
}

fn bridge_holds(modules: &Modules) -> CaseResult {
    modules.insert("kvm_dlh")?;
    modules.insert("ksm_bridge")?;
    check!(modules.remove("kvm_dlh").is_err(), "kvm_dlh went away below ksm_bridge");
    let mut vm = Vm::new(VmConfig::default())?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn kvm_reloaded(modules: &Modules) -> CaseResult {
    let vendor = if Path::new("/sys/module/kvm_amd").exists() { "kvm_amd" } else { "kvm_intel" };
    for _ in 0..3 {
        modules.insert("kvm_dlh")?;
        let mut vm = Vm::new(VmConfig::default())?;
        check_vm_works(&mut vm)?;
        drop(vm);
        // KVM frees a VM a moment after its last descriptor is closed.
        wait_until(PATIENCE, "the VM has gone", || vms("kvm_dlh").is_ok_and(|count| count == 0))?;
        let removed = modules.remove(vendor);
        if let Err(error) = &removed {
            println!("# {error}");
        } else {
            run(Command::new("modprobe").arg(vendor))?;
        }
        let mut vm = Vm::new(VmConfig::default())?;
        check_vm_works(&mut vm)?;
        drop(vm);
        modules.remove("kvm_dlh")?;
        // Below nothing of ours, it must go in any case.
        wait_until(PATIENCE, "KVM's module goes", || modules.remove(vendor).is_ok())?;
        run(Command::new("modprobe").arg(vendor))?;
    }
    Ok(Verdict::Pass)
}
