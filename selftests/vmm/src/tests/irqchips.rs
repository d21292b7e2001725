// SPDX-License-Identifier: GPL-2.0

//! vCPUs that wait in the kernel: what they published is executed before they do.

use std::sync::atomic::Ordering;

use dlh_abi::{header, Function};

use super::check_vm_works;
use crate::ktap::{check, check_eq, Case, CaseResult, Verdict};
use crate::ring::{Ring, NOP};
use crate::thread::{wait_until, with_vcpu, PATIENCE};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Irqchip, Vm, VmConfig, BASE};

/// Entries that are executed at any exit: the default of the module's budget_entries.
const BUDGET: u32 = 512;

pub(super) fn cases() -> Vec<Case> {
    [Irqchip::Split, Irqchip::Kernel]
        .into_iter()
        .map(|irqchip| {
            let name = format!("entries are executed before a vCPU waits, {irqchip:?}");
            Case::new(name, move || before_waiting(irqchip))
        })
        .collect()
}

fn before_waiting(irqchip: Irqchip) -> CaseResult {
    let mut vm = Vm::new(VmConfig { irqchip, vcpus: 2, ..VmConfig::default() })?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 1024, u32::MAX - 50)?;
    let before = vm.stats()?;
    let mut executed = 0;
    for count in [1, 0, 3, BUDGET, 64, 1024, 400] {
        for _ in 0..count {
            ring.stage(&NOP)?;
        }
        let (start, tail, id) = (ring.done(), ring.tail(), ring.id());
        let (memory, offset) = vm.memory_at(BASE)?;
        let done = || memory.word32(offset + header::DONE).load(Ordering::SeqCst);
        let mut vcpu = vm.vcpus.remove(0);
        let (stop, ()) = with_vcpu(
            &mut vcpu,
            |vcpu| vcpu.begin_publish(&mut ring, 0, Exit::Hlt),
            || {
                wait_until(PATIENCE, "the vCPU waits in the kernel", || {
                    vm.blocking().is_ok_and(|waiting| waiting == 1)
                })?;
                // At the first sight of it waiting, and nothing wakes it. What is over the budget may have
                // to wait as well; whoever needs it asks for it.
                let seen = done().wrapping_sub(start);
                let good = (count.min(BUDGET)..=count).contains(&seen);
                check!(good, "when the vCPU waits, {seen} of {count} entries are done");
                let rax = vm.vcpus[0].hypercall(Function::Kick as u64, id, 0, 0)?;
                check_eq!(rax, 0, "KICK by another vCPU meanwhile");
                check_eq!(done(), tail, "done after the KICK");
                check_eq!(vm.blocking()?, 1, "vCPUs that wait after the KICK");
                Ok(())
            },
        )?;
        check_eq!(stop, Stop::Interrupted, "how the vCPU stopped");
        vcpu.park()?;
        vm.vcpus.insert(0, vcpu);
        executed += u64::from(count);
    }
    let after = vm.stats()?;
    check_eq!(after.since(&before, "executed")?, executed, "entries executed");
    check_eq!(after.get("pending")?, 0, "calls pending");
    after.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}
