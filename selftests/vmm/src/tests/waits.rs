// SPDX-License-Identifier: GPL-2.0

//! What a thread of a VMM waits for, what ends that, and who is held up meanwhile: nobody. The subject inserts
//! and removes all modules.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dlh_abi::{header, Call, Error, Function, Operation, RawEntry};

use super::reload::Modules;
use super::{check_ring_works, check_vm_works};
use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, PAGE};
use crate::ring::{Ring, NOP, UNKNOWN};
use crate::stats::directories;
use crate::thread::{wait_until, with_vcpu, PATIENCE};
use crate::vcpu::{Exit, Vcpu};
use crate::vm::{Vm, VmConfig, BASE};

/// The operation of `selftests/modules/kept_operation.c`.
const KEPT: Call = Call { op: Operation(62), arg: [0, 0] };
/// Where memory is that goes.
const PLACE: u64 = 0x2000_0000;
/// The first slot of a ring's second page.
const SECOND_PAGE: u32 = ((PAGE - dlh_abi::HEADER_BYTES) / RawEntry::BYTES) as u32;

/// What a thread of a VMM can wait in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Wait {
    /// The return of KVM_RUN to the VMM.
    Leave,
    Kick,
    Call,
    Calls,
    /// RING_TEARDOWN by another vCPU.
    Teardown,
}

struct Build {
    ours: Modules,
    test_modules: Modules,
}

type Entry = (&'static str, fn(&Build) -> CaseResult);

pub(super) fn cases(build: &Path) -> Vec<Case> {
    const CASES: &[Entry] = &[
        ("KICK waits for what it saw, and for nothing that comes later", kick_waits_for_position),
        ("the return to the VMM waits for what it took", leave_waits_for_position),
        ("a SIGKILL ends the return to the VMM", |build| killed(build, Wait::Leave)),
        ("a SIGKILL ends a KICK", |build| killed(build, Wait::Kick)),
        ("a SIGKILL ends a CALL", |build| killed(build, Wait::Call)),
        ("a SIGKILL ends CALLS", |build| killed(build, Wait::Calls)),
        ("a SIGKILL ends RING_TEARDOWN", |build| killed(build, Wait::Teardown)),
        ("entries that nobody serves hold up nobody", unserved_entries),
        ("rmmod does not wait for entries that nobody serves", unserved_rmmod),
        ("a status that cannot be stored is stored later", status_later),
        ("entries that are swapped out are executed", swapped),
        ("what the host stores is in the dirty log", dirty_log),
    ];
    let build = Rc::new(Build {
        ours: Modules(build.join("modules")),
        test_modules: Modules(build.join("test-modules")),
    });
    CASES
        .iter()
        .map(|&(name, run)| {
            let build = build.clone();
            Case::new(name, move || {
                build.ours.insert("kvm_dlh")?;
                build.test_modules.insert("kept_operation")?;
                let result = run(&build);
                // Whatever happened, the next case finds a stock host.
                let _ = build.ours.remove("kept_operation");
                let _ = build.ours.remove("kvm_dlh");
                result
            })
        })
        .collect()
}

/// Reads a counter of the operation.
fn kept(name: &str) -> Result<u32> {
    let path = format!("/sys/module/kept_operation/parameters/{name}");
    Ok(fs::read_to_string(path)?.trim().parse()?)
}

fn wait_kept(count: u32) -> Result<()> {
    wait_until(PATIENCE, &format!("{count} calls are kept"), || {
        kept("kept").is_ok_and(|n| n == count)
    })
}

/// Ends the first of the calls that are kept, with a status.
fn release(count: u32, status: i32) -> Result<()> {
    let parameters = Path::new("/sys/module/kept_operation/parameters");
    fs::write(parameters.join("status"), status.to_string())?;
    Ok(fs::write(parameters.join("release"), count.to_string())?)
}

/// Shows `meanwhile` the VM while its vCPU 0 publishes one kept call and waits for it on its way back here.
fn while_leaving(vm: &mut Vm, meanwhile: impl FnOnce(&mut Vm, Ring) -> Result<()>) -> Result<()> {
    let mut ring = Ring::set_up(vm, 0, BASE, 64, 0)?;
    ring.push(&KEPT, 1)?;
    let mut vcpu = vm.vcpus.remove(0);
    with_vcpu(
        &mut vcpu,
        |vcpu| vcpu.exit(Exit::Pio),
        || {
            wait_kept(1)?;
            meanwhile(vm, ring)
        },
    )?;
    vm.vcpus.insert(0, vcpu);
    Ok(())
}

fn kick(vcpu: &mut Vcpu, id: u64) -> Result<i64> {
    vcpu.hypercall(Function::Kick as u64, id, 0, 0)
}

fn kick_waits_for_position(_build: &Build) -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 3, ..VmConfig::default() })?;
    while_leaving(&mut vm, |vm, mut ring| {
        // Numbers 0 and 1 are vCPUs 1 and 2: the first one has been taken out.
        let (mut second, mut third) = (vm.vcpus.remove(0), vm.vcpus.remove(0));
        let id = ring.id();
        std::thread::scope(|scope| {
            let first_kick = scope.spawn(|| kick(&mut second, id));
            // It has looked at the ring, or will before the next entry comes: either way it sees the first.
            let kicks = || vm.stats().and_then(|stats| stats.get("kicks"));
            wait_until(PATIENCE, "the first KICK", || kicks().is_ok_and(|count| count == 1))?;
            wait_until(PATIENCE, "the first KICK waits", || sleeps_in_kick(1))?;
            ring.push(&KEPT, 1)?;
            let second_kick = scope.spawn(|| kick(&mut third, id));
            wait_kept(2)?;
            release(1, 0)?;
            wait_until(PATIENCE, "the first KICK ends with the second call pending", || {
                first_kick.is_finished()
            })?;
            check_eq!(kept("kept")?, 1, "calls that are kept");
            check!(!second_kick.is_finished(), "the second KICK did not wait");
            check_eq!(ring.done(), 1, "done");
            release(1, 0)?;
            for kick in [first_kick, second_kick] {
                check_eq!(kick.join().map_err(|_| "a thread panicked")??, 0, "KICK");
            }
            check_eq!(ring.done(), 2, "done at the end");
            Ok(())
        })?;
        vm.vcpus = vec![second, third];
        Ok(())
    })?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

