// SPDX-License-Identifier: GPL-2.0

//! What must be refused, with which number, in which order of checks, counted once, without effect.

use dlh_abi::{Call, Error, Function, Operation, RingSize};

use super::check_vm_works;
use crate::ktap::{check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, PAGE};
use crate::ring::{Ring, NOP, UNKNOWN};
use crate::vcpu::Exit;
use crate::vm::{Vm, VmConfig, BASE};

const PAGE_BYTES: u64 = PAGE as u64;
const SETUP: u64 = Function::RingSetup as u64;
const TEARDOWN: u64 = Function::RingTeardown as u64;
const KICK: u64 = Function::Kick as u64;
const CALL: u64 = Function::Call as u64;
const CALLS: u64 = Function::Calls as u64;
/// A hypercall with its function and three arguments.
type Registers = [u64; 4];

/// Sizes that are no size of a ring.
const BAD_SIZES: [u64; 9] = [0, 1, 32, 63, 96, 65537, 131_072, (1 << 32) + 64, 1 << 63];

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("unknown functions", || {
            let functions = [6, 7, 0xffff, 1 << 32, (1 << 32) | SETUP, u64::MAX];
            refuse_all(Error::Function, functions.map(|function| [function, BASE, 64, 0]).to_vec())
        }),
        Case::new("ring addresses that are not page aligned", || {
            let offsets = [1, 8, 64, 128, 2048, PAGE_BYTES - 1];
            refuse_all(Error::Align, offsets.map(|offset| [SETUP, BASE + offset, 64, 0]).to_vec())
        }),
        Case::new("alignment is checked before size and memory", || {
            let bad = [[SETUP, BASE + 1, 0, 0], [SETUP, u64::MAX, 64, 0], [SETUP, u64::MAX, 0, 0]];
            refuse_all(Error::Align, bad.to_vec())
        }),
        Case::new("ring sizes", || {
            refuse_all(Error::Size, BAD_SIZES.map(|size| [SETUP, BASE, size, 0]).to_vec())
        }),
        Case::new("size is checked before memory", || {
            let hole = 0x7000_0000;
            refuse_all(Error::Size, BAD_SIZES.map(|size| [SETUP, hole, size, 0]).to_vec())
        }),
        Case::new("rings outside memory", || {
            let top = 0u64.wrapping_sub(PAGE_BYTES);
            let places = [
                0x7000_0000,
                BASE - PAGE_BYTES,
                1 << 40,
                1 << 51,
                1 << 52,
                1 << 63,
                top,
                top - (2 << 20),
            ];
            let calls =
                places.iter().flat_map(|&gpa| [[SETUP, gpa, 64, 0], [SETUP, gpa, 65536, 0]]);
            refuse_all(Error::Memory, calls.collect())
        }),
        Case::new("rings that reach over the end of a memslot", straddling),
        Case::new("rings in a read-only memslot", readonly),
        Case::new("reserved argument of RING_SETUP", || {
            let values = [1, 1 << 32, u64::MAX];
            refuse_all(Error::Argument, values.map(|rsi| [SETUP, BASE, 64, rsi]).to_vec())
        }),
        Case::new("ids that no ring has", || {
            let ids = [0, 1, 63, 4096, 1 << 32, u64::from(u32::MAX), u64::MAX];
            let calls = ids.iter().flat_map(|&id| [[TEARDOWN, id, 0, 0], [KICK, id, 0, 0]]);
            refuse_all(Error::NoRing, calls.collect())
        }),
        Case::new("ids next to a real one", other_ids),
        Case::new("flags of CALL", || {
            let registers =
                [1 << 16, 1 << 31, 1 << 32, 1 << 63, u64::MAX, (1 << 16) | u64::from(UNKNOWN.op.0)];
            refuse_all(Error::Argument, registers.map(|rcx| [CALL, rcx, 0, 0]).to_vec())
        }),
        Case::new("arrays of calls", || {
            let at = BASE + 0x20;
            let edge = BASE + (4 << 20) - 64;
            refuse_all(Error::Argument, [1, 1 << 63].map(|rsi| [CALLS, at, 1, rsi]).to_vec())?;
            refuse_all(Error::Size, [0, 513, 1 << 32].map(|n| [CALLS, at, n, 0]).to_vec())?;
            refuse_all(Error::Align, [1, 8, 16].map(|off| [CALLS, at + off, 1, 0]).to_vec())?;
            let outside =
                [[0x7000_0000, 1], [edge, 3], [BASE - 32, 2], [u64::MAX - 31, 1], [1 << 52, 1]];
            refuse_all(Error::Memory, outside.map(|[gpa, n]| [CALLS, gpa, n, 0]).to_vec())
        }),
        Case::new("unknown operations of CALL", || {
            let operations = [UNKNOWN.op.0.into(), 0x7fff, 0xffff];
            refuse_all(Error::Operation, operations.map(|op| [CALL, op, 0, 0]).to_vec())
        }),
        Case::new("CALL of the operation that does nothing", call_nop),
        Case::new("unknown operations and reserved flags of entries", bad_entries),
        Case::new("user mode has no effect", user_mode),
        Case::new("system management mode is refused", system_management_mode),
    ]
}

