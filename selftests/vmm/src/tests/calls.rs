// SPDX-License-Identifier: GPL-2.0

//! Arrays of calls by one trap, events for the host's trace, and the order of both with a ring.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use dlh_abi::{Call, Error, Function, Operation, RawEntry, MAX_CALLS};

use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result, Verdict};
use crate::memory::Mapping;
use crate::ring::{Ring, NOP, UNKNOWN};
use crate::vcpu::Exit;
use crate::vm::{Vm, VmConfig, BASE};

const CALL: u64 = Function::Call as u64;
const CALLS: u64 = Function::Calls as u64;
/// Where arrays are put: not at the start of a page.
const ARRAY: u64 = BASE + 0x10_0000 + 32;
/// Pages that are reported free.
const PAGES: u64 = BASE + 0x20_0000;
const TRACING: &str = "/sys/kernel/tracing";

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("an array of each size, with a status for each call", sizes),
        Case::new("an array of pages that are free", free_pages),
        Case::new("a call leaves its array alone but for the status", untouched),
        Case::new("an event of the guest is in the host's trace", traced),
        Case::new("an event's time is right across a wrap of its lower half", time_wraps),
        Case::new("an event before the beginning of time", impossible_time),
        Case::new("nobody looks at the trace", not_traced),
        Case::new("CALL and CALLS come after what is in the ring", order),
        Case::new("statistics for each operation", by_operation),
    ]
}

/// Writes calls into guest memory.
fn write_array(vm: &Vm, calls: &[RawEntry]) -> Result<()> {
    let (memory, offset) = vm.memory_at(ARRAY)?;
    for (index, raw) in calls.iter().enumerate() {
        let at = offset + index * RawEntry::BYTES;
        let second =
            u64::from(raw.op) | (u64::from(raw.flags) << 16) | (u64::from(raw.time()) << 32);
        for (place, word) in [raw.tag, second, raw.arg[0], raw.arg[1]].into_iter().enumerate() {
            memory.word(at + place * 8).store(word, Ordering::SeqCst);
        }
    }
    Ok(())
}

fn status(memory: &Mapping, offset: usize, index: usize) -> i32 {
    memory.word32(offset + index * RawEntry::BYTES + RawEntry::STATUS_OFFSET).load(Ordering::SeqCst)
        as i32
}

fn entry(call: &Call) -> RawEntry {
    RawEntry { tag: 0x5555, op: call.op.0, flags: 0, status: 77, arg: call.arg }
}

/// Makes all calls of an array, in as many hypercalls as it takes.
fn make_all(vm: &mut Vm, count: u64) -> Result<u64> {
    let (mut ended, mut traps) = (0, 0);
    while ended < count {
        let at = ARRAY + ended * RawEntry::BYTES as u64;
        let result = vm.hypercall(0, CALLS, at, count - ended, 0)?;
        traps += 1;
        match u64::try_from(result) {
            Ok(some @ 1..) if some <= count - ended => ended += some,
            _ => return failed(format!("CALLS of {} gave {result}", count - ended)),
        }
    }
    Ok(traps)
}

fn sizes() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    for count in [1, 2, 31, 32, 33, 100, MAX_CALLS] {
        let before = vm.stats()?;
        let unknown = |index: u64| index % 3 == 1;
        let calls: Vec<_> =
            (0..count).map(|i| entry(if unknown(i) { &UNKNOWN } else { &NOP })).collect();
        write_array(&vm, &calls)?;
        make_all(&mut vm, count)?;
        let (memory, offset) = vm.memory_at(ARRAY)?;
        for index in 0..count {
            let expected = if unknown(index) { Error::Operation.to_rax() } else { 0 };
            let seen = i64::from(status(&memory, offset, index as usize));
            check_eq!(seen, expected, "status of call {index} of {count}");
        }
        let after = vm.stats()?;
        let declined = (0..count).filter(|&i| unknown(i)).count() as u64;
        check_eq!(after.since(&before, "inserted")?, count, "calls inserted");
        check_eq!(after.since(&before, "declined")?, declined, "calls declined");
        check_eq!(after.since(&before, "executed")?, count - declined, "calls executed");
        after.check_law()?;
    }
    Ok(Verdict::Pass)
}

