// SPDX-License-Identifier: GPL-2.0

//! Drains whose time is up in the middle (the module is inserted with budget_us=1), and entries that wait
//! longer than max_defer_us for an exit.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dlh_abi::{header, Function};

use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::ring::{Ring, NOP};
use crate::thread::{wait_until, with_vcpu, PATIENCE};
use crate::vcpu::{Exit, Stop, Vcpu};
use crate::vm::{Irqchip, Vm, VmConfig, BASE};

/// Many seconds of a loop without an exit.
const LONG: u64 = 1 << 40;
/// Entries of the rings.
const ENTRIES: u32 = 1024;

pub(super) fn short_cases() -> Vec<Case> {
    vec![
        Case::new("a drain ends when its time is up, and the next exit goes on", goes_on),
        Case::new("what a drain leaves is executed before the vCPU waits", before_waiting),
        Case::new("what a drain leaves is executed before the VMM runs", before_vmm),
        Case::new("what a drain leaves is executed before KICK returns", before_kick),
        Case::new("what another vCPU's KICK leaves does not keep the VM", kick_and_go),
        Case::new("an array of calls is cut short", array),
    ]
}

fn filled(vm: &mut Vm) -> Result<Ring> {
    let mut ring = Ring::set_up(vm, 0, BASE, ENTRIES, u32::MAX - 500)?;
    ring.push(&NOP, ENTRIES)?;
    Ok(ring)
}

/// Lets the guest exit once in the kernel and look at `done`.
fn done_after_cpuid(vm: &mut Vm, ring: &mut Ring) -> Result<u32> {
    let stop = vm.vcpus[0].begin_publish(ring, 0, Exit::Cpuid)?;
    // What the guest saw: the VMM, later, sees all of it.
    Ok(vm.vcpus[0].finish_publish(stop)?.done)
}

fn goes_on() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, ENTRIES, u32::MAX - 500)?;
    let before = vm.stats()?;
    let start = ring.tail();
    for _ in 0..ENTRIES / 2 {
        ring.stage(&NOP)?;
    }
    let seen = done_after_cpuid(&mut vm, &mut ring)?.wrapping_sub(start);
    check!((32..ENTRIES / 2).contains(&seen), "{seen} entries executed at one exit");
    check_eq!(ring.done(), ring.tail(), "done when the VMM sees it");
    let after = vm.stats()?;
    check!(after.since(&before, "drains")? > 1, "all of it took one drain");
    check_eq!(after.since(&before, "executed")?, u64::from(ENTRIES / 2), "entries executed");
    after.check_law()?;
    Ok(Verdict::Pass)
}

fn before_waiting() -> CaseResult {
    let mut vm = Vm::new(VmConfig { irqchip: Irqchip::Kernel, ..VmConfig::default() })?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, ENTRIES, 0)?;
    for _ in 0..ENTRIES / 2 {
        ring.stage(&NOP)?;
    }
    let mut vcpu = vm.vcpus.remove(0);
    let watched = vm.memory_at(BASE)?.0;
    with_vcpu(
        &mut vcpu,
        |vcpu| vcpu.begin_publish(&mut ring, 0, Exit::Hlt),
        || {
            wait_until(PATIENCE, "done while the vCPU waits", || {
                watched.word32(header::DONE).load(Ordering::SeqCst) == ENTRIES / 2
            })
        },
    )?;
    vcpu.park()?;
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn before_vmm() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let ring = filled(&mut vm)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.tail(), "done when the VMM sees an exit");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn before_kick() -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let ring = filled(&mut vm)?;
    // Another vCPU does it: nothing else executes them.
    let result = vm.vcpus[1].hypercall(Function::Kick as u64, ring.id(), 0, 0)?;
    check_eq!((result, ring.done()), (0, ring.tail()), "KICK, and done after it");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn kick_and_go() -> CaseResult {
    for _ in 0..4 {
        let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 65536, 0)?;
        ring.push(&NOP, 20000)?;
        let mut kicker = vm.vcpus.remove(1);
        let id = ring.id();
        // The ring's own vCPU never runs again; its ring is filled while another one has it drained.
        with_vcpu(
            &mut kicker,
            |kicker| kicker.hypercall(Function::Kick as u64, id, 0, 0).map(drop),
            || {
                let begin = Instant::now();
                while ring.tail() < 60000 && begin.elapsed() < Duration::from_secs(2) {
                    ring.push(&NOP, 1)?;
                }
                Ok(())
            },
        )?;
        vm.stats()?.check_law()?;
        drop((kicker, vm));
        wait_until(PATIENCE, "the module has forgotten the VM", || {
            crate::stats::directories("kvm_dlh", std::process::id()).is_ok_and(|d| d.is_empty())
        })?;
    }
    Ok(Verdict::Pass)
}

