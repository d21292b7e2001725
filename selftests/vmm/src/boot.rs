// SPDX-License-Identifier: GPL-2.0

//! What a vCPU needs to start in 64-bit mode: page tables, descriptors, code, registers.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::guest::{self, Code};
use crate::memory::{Mapping, PAGE};

/// Guest-physical layout of the low memory, which belongs to the test VM itself.
pub(crate) const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
/// One page directory for each of [`GIGABYTES`].
const PAGE_DIRECTORIES: usize = 0x3000;
pub(crate) const GDT: usize = 0x8000;
const CODE: usize = 0x1_0000;
/// One page for each vCPU, in turn; the stack grows down from its end. Only what goes to user mode uses it.
const STACKS: usize = 0x2_0000;
const STACK_PAGES: usize = 16;
/// Where an SMI enters with the SMBASE that a vCPU starts with.
const SMI_ENTRY: usize = 0x3_8000;
/// Entries that the guest is to copy into its ring: room for 65,536.
pub(crate) const STAGING: usize = 0x20_0000;
/// Size of the low memory.
pub(crate) const LOW_MEMORY: usize = 0x40_0000;

/// Guest-physical memory is mapped at its own address up to here.
const GIGABYTES: usize = 4;
/// And from there on up to here by pages of 1 GiB, which few processors lack.
const FAR_GIGABYTES: usize = 512;

const PRESENT_WRITABLE_USER: u64 = 0x7;
const HUGE: u64 = 0x80;

/// Guest-physical, and guest-virtual, address of a place in the code.
pub(crate) fn code_address(code: Code) -> u64 {
    CODE as u64 + code.offset()
}

/// Fills the low memory.
pub(crate) fn write_low_memory(memory: &Mapping) {
    let table =
        |at: usize, index: usize, value: u64| memory.write(at + index * 8, &value.to_le_bytes());
    table(PML4, 0, PDPT as u64 | PRESENT_WRITABLE_USER);
    for gigabyte in 0..GIGABYTES {
        let directory = PAGE_DIRECTORIES + gigabyte * PAGE;
        table(PDPT, gigabyte, directory as u64 | PRESENT_WRITABLE_USER);
        for index in 0..512 {
            let address = ((gigabyte as u64) << 30) + ((index as u64) << 21);
            table(directory, index, address | PRESENT_WRITABLE_USER | HUGE);
        }
    }
    for gigabyte in GIGABYTES..FAR_GIGABYTES {
        table(PDPT, gigabyte, ((gigabyte as u64) << 30) | PRESENT_WRITABLE_USER | HUGE);
    }
    // Null, kernel code and data, user data and code.
    let descriptors: [u64; guest::DESCRIPTORS] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    for (index, descriptor) in descriptors.into_iter().enumerate() {
        table(GDT, index, descriptor);
    }
    let image = guest::image();
    assert!(image.len() <= STACKS - CODE);
    memory.write(CODE, &image);
    memory.write(SMI_ENTRY, &image[Code::Smi.offset() as usize..]);
}

/// Puts a vCPU at privilege level 0 of 64-bit mode.
pub(crate) fn set_mode(sregs: &mut kvm_sregs) {
    let segment = |selector: u16, type_: u8, long: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(guest::SELECTOR_CODE, 11, 1);
    let data = segment(guest::SELECTOR_DATA, 3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 64-bit TSS, which VMX insists on.
    sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
    sregs.gdt.base = GDT as u64;
    sregs.gdt.limit = guest::DESCRIPTORS as u16 * 8 - 1;
    // No handlers: an exception is a triple fault, and a test that fails.
    sregs.idt.limit = 0;
    // PG, AM, WP, NE, ET, MP, PE; PAE; LMA, LME.
    sregs.cr0 = 0x8005_0033;
    sregs.cr3 = PML4 as u64;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
}

/// Registers of a vCPU that is about to enter the server loop.
pub(crate) fn registers_at_server(vcpu: usize) -> kvm_regs {
    kvm_regs {
        rip: code_address(Code::Server),
        rsp: (STACKS + (vcpu % STACK_PAGES + 1) * PAGE) as u64,
        rflags: 2,
        ..Default::default()
    }
}