/// The counter of an error.
fn counter(error: Error) -> &'static str {
    match error {
        Error::Refused => "errors_refused",
        Error::Function => "errors_function",
        Error::Align => "errors_align",
        Error::Size => "errors_size",
        Error::Memory => "errors_memory",
        Error::NoRing => "errors_noring",
        Error::Operation => "errors_operation",
        Error::Argument => "errors_argument",
        Error::Busy | Error::NoMemory | Error::Gone | Error::Again => {
            unreachable!("not an error of the input")
        }
    }
}

/// Makes a call that must fail, and checks that this is counted once and changes nothing else.
fn refuse(vm: &mut Vm, error: Error, call: Registers) -> Result<()> {
    let before = vm.stats()?;
    let [function, rcx, rdx, rsi] = call;
    let rax = vm.hypercall(0, function, rcx, rdx, rsi)?;
    check_eq!(rax, error.to_rax(), "RAX of {call:#x?}");
    let after = vm.stats()?;
    check_eq!(after.since(&before, counter(error))?, 1, "{} after {call:#x?}", counter(error));
    check_eq!(after.since(&before, "executed")?, 0, "calls executed by {call:#x?}");
    after.check_law()
}

/// Makes calls that must all fail alike, with and without a ring, which goes on working.
fn refuse_all(error: Error, calls: Vec<Registers>) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    for &call in &calls {
        refuse(&mut vm, error, call)?;
        check_vm_works(&mut vm)?;
    }
    if error != Error::NoRing {
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
        for call in calls {
            ring.push(&NOP, 1)?;
            vm.vcpus[0].exit(Exit::Pio)?;
            refuse(&mut vm, error, call)?;
            ring.push(&NOP, 3)?;
            vm.vcpus[0].exit(Exit::Pio)?;
            check_eq!(ring.done(), ring.tail(), "done of the ring that was there at {call:#x?}");
        }
    }
    Ok(Verdict::Pass)
}

fn straddling() -> CaseResult {
    let len = 4 << 20;
    let mut vm = Vm::new(VmConfig { memory: len, ..VmConfig::default() })?;
    let end = BASE + len as u64;
    let largest = RingSize::MAX.into();
    let largest_pages =
        RingSize::try_from(largest).expect("the largest is one").bytes().div_ceil(PAGE_BYTES);
    let calls = [
        [SETUP, end, 64, 0],
        [SETUP, end - PAGE_BYTES, 128, 0],
        [SETUP, end - (largest_pages - 1) * PAGE_BYTES, largest, 0],
    ];
    for call in calls {
        refuse(&mut vm, Error::Memory, call)?;
    }
    // What just fits is fine.
    super::check_ring_works(&mut vm, 0, end - PAGE_BYTES)?;
    Ring::set_up(&mut vm, 0, end - largest_pages * PAGE_BYTES, RingSize::MAX, 0)?;

    // Neighbouring memslots are not one.
    vm.add_memory(end, Mapping::new(Backing::Anonymous, len)?)?;
    for call in &calls[1..] {
        refuse(&mut vm, Error::Memory, *call)?;
    }
    super::check_ring_works(&mut vm, 0, end)?;
    Ok(Verdict::Pass)
}

fn readonly() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let gpa = BASE + 0x1000_0000;
    let slot = vm.add_readonly_memory(gpa, Mapping::new(Backing::Anonymous, 1 << 20)?)?;
    let memory = vm.region(slot).mapping.clone();
    for size in [64, 1024] {
        refuse(&mut vm, Error::Memory, [SETUP, gpa, size, 0])?;
        check_eq!(memory.first_difference(0, 1 << 20, |_| 0), None, "what the host wrote there");
        check_vm_works(&mut vm)?;
    }
    Ok(Verdict::Pass)
}

