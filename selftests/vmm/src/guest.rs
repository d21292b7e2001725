// SPDX-License-Identifier: GPL-2.0

//! The code that runs inside the test VM: a loop that executes one command at a time.
//!
//! The loop leaves to the VMM with an OUT to [`PORT_DONE`]; the VMM takes the result out of the
//! registers, puts the next command's arguments there and its address into R15, and resumes. The
//! bytes between `dlh_guest_start` and `dlh_guest_end` are position independent and copied into
//! guest memory; they never run here.

use std::arch::global_asm;

/// OUT to this port: the command has ended.
pub(crate) const PORT_DONE: u16 = 0xf4;
/// OUT to this port: an exit in the middle of a command; the VMM just resumes.
pub(crate) const PORT_TICK: u16 = 0xf5;

/// Selectors of the descriptor table in `boot`; the code below repeats the user ones.
pub(crate) const SELECTOR_CODE: u16 = 0x08;
pub(crate) const SELECTOR_DATA: u16 = 0x10;
/// User data is 0x18 and user code 0x20, requested with privilege level 3 below.
pub(crate) const DESCRIPTORS: usize = 5;

global_asm!(
    ".pushsection .rodata.dlh_guest, \"a\", @progbits",
    ".code64",
    // The labels that Rust knows.
    ".hidden dlh_guest_start",
    ".globl dlh_guest_start",
    ".hidden dlh_guest_server",
    ".globl dlh_guest_server",
    ".hidden dlh_guest_hypercall",
    ".globl dlh_guest_hypercall",
    ".hidden dlh_guest_publish",
    ".globl dlh_guest_publish",
    ".hidden dlh_guest_exit_pio",
    ".globl dlh_guest_exit_pio",
    ".hidden dlh_guest_exit_cpuid",
    ".globl dlh_guest_exit_cpuid",
    ".hidden dlh_guest_exit_hlt",
    ".globl dlh_guest_exit_hlt",
    ".hidden dlh_guest_exit_hypercall",
    ".globl dlh_guest_exit_hypercall",
    ".hidden dlh_guest_flood",
    ".globl dlh_guest_flood",
    ".hidden dlh_guest_measure",
    ".globl dlh_guest_measure",
    ".hidden dlh_guest_measure_exit",
    ".globl dlh_guest_measure_exit",
    ".hidden dlh_guest_measure_hypercall",
    ".globl dlh_guest_measure_hypercall",
    ".hidden dlh_guest_measure_store",
    ".globl dlh_guest_measure_store",
    ".hidden dlh_guest_sample_wait",
    ".globl dlh_guest_sample_wait",
    ".hidden dlh_guest_sample_exit",
    ".globl dlh_guest_sample_exit",
    ".hidden dlh_guest_sample_idle",
    ".globl dlh_guest_sample_idle",
    ".hidden dlh_guest_user",
    ".globl dlh_guest_user",
    ".hidden dlh_guest_user_hypercall",
    ".globl dlh_guest_user_hypercall",
    ".hidden dlh_guest_smi",
    ".globl dlh_guest_smi",
    ".hidden dlh_guest_write_msr",
    ".globl dlh_guest_write_msr",
    ".hidden dlh_guest_vmrun",
    ".globl dlh_guest_vmrun",
    ".hidden dlh_guest_end",
    ".globl dlh_guest_end",
    // The next slot of the ring at RDI (mask ESI, cookie R12, position R8D) gets the word of op, flags and
    // status R9 and the arguments R10 and R11; tail is not stored yet.
    ".macro dlh_fill_slot",
    "    mov eax, r8d",
    "    and eax, esi",
    "    shl rax, 5",
    "    lea rax, [rdi + rax + 128]",
    "    mov [rax + 8], r9",
    "    mov [rax + 16], r10",
    "    mov [rax + 24], r11",
    "    mov edx, r8d",
    "    add rdx, r12",
    "    mov [rax], rdx",
    "    inc r8d",
    ".endm",
    "dlh_guest_start:",
    // The VMM completes the OUT after it has set R15, so RIP need not be touched.
    "dlh_guest_server:",
    "    out 0xf4, al",
    "    jmp r15",
    //
    // hypercall: RAX, RBX, RCX, RDX, RSI as KVM wants them; result in RAX.
    "dlh_guest_hypercall:",
    "    vmmcall",
    "    jmp dlh_guest_server",
    //
    // publish: copies RCX prepared entries from RSI into the ring at RDI from position R8D on (mask
    // R9D), stores tail, spins RBX times without an exit of its own, and goes to R14. No stack.
    "dlh_guest_publish:",
    "    mov r10d, r8d",
    "2:  test rcx, rcx",
    "    jz 3f",
    "    mov eax, r10d",
    "    and eax, r9d",
    "    shl rax, 5",
    "    lea rax, [rdi + rax + 128]",
    "    mov rdx, [rsi]",
    "    mov [rax], rdx",
    "    mov rdx, [rsi + 8]",
    "    mov [rax + 8], rdx",
    "    mov rdx, [rsi + 16]",
    "    mov [rax + 16], rdx",
    "    mov rdx, [rsi + 24]",
    "    mov [rax + 24], rdx",
    "    add rsi, 32",
    "    inc r10d",
    "    dec rcx",
    "    jmp 2b",
    "3:  mov [rdi], r10d",
    "4:  test rbx, rbx",
    "    jz 5f",
    "    dec rbx",
    "    jmp 4b",
    "5:  jmp r14",
    //
    // The exits that a publication can go on to. Each reads `done` of the ring at RDI into RAX right
    // after the exit, so that the VMM learns what the guest saw. The hypercall is function R11 with
    // the argument R12; its result is left in R13.
    "dlh_guest_exit_pio:",
    "    out 0xf5, al",
    "    mov eax, [rdi + 64]",
    "    jmp dlh_guest_server",
    "dlh_guest_exit_cpuid:",
    "    xor eax, eax",
    "    xor ecx, ecx",
    "    cpuid",
    "    mov eax, [rdi + 64]",
    "    jmp dlh_guest_server",
    "dlh_guest_exit_hlt:",
    "    hlt",
    "    mov eax, [rdi + 64]",
    "    jmp dlh_guest_server",
    "dlh_guest_exit_hypercall:",
    "    mov eax, 0x444c4801",
    "    mov rbx, r11",
    "    mov rcx, r12",
    "    xor edx, edx",
    "    xor esi, esi",
    "    vmmcall",
    "    mov r13, rax",
    "    mov eax, [rdi + 64]",
    "    jmp dlh_guest_server",
    //
    // flood: produces RBP entries by itself: ring RDI, mask ESI, cookie R12, position R8D, the word
    // of op, flags and status R9, arguments R10 and R11. A full ring makes it exit with CPUID and
    // count that in R13; a detached one ends it.
    "dlh_guest_flood:",
    "    mov eax, [rdi + 64]",
    "    mov edx, r8d",
    "    sub edx, eax",
    "    cmp edx, esi",
    "    ja 6f",
    "    dlh_fill_slot",
    "    mov [rdi], r8d",
    "    dec rbp",
    "    jnz dlh_guest_flood",
    "    jmp dlh_guest_server",
    "6:  test dword ptr [rdi + 68], 1",
    "    jz dlh_guest_server",
    "    inc r13",
    "    xor eax, eax",
    "    xor ecx, ecx",
    "    cpuid",
    "    jmp dlh_guest_flood",
    //
    // measure: R14 times, fills RBP slots of the ring (as flood does), then makes a hypercall that KVM
    // answers by itself. RAX: time-stamp ticks for all of it, RBX: those for the filling alone.
    "dlh_guest_measure:",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    mov rcx, rax",
    "    xor ebx, ebx",
    "7:  rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    sub rbx, rax",
    "    mov r13, rbp",
    "    test r13, r13",
    "    jz 9f",
    "8:  mov eax, [rdi + 64]",
    "    mov edx, r8d",
    "    sub edx, eax",
    "    cmp edx, esi",
    "    ja 9f",
    "    dlh_fill_slot",
    "    mov [rdi], r8d",
    "    dec r13",
    "    jnz 8b",
    "9:  rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    add rbx, rax",
    "    mov eax, 0x7fff",
    "    vmmcall",
    "    dec r14",
    "    jnz 7b",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    sub rax, rcx",
    "    jmp dlh_guest_server",
    //
    // measure_exit: exits with CPUID, R14 times. RAX: time-stamp ticks for that.
    "dlh_guest_measure_exit:",
    "    rdtsc",
    "    shl rdx, 32",
    "    lea r13, [rax + rdx]",
    "2:  xor eax, eax",
    "    xor ecx, ecx",
    "    cpuid",
    "    dec r14",
    "    jnz 2b",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    sub rax, r13",
    "    jmp dlh_guest_server",
    //
    // measure_hypercall: the hypercall RBP with RBX, RCX = R10, RDX = R11, RSI = 0, R14 times. RAX: ticks
    // for that; R12: its last result.
    "dlh_guest_measure_hypercall:",
    "    rdtsc",
    "    shl rdx, 32",
    "    lea r13, [rax + rdx]",
    "2:  mov rax, rbp",
    "    mov rcx, r10",
    "    mov rdx, r11",
    "    xor esi, esi",
    "    vmmcall",
    "    mov r12, rax",
    "    dec r14",
    "    jnz 2b",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    sub rax, r13",
    "    jmp dlh_guest_server",
    //
    // measure_store: stores to RDI, R14 times. RAX: ticks for that.
    "dlh_guest_measure_store:",
    "    rdtsc",
    "    shl rdx, 32",
    "    lea r13, [rax + rdx]",
    "2:  mov [rdi], esi",
    "    dec r14",
    "    jnz 2b",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    sub rax, r13",
    "    jmp dlh_guest_server",
    //
    // sample_wait: R14 times, fills one slot of the ring (as flood does) and waits for `done` without an
    // exit of its own. The time-stamp ticks from one to the other go to the words from RBX on. Between two
    // it spins, each time R13 ticks longer than before, up to RBP, and then fewer again.
    "dlh_guest_sample_wait:",
    "    mov r15, r13",
    "2:  dlh_fill_slot",
    "    rdtsc",
    "    shl rdx, 32",
    "    lea rcx, [rax + rdx]",
    "    mov [rdi], r8d",
    "3:  mov eax, [rdi + 64]",
    "    cmp eax, r8d",
    "    jne 3b",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    sub rax, rcx",
    "    mov [rbx], rax",
    "    add rbx, 8",
    "    add r15, r13",
    "    cmp r15, rbp",
    "    jb 4f",
    "    sub r15, rbp",
    "4:  rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    lea rcx, [rax + r15]",
    "5:  rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    cmp rax, rcx",
    "    jb 5b",
    "    dec r14",
    "    jnz 2b",
    "    jmp dlh_guest_server",
    //
    // sample_exit: R14 times, fills RBP slots of the ring (as flood does) and exits with CPUID. The
    // time-stamp ticks of each exit go to the words from RBX on.
    "dlh_guest_sample_exit:",
    "    mov r15, rbx",
    "2:  mov r13, rbp",
    "    test r13, r13",
    "    jz 4f",
    "3:  mov eax, [rdi + 64]",
    "    mov edx, r8d",
    "    sub edx, eax",
    "    cmp edx, esi",
    "    ja 4f",
    "    dlh_fill_slot",
    "    mov [rdi], r8d",
    "    dec r13",
    "    jnz 3b",
    "4:  rdtsc",
    "    shl rdx, 32",
    "    lea r13, [rax + rdx]",
    "    xor eax, eax",
    "    xor ecx, ecx",
    "    cpuid",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    sub rax, r13",
    "    mov [r15], rax",
    "    add r15, 8",
    "    dec r14",
    "    jnz 2b",
    "    jmp dlh_guest_server",
    //
    // sample_idle: R14 times, fills one slot of the ring (as flood does), with the time-stamp counter as its
    // first argument, and halts.
    "dlh_guest_sample_idle:",
    "    rdtsc",
    "    shl rdx, 32",
    "    lea r10, [rax + rdx]",
    "    dlh_fill_slot",
    "    mov [rdi], r8d",
    "    hlt",
    "    dec r14",
    "    jnz dlh_guest_sample_idle",
    "    jmp dlh_guest_server",
    //
    // user: goes to R14 at CPL 3, with IOPL 3 so that the code there can use the port.
    "dlh_guest_user:",
    "    mov r13, rsp",
    "    push 0x1b",
    "    push r13",
    "    push 0x3002",
    "    push 0x23",
    "    push r14",
    "    iretq",
    "dlh_guest_user_hypercall:",
    "    vmmcall",
    "    out 0xf4, al",
    "    ud2",
    //
    // Entered by an SMI in real-address mode; the registers are those of the interrupted code.
    "dlh_guest_smi:",
    "    vmmcall",
    "    out 0xf5, al",
    "    rsm",
    //
    // write_msr: model-specific register ECX gets EDX:EAX.
    "dlh_guest_write_msr:",
    "    wrmsr",
    "    jmp dlh_guest_server",
    //
    // vmrun: runs the nested guest whose VMCB is at RAX. In a nested guest this is what is intercepted:
    // it ends there, and goes on behind the VMRUN of the guest that started it.
    "dlh_guest_vmrun:",
    "    vmrun rax",
    "    stgi",
    "    jmp dlh_guest_server",
    "dlh_guest_end:",
    ".popsection",
);