fn free_pages() -> CaseResult {
    const COUNT: u64 = 40;
    let mut vm = Vm::new(VmConfig::default())?;
    let (memory, offset) = vm.memory_at(PAGES)?;
    memory.fill(offset, (COUNT as usize + 1) * 4096, |_| 0x1234);
    let before = vm.bridge_stats().ok();
    let calls: Vec<_> = (0..COUNT)
        .map(|i| entry(&Call { op: Operation::FREE_PAGES, arg: [PAGES + i * 4096, 4096] }))
        .collect();
    write_array(&vm, &calls)?;
    make_all(&mut vm, COUNT)?;
    let (array, at) = vm.memory_at(ARRAY)?;
    for index in 0..COUNT as usize {
        check_eq!(status(&array, at, index), 0, "status of call {index}");
        let word = memory.word(offset + index * 4096).load(Ordering::SeqCst);
        check_eq!(word, 0, "first word of page {index}, which is finished with");
    }
    let next = memory.word(offset + COUNT as usize * 4096).load(Ordering::SeqCst);
    check_eq!(next, 0x1234, "first word of the page after them");
    let merged = vm.bridge_stats()?.get("merged_pages")?;
    let merged = merged - before.map_or(Ok(0), |stats| stats.get("merged_pages"))?;
    check_eq!(merged, COUNT, "pages merged");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn untouched() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    write_array(&vm, &[entry(&NOP), entry(&UNKNOWN)])?;
    check_eq!(vm.hypercall(0, CALLS, ARRAY, 1, 0)?, 1, "CALLS of one");
    let (memory, offset) = vm.memory_at(ARRAY)?;
    let word = |at| memory.word(offset + at).load(Ordering::SeqCst);
    check_eq!(word(0), 0x5555, "the tag");
    check_eq!(word(8), 0, "operation, flags and status");
    check_eq!(status(&memory, offset, 1), 77, "the status of the call after it");
    Ok(Verdict::Pass)
}

/// The tracepoint, switched on until this is dropped.
struct Trace;

/// A line of it.
#[derive(Debug, PartialEq, Eq)]
struct Event {
    pid: u32,
    vcpu: u64,
    tsc: u64,
    payload: [u64; 2],
}

impl Trace {
    fn set(on: bool) -> Result<()> {
        let enable = Path::new(TRACING).join("events/kvm_dlh/kvm_dlh_guest_event/enable");
        Ok(fs::write(enable, if on { "1" } else { "0" })?)
    }

    fn begin() -> Result<Self> {
        fs::write(Path::new(TRACING).join("trace"), "")?;
        Self::set(true)?;
        Ok(Self)
    }

    fn events(&self) -> Result<Vec<Event>> {
        let text = fs::read_to_string(Path::new(TRACING).join("trace"))?;
        let lines = text.lines().filter_map(|l| l.split_once("kvm_dlh_guest_event: "));
        lines.map(|(_, fields)| Event::parse(fields)).collect()
    }
}

impl Event {
    fn parse(fields: &str) -> Result<Self> {
        let words: Vec<_> = fields.split_whitespace().collect();
        let [_, _, _, pid, _, vcpu, _, tsc, _, low, high] = words[..] else {
            return failed(format!("not an event: {fields:?}"));
        };
        let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16);
        Ok(Self {
            pid: pid.parse()?,
            vcpu: vcpu.parse()?,
            tsc: tsc.parse()?,
            payload: [hex(low)?, hex(high)?],
        })
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = Self::set(false);
    }
}

fn trace_call(payload: [u64; 2]) -> Call {
    Call { op: Operation::TRACE, arg: payload }
}

/// Places an event that happens at `time`.
fn place(ring: &mut Ring, payload: [u64; 2], time: u32) -> Result<u32> {
    let position = ring.tail();
    match ring.prepare(&trace_call(payload)) {
        Some(raw) => ring.write_entry(position, &raw.at(time)),
        None => return failed("the ring is full"),
    }
    Ok(position)
}

