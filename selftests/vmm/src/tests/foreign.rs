// SPDX-License-Identifier: GPL-2.0

//! VMs whose hypercalls KVM takes for Hyper-V's or Xen's: ours do not arrive, and are not mistaken for
//! it. Rings, which need none, go on.

use dlh_abi::{Error, Function, ABI_VERSION};

use super::{check_ring_works, check_vm_works};
use crate::hyperv::{ENABLE, MSR_GUEST_OS_ID, MSR_HYPERCALL, SOME_OS};
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::ring::{Ring, NOP};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Vm, VmConfig, BASE};

const FEATURES: u64 = Function::Features as u64;
const SETUP: u64 = Function::RingSetup as u64;
const TEARDOWN: u64 = Function::RingTeardown as u64;
const KICK: u64 = Function::Kick as u64;
const CALL: u64 = Function::Call as u64;

/// Where Hyper-V's hypercall page goes.
const HYPERCALL_PAGE: u64 = BASE + 0x10_0000;
/// What Hyper-V answers: success, no such call, reserved bits set.
const HV_SUCCESS: i64 = 0;
const HV_INVALID_CODE: i64 = 2;
const HV_INVALID_INPUT: i64 = 3;

/// What a Hyper-V guest gets for our hypercalls. It looks at RCX, which says what to do.
const HYPERV_ANSWERS: [([u64; 4], i64); 8] = [
    ([FEATURES, 0, 0, 0], HV_INVALID_CODE),
    // A bit of the address is a reserved one there.
    ([SETUP, BASE, 64, 0], HV_INVALID_INPUT),
    ([TEARDOWN, 0, 0, 0], HV_INVALID_CODE),
    ([KICK, 0, 0, 0], HV_INVALID_CODE),
    // "I have been spinning for long": whoever does not ask for FEATURES first is told that all is well.
    ([KICK, 8, 0, 0], HV_SUCCESS),
    ([CALL, NOP.op.0 as u64, 0, 0], HV_INVALID_CODE),
    ([99, 0, 0, 0], HV_INVALID_CODE),
    ([u64::MAX, 0, 0, 0], HV_INVALID_CODE),
];

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("a guest that could use Hyper-V and does not has everything", hyperv_unused),
        Case::new("hypercalls of a Hyper-V guest do not arrive", hyperv_used),
        Case::new("a ring goes on when its guest turns to Hyper-V", hyperv_ring),
        Case::new("the vCPUs of a Hyper-V guest are all its", hyperv_all_vcpus),
        Case::new("hypercalls of a Xen guest go to the VMM", xen),
        Case::new("a ring goes on when its VM turns into a Xen guest", xen_ring),
    ]
}

fn hyperv_vm(vcpus: usize) -> Result<Vm> {
    Vm::new(VmConfig { vcpus, hyperv: true, ..VmConfig::default() })
}

/// Has the guest say that it is one of Hyper-V's, as such guests do, and checks that it is one now.
fn announce(vm: &mut Vm, vcpu: usize) -> Result<()> {
    const VMCALL_RET: u32 = 0xc3c1_010f;
    const VMMCALL_RET: u32 = 0xc3d9_010f;

    vm.vcpus[vcpu].write_msr(MSR_GUEST_OS_ID, SOME_OS)?;
    vm.vcpus[vcpu].write_msr(MSR_HYPERCALL, HYPERCALL_PAGE | ENABLE)?;
    let page = vm.vcpus[vcpu].load(HYPERCALL_PAGE)?;
    check!([VMCALL_RET, VMMCALL_RET].contains(&page), "Hyper-V's hypercall page says {page:#x}");
    Ok(())
}

/// Has the guest say that it is not.
fn renounce(vm: &mut Vm, vcpu: usize) -> Result<()> {
    vm.vcpus[vcpu].write_msr(MSR_GUEST_OS_ID, 0)
}

/// Checks that FEATURES is answered by the module.
fn check_present(vm: &mut Vm) -> Result<()> {
    let rax = vm.hypercall(0, FEATURES, 0, 0, 0)?;
    check_eq!(rax >> 32, i64::from(ABI_VERSION), "version in FEATURES");
    Ok(())
}

/// Publishes in all ways from inside the guest, and checks that every entry is executed and that no
/// hypercall of ours arrives.
fn check_drained(vm: &mut Vm, ring: &mut Ring) -> Result<()> {
    let before = vm.stats()?;
    for (count, exit) in (1..).zip(Exit::ALL) {
        for _ in 0..count {
            ring.stage(&NOP)?;
        }
        let published = vm.vcpus[0].publish(ring, 0, exit)?;
        check_eq!(published.done, ring.tail(), "done as the guest sees it after {exit:?}");
        if matches!(exit, Exit::Hypercall | Exit::Kick) {
            check_eq!(published.result, HV_INVALID_CODE, "RAX of {exit:?}");
        }
    }
    let after = vm.stats()?;
    check_eq!(after.since(&before, "executed")?, 1 + 2 + 3 + 4 + 5, "entries executed");
    check_eq!(after.since(&before, "hypercalls")?, 0, "hypercalls that arrived");
    check_eq!(after.since(&before, "kicks")?, 0, "kicks that arrived");
    after.check_law()
}