/// Labels of the code above, whose addresses are all that is used of them.
#[allow(missing_docs)]
mod label {
    extern "C" {
        pub(super) static dlh_guest_start: u8;
        pub(super) static dlh_guest_server: u8;
        pub(super) static dlh_guest_hypercall: u8;
        pub(super) static dlh_guest_publish: u8;
        pub(super) static dlh_guest_exit_pio: u8;
        pub(super) static dlh_guest_exit_cpuid: u8;
        pub(super) static dlh_guest_exit_hlt: u8;
        pub(super) static dlh_guest_exit_hypercall: u8;
        pub(super) static dlh_guest_flood: u8;
        pub(super) static dlh_guest_measure: u8;
        pub(super) static dlh_guest_measure_exit: u8;
        pub(super) static dlh_guest_measure_hypercall: u8;
        pub(super) static dlh_guest_measure_store: u8;
        pub(super) static dlh_guest_sample_wait: u8;
        pub(super) static dlh_guest_sample_exit: u8;
        pub(super) static dlh_guest_sample_idle: u8;
        pub(super) static dlh_guest_user: u8;
        pub(super) static dlh_guest_user_hypercall: u8;
        pub(super) static dlh_guest_smi: u8;
        pub(super) static dlh_guest_write_msr: u8;
        pub(super) static dlh_guest_vmrun: u8;
        pub(super) static dlh_guest_end: u8;
    }
}

