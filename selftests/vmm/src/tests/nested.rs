// SPDX-License-Identifier: GPL-2.0

//! A guest's own guest: what it asks for is refused; what the guest left in its ring is executed.

use std::sync::Arc;

use dlh_abi::{Error, Function};

use super::check_vm_works;
use crate::hyperv::{DIRECT_HYPERCALL, ENABLE, MSR_ASSIST_PAGE, MSR_GUEST_OS_ID, SOME_OS};
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::Mapping;
use crate::ring::{Ring, NOP};
use crate::svm::{
    self, Intercept, EFER, EXIT_INVALID_OPCODE, EXIT_VMMCALL, EXIT_VMRUN, MSR_EFER, MSR_HSAVE,
};
use crate::vcpu::{Exit, Vcpu};
use crate::vm::{Vm, VmConfig, BASE};

const FEATURES: u64 = Function::Features as u64;
const SETUP: u64 = Function::RingSetup as u64;
const TEARDOWN: u64 = Function::RingTeardown as u64;
const KICK: u64 = Function::Kick as u64;
const CALL: u64 = Function::Call as u64;

/// Where the guest keeps what SVM, and Hyper-V, need; a page each.
const HOST_SAVE: u64 = BASE + 0x20_0000;
const VMCB: u64 = BASE + 0x20_1000;
const ASSIST_PAGE: u64 = BASE + 0x20_2000;
/// What RCX says when Hyper-V is asked for a flush of the TLB.
const FLUSH: u64 = 2;