fn hyperv_unused() -> CaseResult {
    let mut vm = hyperv_vm(1)?;
    // That there is such a register shows that the guest could.
    renounce(&mut vm, 0)?;
    check_present(&mut vm)?;
    check_eq!(vm.hypercall(0, CALL, NOP.op.0.into(), 0, 0)?, 0, "CALL of NOP");
    let rax = vm.hypercall(0, SETUP, BASE + 1, 64, 0)?;
    check_eq!(rax, Error::Align.to_rax(), "RING_SETUP at an odd address");
    let before = vm.stats()?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, u32::MAX - 2)?;
    for (round, exit) in (0..).zip(Exit::ALL.into_iter().cycle().take(50)) {
        let count = round % 65;
        for _ in 0..count {
            ring.stage(&NOP)?;
        }
        let published = vm.vcpus[0].publish(&mut ring, 0, exit)?;
        check_eq!(published.done, ring.tail(), "done as the guest sees it after {exit:?}");
        if exit == Exit::Kick {
            check_eq!(published.result, 0, "RAX of KICK");
        }
    }
    let after = vm.stats()?;
    check_eq!(after.since(&before, "executed")?, (0..50).sum::<u64>(), "entries executed");
    check_eq!(vm.hypercall(0, TEARDOWN, ring.id(), 0, 0)?, 0, "RING_TEARDOWN");
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn hyperv_used() -> CaseResult {
    let mut vm = hyperv_vm(1)?;
    for _ in 0..3 {
        announce(&mut vm, 0)?;
        let (memory, offset) = vm.memory_at(BASE)?;
        let mark = |at: usize| !(at as u64);
        memory.fill(offset, 4096, mark);
        let before = vm.stats()?;
        for (call, status) in HYPERV_ANSWERS {
            let [function, rcx, rdx, rsi] = call;
            let rax = vm.hypercall(0, function, rcx, rdx, rsi)?;
            check_eq!(rax, status, "RAX of {call:#x?}");
            check!(rax >> 32 != i64::from(ABI_VERSION), "{rax:#x} looks like a host of ours");
        }
        // Not one counter, not one byte.
        check_eq!(vm.stats()?, before, "statistics");
        check_eq!(memory.first_difference(offset, 4096, mark), None, "what was written to memory");
        renounce(&mut vm, 0)?;
        check_present(&mut vm)?;
        check_vm_works(&mut vm)?;
    }
    Ok(Verdict::Pass)
}

fn hyperv_ring() -> CaseResult {
    let mut vm = hyperv_vm(1)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 7)?;
    for _ in 0..3 {
        announce(&mut vm, 0)?;
        check_drained(&mut vm, &mut ring)?;
        // It cannot be taken down or replaced, by this guest or in its name.
        let before = vm.stats()?;
        vm.hypercall(0, TEARDOWN, ring.id(), 0, 0)?;
        vm.hypercall(0, SETUP, BASE, 64, 0)?;
        check_eq!(vm.stats()?, before, "statistics");
        check_drained(&mut vm, &mut ring)?;
        renounce(&mut vm, 0)?;
        ring.push(&NOP, 5)?;
        check_eq!(vm.hypercall(0, KICK, ring.id(), 0, 0)?, 0, "KICK");
        check_eq!(ring.done(), ring.tail(), "done after KICK");
    }
    check_eq!(vm.hypercall(0, TEARDOWN, ring.id(), 0, 0)?, 0, "RING_TEARDOWN");
    vm.stats()?.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

/// What one vCPU says of the guest holds for all.
fn hyperv_all_vcpus() -> CaseResult {
    let mut vm = hyperv_vm(2)?;
    check_ring_works(&mut vm, 1, BASE)?;
    announce(&mut vm, 1)?;
    let before = vm.stats()?;
    for vcpu in [0, 1] {
        let rax = vm.hypercall(vcpu, FEATURES, 0, 0, 0)?;
        check_eq!(rax, HV_INVALID_CODE, "FEATURES on vCPU {vcpu}");
    }
    check_eq!(vm.stats()?, before, "statistics");
    renounce(&mut vm, 0)?;
    for vcpu in [0, 1] {
        check_ring_works(&mut vm, vcpu, BASE)?;
    }
    Ok(Verdict::Pass)
}

fn xen() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    for round in 0..3 {
        vm.intercept_xen_hypercalls(true)?;
        let before = vm.stats()?;
        for (call, _) in HYPERV_ANSWERS {
            let answer = 0x1234_5678_9abc_def0 ^ call[0] ^ round;
            let rax = vm.vcpus[0].xen_hypercall(call, answer)?;
            check_eq!(rax as u64, answer, "RAX of {call:#x?}");
        }
        check_eq!(vm.stats()?, before, "statistics");
        vm.intercept_xen_hypercalls(false)?;
        check_present(&mut vm)?;
        check_vm_works(&mut vm)?;
    }
    Ok(Verdict::Pass)
}

fn xen_ring() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 7)?;
    vm.intercept_xen_hypercalls(true)?;
    let before = vm.stats()?;
    for round in 1..=10 {
        ring.push(&NOP, round)?;
        let stop = vm.vcpus[0].begin_hypercall([KICK, ring.id(), 0, 0])?;
        check!(matches!(stop, Stop::Xen { .. }), "KICK stopped with {stop:?}");
        check_eq!(ring.done(), ring.tail(), "done when the VMM is to answer for Xen");
        vm.vcpus[0].finish_xen_hypercall(0)?;
        for exit in [Exit::Cpuid, Exit::Pio, Exit::Hlt] {
            ring.stage(&NOP)?;
            let published = vm.vcpus[0].publish(&mut ring, 0, exit)?;
            check_eq!(published.done, ring.tail(), "done as the guest sees it after {exit:?}");
        }
    }
    let after = vm.stats()?;
    check_eq!(after.since(&before, "executed")?, (1..=10).sum::<u64>() + 30, "entries executed");
    check_eq!(after.since(&before, "hypercalls")?, 0, "hypercalls that arrived");
    after.check_law()?;
    vm.intercept_xen_hypercalls(false)?;
    check_eq!(vm.hypercall(0, TEARDOWN, ring.id(), 0, 0)?, 0, "RING_TEARDOWN");
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}