/// Whether at least so many threads of this process sleep in a wait of the module's that only a SIGKILL ends, apart
/// from the one that is on its way out of KVM_RUN.
fn sleeps_in_kick(count: usize) -> bool {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return false };
    let waiting = |task: &fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
    };
    tasks.flatten().filter(waiting).count() > count
}

fn leave_waits_for_position(_build: &Build) -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    ring.push(&KEPT, 1)?;
    let id = ring.id();
    let (mut first, mut second) = (vm.vcpus.remove(0), vm.vcpus.remove(0));
    let stop = std::thread::scope(|scope| {
        // Once: the next return would wait for the second call as well, which is there when it begins.
        let leave = scope.spawn(|| first.begin_exit(Exit::Pio));
        wait_kept(1)?;
        wait_until(PATIENCE, "KVM_RUN is on its way to the VMM", || sleeps_in_kick(0))?;
        ring.push(&KEPT, 1)?;
        let kick = scope.spawn(|| kick(&mut second, id));
        wait_kept(2)?;
        release(1, 0)?;
        wait_until(PATIENCE, "KVM_RUN returns with the second call pending", || {
            leave.is_finished()
        })?;
        check_eq!(kept("kept")?, 1, "calls that are kept");
        check!(!kick.is_finished(), "the KICK did not wait");
        release(1, 0)?;
        let stop = leave.join().map_err(|_| "a thread panicked")??;
        check_eq!(kick.join().map_err(|_| "a thread panicked")??, 0, "KICK");
        Ok(stop)
    })?;
    first.finish_exit(stop)?;
    vm.vcpus = vec![first, second];
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