/// What a case is made of; whether the guest shall be Hyper-V's.
type Entry = (&'static str, bool, fn(Nested) -> CaseResult);

pub(super) fn cases() -> Vec<Case> {
    const CASES: &[Entry] = &[
        ("a nested guest comes and goes", false, comes_and_goes),
        ("entries are executed at the exits of a nested guest", false, drained),
        ("a nested guest's hypercall is its own hypervisor's", false, intercepted),
        ("hypercalls of a nested guest are refused", true, refused),
    ];
    CASES
        .iter()
        .map(|&(name, hyperv, run)| {
            Case::new(name, move || match Nested::new(hyperv)? {
                Some(nested) => run(nested),
                None => Ok(Verdict::Skip("the guest has no SVM".into())),
            })
        })
        .collect()
}

/// A VM whose guest has SVM switched on on its first vCPU.
struct Nested {
    vm: Vm,
    memory: Arc<Mapping>,
    vmcb: usize,
}

impl Nested {
    fn new(hyperv: bool) -> Result<Option<Self>> {
        let mut vm = Vm::new(VmConfig { vcpus: 3, hyperv, ..VmConfig::default() })?;
        if !vm.has_svm() {
            return Ok(None);
        }
        vm.vcpus[0].write_msr(MSR_EFER, EFER)?;
        vm.vcpus[0].write_msr(MSR_HSAVE, HOST_SAVE)?;
        let (memory, vmcb) = vm.memory_at(VMCB)?;
        Ok(Some(Self { vm, memory, vmcb }))
    }

    fn vcpu(&mut self) -> &mut Vcpu {
        &mut self.vm.vcpus[0]
    }

    /// Has a new nested guest take the commands.
    fn enter(&mut self, intercept: Intercept) -> Result<()> {
        check!(!self.vcpu().is_nested(), "the nested guest runs already");
        svm::write_vmcb(&self.memory, self.vmcb, intercept);
        self.vcpu().vmrun(VMCB)?;
        let (nested, code) = (self.vcpu().is_nested(), svm::exit_code(&self.memory, self.vmcb));
        check!(nested, "the nested guest did not start, exit code {code:#x}");
        Ok(())
    }

    /// Has the guest take them again.
    fn leave(&mut self) -> Result<()> {
        check!(self.vcpu().is_nested(), "no nested guest runs");
        self.vcpu().vmrun(VMCB)?;
        check!(!self.vcpu().is_nested(), "the nested guest did not end");
        check_eq!(svm::exit_code(&self.memory, self.vmcb), EXIT_VMRUN, "how it ended");
        Ok(())
    }

    fn finish(mut self) -> CaseResult {
        self.vm.stats()?.check_law()?;
        check_vm_works(&mut self.vm)?;
        Ok(Verdict::Pass)
    }
}

fn comes_and_goes(mut nested: Nested) -> CaseResult {
    for round in 0..10 {
        nested.enter(Intercept::Nothing)?;
        nested.vcpu().store(BASE + 64, round)?;
        check_eq!(nested.vcpu().load(BASE + 64)?, round, "what the nested guest stored");
        for exit in [Exit::Pio, Exit::Cpuid, Exit::Hlt] {
            nested.vcpu().exit(exit)?;
            check!(nested.vcpu().is_nested(), "{exit:?} ended the nested guest");
        }
        nested.leave()?;
        check_vm_works(&mut nested.vm)?;
    }
    nested.finish()
}

fn drained(mut nested: Nested) -> CaseResult {
    let mut ring = Ring::set_up(&mut nested.vm, 0, BASE, 64, u32::MAX - 20)?;
    let before = nested.vm.stats()?;
    let mut executed = 0;
    for round in 1..=10 {
        // Left by the guest: taken at the exit that VMRUN is, at the latest.
        ring.push(&NOP, 2)?;
        nested.enter(Intercept::Nothing)?;
        check_eq!(ring.done(), ring.tail(), "done when the nested guest has started");
        for exit in [Exit::Pio, Exit::Cpuid, Exit::Hlt] {
            for _ in 0..round {
                ring.stage(&NOP)?;
            }
            // The nested guest shares the guest's memory; here it publishes in the guest's name.
            let published = nested.vm.vcpus[0].publish(&mut ring, 0, exit)?;
            let seen = "done as the nested guest sees it";
            check_eq!(published.done, ring.tail(), "{seen} after {exit:?}");
            check!(nested.vcpu().is_nested(), "{exit:?} ended the nested guest");
        }
        ring.push(&NOP, 3)?;
        nested.leave()?;
        check_eq!(ring.done(), ring.tail(), "done when the nested guest has ended");
        executed += 2 + 3 * round + 3;
    }
    let after = nested.vm.stats()?;
    check_eq!(after.since(&before, "executed")?, executed, "entries executed");
    check_eq!(after.since(&before, "rings_broken")?, 0, "rings_broken");
    nested.finish()
}

/// Whether that wants to hear of them or not: it gets the call, or the exception for a bad instruction.
fn intercepted(mut nested: Nested) -> CaseResult {
    let mut ring = Ring::set_up(&mut nested.vm, 0, BASE, 64, 0)?;
    let id = ring.id();
    let before = nested.vm.stats()?;
    let calls = [[FEATURES, 0, 0, 0], [TEARDOWN, id, 0, 0], [KICK, id, 0, 0], [CALL, 0, 0, 0]];
    for (intercept, expected) in
        [(Intercept::Vmmcall, EXIT_VMMCALL), (Intercept::InvalidOpcode, EXIT_INVALID_OPCODE)]
    {
        for [function, rcx, rdx, rsi] in calls {
            nested.enter(intercept)?;
            // It comes back to the guest, which goes on behind its VMRUN.
            nested.vcpu().hypercall(function, rcx, rdx, rsi)?;
            check!(!nested.vcpu().is_nested(), "the nested guest did not end");
            check_eq!(svm::exit_code(&nested.memory, nested.vmcb), expected, "how it ended");
        }
    }
    let after = nested.vm.stats()?;
    for name in ["hypercalls", "errors_refused", "submitted"] {
        check_eq!(after.since(&before, name)?, 0, "{name}");
    }
    ring.push(&NOP, 3)?;
    nested.vcpu().exit(Exit::Cpuid)?;
    check_eq!(ring.done(), ring.tail(), "done of the guest's ring");
    nested.finish()
}

/// There is one way only from a nested guest to KVM's hypercalls: the hypervisor, a guest of Hyper-V, has
/// Hyper-V take its nested guests' requests for a flush, known by RCX; while they run it stops being one.
fn refused(mut nested: Nested) -> CaseResult {
    let vcpu = nested.vcpu();
    vcpu.write_msr(MSR_ASSIST_PAGE, ASSIST_PAGE | ENABLE)?;
    vcpu.store(ASSIST_PAGE + DIRECT_HYPERCALL as u64, 1)?;
    let mut ring = Ring::set_up(&mut nested.vm, 0, BASE, 64, 0)?;
    // The one that has the number of a request.
    let mut other = Ring::set_up(&mut nested.vm, 2, BASE + 0x10_0000, 64, 0)?;
    check_eq!(other.id(), FLUSH, "id of the ring of vCPU 2");
    let calls = [
        [FEATURES, FLUSH, 0, 0],
        [SETUP, BASE + FLUSH, 64, 0],
        [TEARDOWN, FLUSH, 0, 0],
        [KICK, FLUSH, 0, 0],
        [CALL, FLUSH, 0, 0],
        [99, FLUSH, 0, 0],
    ];
    let count = calls.len() as u64;
    for round in 1..=3 {
        nested.vm.vcpus[1].write_msr(MSR_GUEST_OS_ID, SOME_OS)?;
        nested.enter(Intercept::Nothing)?;
        nested.vm.vcpus[1].write_msr(MSR_GUEST_OS_ID, 0)?;
        let before = nested.vm.stats()?;
        for call in calls {
            let [function, rcx, rdx, rsi] = call;
            let rax = nested.vcpu().hypercall(function, rcx, rdx, rsi)?;
            check_eq!(rax, Error::Refused.to_rax(), "RAX of {call:#x?} in a nested guest");
            check!(nested.vcpu().is_nested(), "{call:#x?} ended the nested guest");
        }
        let after = nested.vm.stats()?;
        check_eq!(after.since(&before, "errors_refused")?, count, "errors_refused");
        check_eq!(after.since(&before, "hypercalls")?, count, "hypercalls");
        for name in ["submitted", "inserted", "kicks", "rings_set_up", "errors_align"] {
            check_eq!(after.since(&before, name)?, 0, "{name}");
        }
        after.check_law()?;
        nested.leave()?;
        // The guest's own rings are as good as before.
        ring.push(&NOP, round)?;
        other.push(&NOP, round)?;
        for ring in [&ring, &other] {
            let rax = nested.vm.hypercall(0, KICK, ring.id(), 0, 0)?;
            check_eq!(rax, 0, "KICK by the guest itself");
            check_eq!(ring.done(), ring.tail(), "done after KICK by the guest itself");
        }
    }
    nested.finish()
}
