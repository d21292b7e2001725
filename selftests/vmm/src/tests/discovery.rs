// SPDX-License-Identifier: GPL-2.0

//! How a guest finds out about the host.

use dlh_abi::{
    Function, ABI_VERSION, FEATURE_CALL, FEATURE_CALLS, FEATURE_FREE_ANY, FEATURE_FREE_ASK,
    FEATURE_FREE_PAGES, FEATURE_RING, FEATURE_TRACE, HYPERCALL_NR,
};

use crate::ktap::{check, check_eq, Case, CaseResult, Verdict};
use crate::vm::{Vm, VmConfig};

/// Numbers of linux/kvm_para.h: what a stock host answers.
const KVM_ENOSYS: i64 = -1000;
const KVM_EPERM: i64 = -1;
const KVM_HC_VAPIC_POLL_IRQ: u64 = 1;

/// Cases for a host without the module.
pub(super) fn absent() -> Vec<Case> {
    vec![
        Case::new("without the module every function is unknown to the host", || {
            let mut vm = Vm::new(VmConfig::default())?;
            for function in [0, 1, 2, 3, 4, 5, u64::MAX] {
                let rax = vm.hypercall(0, function, crate::vm::BASE, 64, 0)?;
                check_eq!(rax, KVM_ENOSYS, "function {function}");
            }
            Ok(Verdict::Pass)
        }),
        Case::new("without the module user mode gets the stock answer", user_mode),
        Case::new("without the module other hypercalls get the stock answer", others),
    ]
}

/// Cases for a host with the module.
pub(super) fn present(expected: Option<u64>) -> Vec<Case> {
    vec![
        Case::new("FEATURES tells the version and known features", move || {
            let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
            let needed = u64::from(FEATURE_RING | FEATURE_CALL | FEATURE_CALLS | FEATURE_TRACE);
            let free = FEATURE_FREE_PAGES | FEATURE_FREE_ANY | FEATURE_FREE_ASK;
            let known = needed | u64::from(free);
            for vcpu in [0, 1, 0] {
                let rax = vm.hypercall(vcpu, Function::Features as u64, 0, 0, 0)? as u64;
                check_eq!(rax >> 32, u64::from(ABI_VERSION), "version");
                let bits = rax & 0xffff_ffff;
                check!(bits & !known == 0, "unknown feature bits in {bits:#x}");
                check!(bits & needed == needed, "RING and CALL are not both in {bits:#x}");
                if let Some(expected) = expected {
                    check_eq!(bits, expected, "feature bits");
                }
            }
            Ok(Verdict::Pass)
        }),
        Case::new("user mode is told nothing", user_mode),
        Case::new("other hypercalls get the stock answer", others),
    ]
}

fn user_mode() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    for function in 0..6 {
        let rax = vm.vcpus[0].user_hypercall([function, crate::vm::BASE, 64, 0])?;
        check_eq!(rax, KVM_EPERM, "function {function} at CPL 3");
    }
    Ok(Verdict::Pass)
}

fn others() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let vcpu = &mut vm.vcpus[0];
    check_eq!(vcpu.raw_hypercall(KVM_HC_VAPIC_POLL_IRQ, [0; 4])?, 0, "a hypercall of KVM's own");
    for number in [0, 2, 0x444c_4800, 0x444c_4802, HYPERCALL_NR | (1 << 32), u64::MAX] {
        let rax = vcpu.raw_hypercall(number, [0; 4])?;
        check_eq!(rax, KVM_ENOSYS, "hypercall {number:#x}");
    }
    Ok(Verdict::Pass)
}