fn traced() -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let mut ring = Ring::set_up(&mut vm, 1, BASE, 64, u32::MAX - 2)?;
    let trace = Trace::begin()?;
    let tsc = vm.vcpus[1].tsc()?;
    let mut expected = Vec::new();
    for i in 0..6 {
        let payload = [0xdead_beef_0000_0000 | i, !i];
        let position = place(&mut ring, payload, (tsc + i) as u32)?;
        expected.push(Event { pid: std::process::id(), vcpu: 1, tsc: tsc + i, payload });
        check_eq!(ring.status(position), (tsc + i) as u32 as i32, "the time in the entry");
    }
    ring.publish();
    vm.vcpus[1].exit(Exit::Cpuid)?;
    check_eq!(ring.done(), ring.tail(), "done");
    check_eq!(trace.events()?, expected, "the events in the trace");
    for back in 1..=6 {
        let status = ring.status(ring.tail().wrapping_sub(back));
        check_eq!(status, 0, "status over the time of entry -{back}");
    }
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn time_wraps() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let trace = Trace::begin()?;
    // The lower half wraps between the event and the look at it.
    let event = 0x7_ffff_f000;
    vm.vcpus[0].set_tsc(event)?;
    place(&mut ring, [1, 2], event as u32)?;
    ring.publish();
    while vm.vcpus[0].tsc()? >> 32 == event >> 32 {
        std::hint::spin_loop();
    }
    vm.vcpus[0].exit(Exit::Cpuid)?;
    let events = trace.events()?;
    check_eq!(events.len(), 1, "events");
    check_eq!(events[0].tsc, event, "time of the event");
    Ok(Verdict::Pass)
}

fn impossible_time() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let trace = Trace::begin()?;
    // The counter has only just begun, and the event claims to be before that.
    vm.vcpus[0].set_tsc(0)?;
    place(&mut ring, [1, 2], u32::MAX)?;
    ring.publish();
    vm.vcpus[0].exit(Exit::Cpuid)?;
    check_eq!((ring.done(), ring.status(0)), (1, 0), "done and status");
    check_eq!(trace.events()?.len(), 1, "events");
    Ok(Verdict::Pass)
}

fn not_traced() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    drop(Trace::begin()?);
    let position = place(&mut ring, [3, 4], 99)?;
    ring.publish();
    vm.vcpus[0].exit(Exit::Cpuid)?;
    check_eq!((ring.done(), ring.status(position)), (1, 0), "done and status of the event");
    check_eq!(vm.hypercall(0, CALL, Operation::TRACE.0.into(), 5, 6)?, 0, "CALL of TRACE");
    check!(Trace.events()?.is_empty(), "there is something in the trace");
    Ok(Verdict::Pass)
}

fn order() -> CaseResult {
    const ROUND: u64 = 10;
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let trace = Trace::begin()?;
    for round in 0..20 {
        let first = round * ROUND;
        for i in 0..4 {
            place(&mut ring, [first + i, 0], 0)?;
        }
        ring.publish();
        let op = Operation::TRACE.0.into();
        check_eq!(vm.hypercall(0, CALL, op, first + 4, 0)?, 0, "CALL of TRACE");
        for i in 5..8 {
            place(&mut ring, [first + i, 0], 0)?;
        }
        ring.publish();
        write_array(&vm, &[8, 9].map(|i| entry(&trace_call([first + i, 0]))))?;
        make_all(&mut vm, 2)?;
    }
    let seen: Vec<_> = trace.events()?.iter().map(|event| event.payload[0]).collect();
    check_eq!(seen, (0..20 * ROUND).collect::<Vec<_>>(), "the order of events");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn by_operation() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    ring.push(&NOP, 7)?;
    for _ in 0..3 {
        place(&mut ring, [0, 0], 0)?;
    }
    ring.push(&Call { op: Operation(63), arg: [0, 0] }, 2)?;
    ring.push(&UNKNOWN, 1)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.tail(), "done");
    let lines = vm.operations()?;
    for expected in
        ["0 executed=7 declined=0", "2 executed=3 declined=0", "63 executed=0 declined=2"]
    {
        check!(lines.lines().any(|line| line == expected), "no {expected:?} in {lines:?}");
    }
    check_eq!(lines.lines().count(), 3, "operations that were called");
    Ok(Verdict::Pass)
}
