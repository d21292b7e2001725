// SPDX-License-Identifier: GPL-2.0

//! What a guest of AMD-V has to set up for a guest of its own. The nested guest starts in the server loop,
//! in the same mode and the same memory as the guest, so that it takes the same commands.

use std::sync::atomic::Ordering;

use kvm_bindings::CpuId;

use crate::boot;
use crate::guest::{self, Code};
use crate::memory::{Mapping, PAGE};

pub(crate) const MSR_EFER: u32 = 0xc000_0080;
pub(crate) const MSR_HSAVE: u32 = 0xc001_0117;
/// EFER of a guest in 64-bit mode that may use SVM; its nested guest must have that bit, too.
pub(crate) const EFER: u64 = 0x1500;

/// What a nested guest ends at, beside VMRUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Intercept {
    Nothing,
    Vmmcall,
    InvalidOpcode,
}

/// Codes of #VMEXIT.
pub(crate) const EXIT_INVALID_OPCODE: u64 = 0x46;
pub(crate) const EXIT_VMRUN: u64 = 0x80;
pub(crate) const EXIT_VMMCALL: u64 = 0x81;

/// Places in a VMCB: the control area, then the state of the nested guest.
const EXCEPTIONS: usize = 0x8;
const INSTRUCTIONS: usize = 0x10;
/// The word whose lowest bit has Hyper-V execute flushes for the nested guest.
const HYPERV: usize = 0x3e0;
const ASID: usize = 0x58;
const EXIT_CODE: usize = 0x70;
const ES: usize = 0x400;
const CS: usize = 0x410;
const SS: usize = 0x420;
const DS: usize = 0x430;
const GDTR: usize = 0x460;
const STATE_EFER: usize = 0x4d0;
const CR4: usize = 0x548;
const CR3: usize = 0x550;
const CR0: usize = 0x558;
const DR7: usize = 0x560;
const DR6: usize = 0x568;
const RFLAGS: usize = 0x570;
const RIP: usize = 0x578;

/// Whether the CPUID of a guest says that it has SVM.
pub(crate) fn is_in(cpuid: &CpuId) -> bool {
    const LEAF: u32 = 0x8000_0001;
    const ECX_SVM: u32 = 1 << 2;

    cpuid.as_slice().iter().any(|entry| entry.function == LEAF && entry.ecx & ECX_SVM != 0)
}

/// Writes the VMCB of a nested guest into the page at `offset`.
pub(crate) fn write_vmcb(memory: &Mapping, offset: usize, intercept: Intercept) {
    let word = |at: usize, value: u64| memory.word(offset + at).store(value, Ordering::SeqCst);
    memory.fill(offset, PAGE, |_| 0);
    word(INSTRUCTIONS, if intercept == Intercept::Vmmcall { 3 } else { 1 });
    word(EXCEPTIONS, if intercept == Intercept::InvalidOpcode { 1 << 6 } else { 0 });
    // Of no meaning where there is no Hyper-V.
    word(HYPERV, 1);
    word(ASID, 1);
    // Selector, attributes, limit.
    let segment = |selector: u16, attributes: u64| {
        u64::from(selector) | (attributes << 16) | (0xffff_ffff << 32)
    };
    word(CS, segment(guest::SELECTOR_CODE, 0xa9b));
    for data in [ES, SS, DS] {
        word(data, segment(guest::SELECTOR_DATA, 0xc93));
    }
    word(GDTR, (guest::DESCRIPTORS as u64 * 8 - 1) << 32);
    word(GDTR + 8, boot::GDT as u64);
    word(STATE_EFER, EFER);
    word(CR4, 0x20);
    word(CR3, boot::PML4 as u64);
    word(CR0, 0x8005_0033);
    word(DR7, 0x400);
    word(DR6, 0xffff_0ff0);
    word(RFLAGS, 2);
    word(RIP, boot::code_address(Code::Server));
}

/// Why the nested guest of the VMCB at `offset` ended.
pub(crate) fn exit_code(memory: &Mapping, offset: usize) -> u64 {
    memory.word(offset + EXIT_CODE).load(Ordering::SeqCst)
}