fn array() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 512, 0)?;
    for _ in 0..512 {
        ring.place(&NOP)?;
    }
    let entries = BASE + dlh_abi::HEADER_BYTES as u64;
    let ended = vm.hypercall(0, Function::Calls as u64, entries, 512, 0)?;
    check!((1..512).contains(&ended), "CALLS of 512 ended {ended}");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

/// For a host whose last CPU has no timer tick.
pub(super) fn tickless_cases(defer_us: u64) -> Vec<Case> {
    if defer_us == 0 {
        return vec![Case::new("entries wait for as long as it takes", wait_for_ever)];
    }
    vec![
        Case::new("entries wait no longer than max_defer_us", move || wait_for_defer(defer_us)),
        Case::new("an empty ring makes no exits", empty_is_left_alone),
    ]
}

/// Binds the calling thread to the last CPU.
fn move_to_last_cpu() -> Result<()> {
    // SAFETY: A set of CPUs is plain data, and has room for a thousand.
    unsafe {
        let last = libc::sysconf(libc::_SC_NPROCESSORS_ONLN) - 1;
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(last as usize, &mut set);
        if libc::sched_setaffinity(0, size_of_val(&set), &set) != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
    }
    Ok(())
}

/// Lets the guest publish one entry and go on without an exit; how long it took to be executed.
fn deferred_for(vm: &Vm, vcpu: &mut Vcpu, ring: &mut Ring, limit: Duration) -> Result<Duration> {
    ring.stage(&NOP)?;
    let tail = ring.tail();
    let watched = vm.memory_at(BASE)?.0;
    let word = |at| watched.word32(at).load(Ordering::SeqCst);
    let (stop, waited) = with_vcpu(
        vcpu,
        |vcpu| {
            move_to_last_cpu()?;
            vcpu.begin_publish(ring, LONG, Exit::Pio)
        },
        || {
            wait_until(PATIENCE, "the entry is visible", || word(header::TAIL) == tail)?;
            let begin = Instant::now();
            while word(header::DONE) != tail && begin.elapsed() < limit {
                std::thread::sleep(Duration::from_micros(200));
            }
            Ok(begin.elapsed())
        },
    )?;
    check_eq!(stop, Stop::Interrupted, "how the guest stopped");
    vcpu.park()?;
    Ok(waited)
}

fn waits(limit: Duration) -> Result<(Vm, Vec<Duration>)> {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let mut vcpu = vm.vcpus.remove(0);
    let mut all = Vec::new();
    for _ in 0..12 {
        all.push(deferred_for(&vm, &mut vcpu, &mut ring, limit)?);
    }
    all.sort();
    println!("# waited {all:?}");
    vm.vcpus.push(vcpu);
    vm.stats()?.check_law()?;
    Ok((vm, all))
}

fn wait_for_ever() -> CaseResult {
    let limit = Duration::from_millis(300);
    let (vm, all) = waits(limit)?;
    if all[all.len() / 2] < limit {
        return Ok(Verdict::Skip("something makes this CPU's guest exit all the time".into()));
    }
    check_eq!(vm.stats()?.get("defer_kicks")?, 0, "exits that were forced");
    Ok(Verdict::Pass)
}

fn wait_for_defer(defer_us: u64) -> CaseResult {
    let (vm, all) = waits(Duration::from_secs(5))?;
    // The emulation may stop for a while: one in two must be about in time, and all must come.
    let bound = Duration::from_micros(defer_us * 3 / 2);
    check!(all[all.len() / 2] <= bound, "half of them waited longer than {bound:?}");
    check!(all[all.len() - 1] < Duration::from_secs(5), "one was not executed");
    check!(vm.stats()?.get("defer_kicks")? > 0, "no exit was forced");
    Ok(Verdict::Pass)
}

fn empty_is_left_alone() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let mut vcpu = vm.vcpus.remove(0);
    let before = vm.stats()?;
    let (stop, exits) = with_vcpu(
        &mut vcpu,
        |vcpu| {
            move_to_last_cpu()?;
            vcpu.begin_publish(&mut ring, LONG, Exit::Pio)
        },
        || {
            std::thread::sleep(Duration::from_millis(500));
            let exits = vm.exits()?;
            std::thread::sleep(Duration::from_secs(2));
            Ok(vm.exits()? - exits)
        },
    )?;
    check_eq!(stop, Stop::Interrupted, "how the guest stopped");
    vcpu.park()?;
    println!("# {exits} exits in 2 s");
    check_eq!(vm.stats()?.since(&before, "defer_kicks")?, 0, "exits that were forced");
    // Looks at a period of some milliseconds would be hundreds.
    check!(exits < 100, "{exits} exits of a vCPU that has nothing to say");
    Ok(Verdict::Pass)
}