/// The process of [`killed`]: one of its threads waits for a kept call, until it is killed.
pub(crate) fn wait_for_ever(wait: Wait) -> Result<()> {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let [arg0, arg1] = KEPT.arg;
    match wait {
        Wait::Call => {
            vm.hypercall(0, Function::Call as u64, KEPT.op.0.into(), arg0, arg1)?;
        }
        Wait::Calls => {
            let (memory, offset) = vm.memory_at(BASE)?;
            memory.word(offset + 8).store(KEPT.op.0.into(), Ordering::SeqCst);
            vm.hypercall(0, Function::Calls as u64, BASE, 1, 0)?;
        }
        Wait::Leave | Wait::Kick => {
            let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
            ring.push(&KEPT, 1)?;
            if wait == Wait::Kick {
                vm.hypercall(0, Function::Kick as u64, ring.id(), 0, 0)?;
            } else {
                vm.vcpus[0].exit(Exit::Pio)?;
            }
        }
        Wait::Teardown => while_leaving(&mut vm, |vm, ring| {
            vm.hypercall(0, Function::RingTeardown as u64, ring.id(), 0, 0).map(drop)
        })?,
    }
    failed("nothing was waited for")
}

/// A child, killed at the latest when this is dropped.
struct Waiting(Child);

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn killed(_build: &Build, wait: Wait) -> CaseResult {
    let name = clap::ValueEnum::to_possible_value(&wait).ok_or("it has no name")?;
    let child = Command::new(std::env::current_exe()?)
        .args(["wait", name.get_name()])
        .stdin(Stdio::null())
        .spawn()?;
    let mut child = Waiting(child);
    wait_kept(1)?;
    if wait == Wait::Leave {
        // Twice as long as a task may be hung, on this host, before the kernel complains.
        std::thread::sleep(Duration::from_secs(11));
    }
    if wait == Wait::Teardown {
        let count = |name| super::super::stats::of_process("kvm_dlh", child.0.id())?.get(name);
        wait_until(PATIENCE, "the other vCPU's hypercall", || {
            // FEATURES, RING_SETUP, RING_TEARDOWN
            count("hypercalls").is_ok_and(|calls| calls >= 3)
        })?;
    }
    let began = Instant::now();
    child.0.kill()?;
    child.0.wait()?;
    let took = began.elapsed();
    println!("# {:.2} s from the SIGKILL to the end of the process", took.as_secs_f64());
    check!(took < PATIENCE, "the SIGKILL took {took:?}");
    if !matches!(wait, Wait::Call | Wait::Calls) {
        // What is pending of a ring keeps the VM, and only that. Calls by trap end with the VM.
        check_eq!(kept("kept")?, 1, "calls that are kept");
    }
    release(1, 0)?;
    let pid = child.0.id();
    wait_until(PATIENCE, "the module has forgotten the VM", || {
        directories("kvm_dlh", pid).is_ok_and(|found| found.is_empty())
    })?;
    Ok(Verdict::Pass)
}

/// A VM with a ring of which one entry is visible, and no more there: who reads it has to ask userfaultfd, which
/// nobody serves until the result is dropped.
fn with_unserved_entry(vm: &mut Vm) -> Result<(Ring, std::os::fd::OwnedFd)> {
    let slot = vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, 2 << 20)?)?;
    let memory = vm.region(slot).mapping.clone();
    let mut ring = Ring::set_up(vm, 0, PLACE, 256, SECOND_PAGE)?;
    ring.push(&NOP, 1)?;
    memory.give_back(PAGE, PAGE)?;
    let armed = memory.arm_userfaultfd()?;
    Ok((ring, armed))
}

fn unserved_entries(_build: &Build) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let (ring, armed) = with_unserved_entry(&mut vm)?;
    let mut vcpu = vm.vcpus.remove(0);
    with_vcpu(
        &mut vcpu,
        |vcpu| vcpu.exit(Exit::Pio),
        || {
            // Neither the tools of root nor another tenant wait, whether the vCPU does by now or not.
            for _ in 0..20 {
                check!(vm.rings()?.contains("entries=256"), "the ring is not shown");
                check_vm_works(&mut Vm::new(VmConfig::default())?)?;
            }
            Ok(())
        },
    )?;
    vm.vcpus.push(vcpu);
    // What does not come is given up, and the guest falls back.
    check_eq!(vm.stats()?.get("rings_lost")?, 1, "rings that were given up");
    let rax = kick(&mut vm.vcpus[0], ring.id())?;
    check_eq!(rax, Error::NoRing.to_rax(), "KICK of a ring that was given up");
    drop(armed);
    check_ring_works(&mut vm, 0, PLACE)?;
    Ok(Verdict::Pass)
}