/// A place in the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    Server,
    Hypercall,
    Publish,
    ExitPio,
    ExitCpuid,
    ExitHlt,
    ExitHypercall,
    Flood,
    Measure,
    MeasureExit,
    MeasureHypercall,
    MeasureStore,
    SampleWait,
    SampleExit,
    SampleIdle,
    User,
    UserHypercall,
    Smi,
    WriteMsr,
    Vmrun,
}

impl Code {
    /// Distance from the start of the code, in bytes.
    pub(crate) fn offset(self) -> u64 {
        let address = match self {
            Code::Server => &raw const label::dlh_guest_server,
            Code::Hypercall => &raw const label::dlh_guest_hypercall,
            Code::Publish => &raw const label::dlh_guest_publish,
            Code::ExitPio => &raw const label::dlh_guest_exit_pio,
            Code::ExitCpuid => &raw const label::dlh_guest_exit_cpuid,
            Code::ExitHlt => &raw const label::dlh_guest_exit_hlt,
            Code::ExitHypercall => &raw const label::dlh_guest_exit_hypercall,
            Code::Flood => &raw const label::dlh_guest_flood,
            Code::Measure => &raw const label::dlh_guest_measure,
            Code::MeasureExit => &raw const label::dlh_guest_measure_exit,
            Code::MeasureHypercall => &raw const label::dlh_guest_measure_hypercall,
            Code::MeasureStore => &raw const label::dlh_guest_measure_store,
            Code::SampleWait => &raw const label::dlh_guest_sample_wait,
            Code::SampleExit => &raw const label::dlh_guest_sample_exit,
            Code::SampleIdle => &raw const label::dlh_guest_sample_idle,
            Code::User => &raw const label::dlh_guest_user,
            Code::UserHypercall => &raw const label::dlh_guest_user_hypercall,
            Code::Smi => &raw const label::dlh_guest_smi,
            Code::WriteMsr => &raw const label::dlh_guest_write_msr,
            Code::Vmrun => &raw const label::dlh_guest_vmrun,
        };
        (address.addr() - (&raw const label::dlh_guest_start).addr()) as u64
    }
}

/// The guest's code, with the hypercall instruction that this machine's KVM expects.
pub(crate) fn image() -> Vec<u8> {
    const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
    const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];

    let start = &raw const label::dlh_guest_start;
    let len = (&raw const label::dlh_guest_end).addr() - start.addr();
    // SAFETY: Both labels bound one run of bytes in this program's read-only data.
    let mut code = unsafe { std::slice::from_raw_parts(start, len) }.to_vec();
    if !host_is_amd() {
        for at in 0..code.len() - VMMCALL.len() {
            if code[at..].starts_with(&VMMCALL) {
                code[at..at + VMCALL.len()].copy_from_slice(&VMCALL);
            }
        }
    }
    code
}

fn host_is_amd() -> bool {
    // SAFETY: Every CPU with 64-bit mode has CPUID and its leaf 0.
    let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
    // "Auth" of AuthenticAMD, "Hygo" of HygonGenuine.
    [*b"Auth", *b"Hygo"].contains(&vendor.ebx.to_le_bytes())
}