fn other_ids() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    for other in [ring.id() + 1, ring.id() | (1 << 32), ring.id() | (1 << 63), u64::MAX] {
        refuse(&mut vm, Error::NoRing, [KICK, other, 0, 0])?;
        refuse(&mut vm, Error::NoRing, [TEARDOWN, other, 0, 0])?;
        ring.push(&NOP, 1)?;
        vm.vcpus[0].exit(Exit::Pio)?;
        check_eq!(ring.done(), ring.tail(), "done after taking down {other}");
    }
    check_eq!(vm.hypercall(0, KICK, ring.id(), 0, 0)?, 0, "kicking the real one");
    check_eq!(vm.hypercall(0, TEARDOWN, ring.id(), 0, 0)?, 0, "taking down the real one");
    refuse(&mut vm, Error::NoRing, [TEARDOWN, ring.id(), 0, 0])?;
    refuse(&mut vm, Error::NoRing, [KICK, ring.id(), 0, 0])?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn call_nop() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let before = vm.stats()?;
    for round in 0..100 {
        check_eq!(vm.hypercall(0, CALL, NOP.op.0.into(), round, !round)?, 0, "RAX");
        // It was to be executed before the vCPU went on; so it has been by now.
        let after = vm.stats()?;
        check_eq!(after.since(&before, "executed")?, round + 1, "calls executed");
        check_eq!(after.get("pending")?, 0, "calls pending");
        after.check_law()?;
    }
    Ok(Verdict::Pass)
}

fn bad_entries() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let before = vm.stats()?;
    let mut expected = Vec::new();
    for op in [UNKNOWN.op, Operation(0x7fff), Operation(u16::MAX)] {
        let position = ring.place(&Call { op, arg: [u64::MAX; 2] })?;
        expected.push((position, Error::Operation));
        ring.place(&NOP)?;
    }
    for flags in [1, 0x8000, u16::MAX] {
        let position = ring.tail();
        let mut raw = ring.prepare(&NOP).ok_or("the ring is full")?;
        raw.flags = flags;
        ring.write_entry(position, &raw);
        expected.push((position, Error::Argument));
    }
    ring.publish();
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.tail(), "done");
    for &(position, error) in &expected {
        check_eq!(i64::from(ring.status(position)), error.to_rax(), "status of entry {position}");
    }
    check_eq!(ring.declined(), expected.len() as u64, "declined in the header");
    let after = vm.stats()?;
    check_eq!(after.since(&before, "executed")?, 3, "entries executed");
    check_eq!(after.since(&before, "declined")?, 6, "entries declined");
    check_eq!(after.since(&before, "errors_operation")?, 3, "errors_operation");
    check_eq!(after.since(&before, "errors_argument")?, 3, "errors_argument");
    after.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn user_mode() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let before = vm.stats()?;
    let calls = [
        [SETUP, BASE + 0x10_0000, 64, 0],
        [TEARDOWN, ring.id(), 0, 0],
        [KICK, ring.id(), 0, 0],
        [CALL, NOP.op.0.into(), 0, 0],
        [99, 0, 0, 0],
    ];
    for call in calls {
        check_eq!(vm.vcpus[0].user_hypercall(call)?, -1, "{call:?} at CPL 3");
    }
    let after = vm.stats()?;
    check_eq!(after.since(&before, "submitted")?, 0, "calls submitted from CPL 3");
    ring.push(&NOP, 7)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.tail(), "done of the ring that CPL 3 could not take down");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn system_management_mode() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    if !vm.enable_smm()? {
        return Ok(Verdict::Skip("KVM has no system management mode".into()));
    }
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let calls = [
        [Function::Features as u64, 0, 0, 0],
        [SETUP, BASE + 0x10_0000, 64, 0],
        [TEARDOWN, ring.id(), 0, 0],
        [KICK, ring.id(), 0, 0],
        [CALL, NOP.op.0.into(), 0, 0],
    ];
    let before = vm.stats()?;
    for call in calls {
        let eax = vm.vcpus[0].smm_hypercall(call)?;
        check_eq!(i64::from(eax), Error::Refused.to_rax(), "{call:?} in SMM");
    }
    let after = vm.stats()?;
    check_eq!(after.since(&before, "submitted")?, 0, "calls submitted from SMM");
    check_eq!(after.since(&before, "errors_refused")?, calls.len() as u64, "errors_refused");
    ring.push(&NOP, 7)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.tail(), "done of the ring that SMM could not take down");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}