fn unserved_rmmod(build: &Build) -> CaseResult {
    build.ours.remove("kept_operation")?;
    let mut vm = Vm::new(VmConfig::default())?;
    let (_ring, _armed) = with_unserved_entry(&mut vm)?;
    let mut vcpu = vm.vcpus.remove(0);
    with_vcpu(&mut vcpu, |vcpu| vcpu.exit(Exit::Pio), || build.ours.remove("kvm_dlh"))?;
    Ok(Verdict::Pass)
}

fn status_later(_build: &Build) -> CaseResult {
    // Should the machine be so slow that the ring is given up before the memory is back, once more.
    for _ in 0..10 {
        let mut vm = Vm::new(VmConfig::default())?;
        let slot = vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, 2 << 20)?)?;
        let memory = vm.region(slot).mapping.clone();
        let mut ring = Ring::set_up(&mut vm, 0, PLACE, 256, SECOND_PAGE)?;
        ring.push(&KEPT, 1)?;
        let mut vcpu = vm.vcpus.remove(0);
        with_vcpu(
            &mut vcpu,
            |vcpu| vcpu.exit(Exit::Pio),
            || {
                wait_kept(1)?;
                memory.give_back(PAGE, PAGE)?;
                let armed = memory.arm_userfaultfd()?;
                release(1, Error::Busy.to_rax() as i32)?;
                check_eq!(ring.done(), SECOND_PAGE, "done before the status is stored");
                drop(armed);
                wait_until(PATIENCE, "KVM_RUN returns", || {
                    ring.done() != SECOND_PAGE
                        || vm.stats().is_ok_and(|s| s.get("rings_lost").is_ok_and(|n| n > 0))
                })
            },
        )?;
        vm.vcpus.push(vcpu);
        vm.stats()?.check_law()?;
        if vm.stats()?.get("rings_lost")? == 0 {
            check_eq!(ring.done(), SECOND_PAGE + 1, "done");
            let status = i64::from(ring.status(SECOND_PAGE));
            check_eq!(status, Error::Busy.to_rax(), "the status");
            check_eq!(ring.declined(), 1, "declined in the header");
            check_eq!(vm.stats()?.get("errors_busy")?, 1, "declined, as counted");
            return Ok(Verdict::Pass);
        }
    }
    failed("the ring was given up each time")
}

fn swapped(_build: &Build) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let slot = vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, 2 << 20)?)?;
    let memory = vm.region(slot).mapping.clone();
    let mut ring = Ring::set_up(&mut vm, 0, PLACE, 1024, 0)?;
    for round in 0..8 {
        let before = vm.stats()?;
        ring.push(&NOP, 1024)?;
        memory.page_out()?;
        vm.vcpus[0].exit(if round % 2 == 0 { Exit::Pio } else { Exit::Kick })?;
        check_eq!(ring.done(), ring.tail(), "done");
        check_eq!(vm.stats()?.since(&before, "executed")?, 1024, "entries executed");
    }
    check_eq!(vm.stats()?.get("rings_lost")?, 0, "rings that were given up");
    Ok(Verdict::Pass)
}

fn dirty_log(_build: &Build) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let slot = vm.slot_at(BASE)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 256, SECOND_PAGE)?;
    vm.log_dirty(slot)?;
    vm.dirty_pages(slot)?;
    check_eq!(vm.dirty_pages(slot)?, vec![], "pages written while nothing happens");
    // What this process stores is not the guest's, and not logged by KVM.
    ring.push(&UNKNOWN, 1)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.tail(), "done");
    check_eq!(vm.dirty_pages(slot)?, vec![0, 1], "pages with done and with the status");
    ring.push(&NOP, 1)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(vm.dirty_pages(slot)?, vec![0], "the page with done");
    let (memory, offset) = vm.memory_at(BASE)?;
    let done = memory.word32(offset + header::DONE).load(Ordering::SeqCst);
    check_eq!(done, ring.tail(), "done");
    Ok(Verdict::Pass)
}
