// SPDX-License-Identifier: GPL-2.0

//! Memory, vCPUs and whole VMs that go away while entries flow.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dlh_abi::{header, Call, Error, Function};

use super::check_vm_works;
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, PAGE};
use crate::ring::{Ring, NOP};
use crate::stats;
use crate::thread::{wait_until, with_vcpu, PATIENCE};
use crate::vcpu::{Exit, Flooded, Stop, Vcpu};
use crate::vm::{Slot, Vm, VmConfig, BASE};

/// Where the rings are whose memory goes away.
const PLACE: u64 = 0x2000_0000;
/// Where they are moved.
const ELSEWHERE: u64 = 0x3000_0000;
const LEN: usize = 1 << 20;
/// Rounds of a race; each one waits a little longer before it strikes.
const ROUNDS: u64 = 12;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("a memslot is deleted while entries flow", slot_deleted),
        Case::new("a memslot is deleted and its place taken while entries flow", slot_replaced),
        Case::new("a memslot is moved while entries flow", slot_moved),
        Case::new("a ring's memory is unmapped below its memslot", unmapped),
        Case::new("a ring's memory becomes read-only for the VMM", write_protected),
        Case::new("other memslots come and go while entries flow", unrelated_slots),
        Case::new("one vCPU kicks and takes down what another one fills", two_vcpus),
        Case::new("a VMM is killed in a flood", killed),
        Case::new("hundreds of VMs come and go", many_vms),
    ]
}

/// Floods a ring with NOPs until something stops it.
fn flood(vcpu: &mut Vcpu, ring: &mut Ring) -> Result<Flooded> {
    vcpu.flood(ring, &NOP, u64::MAX, |stop| matches!(stop, Stop::Tick))
}

/// A VM with memory at [`PLACE`], a ring therein, and entries already executed from it.
fn vm_with_ring(start: u32) -> Result<(Vm, Slot, Ring)> {
    let mut vm = Vm::new(VmConfig::default())?;
    let slot = vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, LEN)?)?;
    let mut ring = Ring::set_up(&mut vm, 0, PLACE, 1024, start)?;
    ring.push(&NOP, 10)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.tail(), "done before the race");
    Ok((vm, slot, ring))
}

/// Checks that a ring is out of use, its memory left alone, and that the VM goes on.
fn check_detached(vm: &mut Vm, ring: &Ring) -> Result<()> {
    let memory = ring.snapshot();
    let before = vm.stats()?;
    for exit in [Exit::Cpuid, Exit::Pio, Exit::Hlt] {
        vm.vcpus[0].exit(exit)?;
    }
    check!(ring.snapshot() == memory, "the host wrote to memory that the VM no longer has");
    check_eq!(vm.stats()?.since(&before, "executed")?, 0, "entries executed afterwards");
    let rax = vm.hypercall(0, Function::Kick as u64, ring.id(), 0, 0)?;
    check_eq!(rax, Error::NoRing.to_rax(), "KICK of the ring that is gone");
    check_vm_works(vm)
}

fn slot_deleted() -> CaseResult {
    for round in 0..ROUNDS {
        let (mut vm, slot, mut ring) = vm_with_ring(round as u32)?;
        let mut vcpu = vm.vcpus.remove(0);
        with_vcpu(
            &mut vcpu,
            |vcpu| flood(vcpu, &mut ring),
            || {
                std::thread::sleep(Duration::from_millis(round));
                vm.remove_memory(slot)
            },
        )?;
        vm.vcpus.push(vcpu);
        // The first exit after the deletion may still take note of it.
        vm.vcpus[0].exit(Exit::Pio)?;
        check_detached(&mut vm, &ring)?;
    }
    Ok(Verdict::Pass)
}

fn slot_replaced() -> CaseResult {
    for round in 0..ROUNDS {
        let (mut vm, slot, mut ring) = vm_with_ring(round as u32)?;
        let mut vcpu = vm.vcpus.remove(0);
        let word_at = |at: usize| !(at as u64);
        let (_, memory) = with_vcpu(
            &mut vcpu,
            |vcpu| {
                let flooded = flood(vcpu, &mut ring)?;
                // What the guest itself writes would hide what the host does.
                check!(flooded.stop != Stop::Done, "the flood ended by itself");
                Ok(())
            },
            || {
                std::thread::sleep(Duration::from_millis(round));
                vm.remove_memory(slot)
            },
        )?;
        drop(memory);
        let slot = vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, LEN)?)?;
        let replacement = vm.region(slot).mapping.clone();
        replacement.fill(0, LEN, word_at);
        vm.vcpus.push(vcpu);
        for exit in [Exit::Cpuid, Exit::Pio] {
            vm.vcpus[0].exit(exit)?;
        }
        let changed = replacement.first_difference(0, LEN, word_at);
        check_eq!(changed, None, "offset of what the host wrote to other memory");
        check_detached(&mut vm, &ring)?;
        super::check_ring_works(&mut vm, 0, PLACE)?;
    }
    Ok(Verdict::Pass)
}

fn slot_moved() -> CaseResult {
    for round in 0..ROUNDS {
        let (mut vm, slot, mut ring) = vm_with_ring(round as u32)?;
        let mut vcpu = vm.vcpus.remove(0);
        with_vcpu(
            &mut vcpu,
            |vcpu| flood(vcpu, &mut ring),
            || {
                std::thread::sleep(Duration::from_millis(round));
                vm.move_memory(slot, ELSEWHERE)
            },
        )?;
        vm.vcpus.push(vcpu);
        vm.vcpus[0].exit(Exit::Pio)?;
        check_detached(&mut vm, &ring)?;
        super::check_ring_works(&mut vm, 0, ELSEWHERE)?;
    }
    Ok(Verdict::Pass)
}

fn unmapped() -> CaseResult {
    for publish_first in [false, true] {
        let (mut vm, slot, mut ring) = vm_with_ring(7)?;
        let before = vm.stats()?;
        if publish_first {
            ring.push(&NOP, 5)?;
        }
        let id = ring.id();
        drop(ring);
        vm.unmap_memory(slot)?;
        for exit in [Exit::Cpuid, Exit::Pio, Exit::Hlt, Exit::Hypercall] {
            vm.vcpus[0].exit(exit)?;
        }
        let rax = vm.hypercall(0, Function::Kick as u64, id, 0, 0)?;
        check_eq!(rax, Error::NoRing.to_rax(), "KICK of a ring that is not there");
        check_eq!(vm.stats()?.since(&before, "executed")?, 0, "entries executed");
        let rax = vm.hypercall(0, Function::RingSetup as u64, PLACE, 64, 0)?;
        check_eq!(rax, Error::Memory.to_rax(), "RING_SETUP where nothing is mapped");
        check_vm_works(&mut vm)?;
    }
    Ok(Verdict::Pass)
}

fn write_protected() -> CaseResult {
    let (mut vm, slot, mut ring) = vm_with_ring(7)?;
    let memory = vm.region(slot).mapping.clone();
    ring.push(&NOP, 5)?;
    memory.protect(false)?;
    for exit in [Exit::Cpuid, Exit::Pio, Exit::Hlt, Exit::Hypercall] {
        vm.vcpus[0].exit(exit)?;
    }
    let rax = vm.hypercall(0, Function::RingSetup as u64, PLACE, 64, 0)?;
    check_eq!(rax, Error::Memory.to_rax(), "RING_SETUP in memory the VMM cannot write");
    memory.protect(true)?;
    vm.stats()?.check_law()?;
    check_vm_works(&mut vm)?;
    super::check_ring_works(&mut vm, 0, PLACE)?;
    Ok(Verdict::Pass)
}

fn unrelated_slots() -> CaseResult {
    let (mut vm, _, mut ring) = vm_with_ring(u32::MAX)?;
    let before = vm.stats()?;
    let start = ring.tail();
    let mut vcpu = vm.vcpus.remove(0);
    with_vcpu(
        &mut vcpu,
        |vcpu| flood(vcpu, &mut ring),
        || {
            for round in 0..2 * ROUNDS {
                let gpa = ELSEWHERE + round * LEN as u64;
                let slot = vm.add_memory(gpa, Mapping::new(Backing::Anonymous, LEN)?)?;
                std::thread::sleep(Duration::from_millis(1));
                vm.remove_memory(slot)?;
            }
            Ok(())
        },
    )?;
    vm.vcpus.push(vcpu);
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.guest_tail(), "done of the ring that was not concerned");
    let executed = vm.stats()?.since(&before, "executed")?;
    check_eq!(executed as u32, ring.guest_tail().wrapping_sub(start), "entries executed");
    check!(executed > 1000, "only {executed} entries flowed");
    vm.stats()?.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn two_vcpus() -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    for _ in 0..ROUNDS {
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
        let id = ring.id();
        let mut other = vm.vcpus.remove(1);
        let mut vcpu = vm.vcpus.remove(0);
        with_vcpu(
            &mut vcpu,
            |vcpu| flood(vcpu, &mut ring),
            || {
                for _ in 0..50 {
                    let rax = other.hypercall(Function::Kick as u64, id, 0, 0)?;
                    check_eq!(rax, 0, "KICK by the other vCPU");
                }
                let rax = other.hypercall(Function::RingTeardown as u64, id, 0, 0)?;
                check_eq!(rax, 0, "RING_TEARDOWN by the other vCPU");
                let (memory, offset) = vm.memory_at(BASE)?;
                // On return nothing is worked on: done stands still from here on.
                let done = memory.word32(offset + header::DONE).load(Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(5));
                check_eq!(
                    memory.word32(offset + header::DONE).load(Ordering::SeqCst),
                    done,
                    "done after teardown"
                );
                Ok(())
            },
        )?;
        vm.vcpus = vec![vcpu, other];
        vm.stats()?.check_law()?;
        check_vm_works(&mut vm)?;
    }
    Ok(Verdict::Pass)
}

/// The process of a [`Victim`]: two vCPUs that fill their rings for ever.
pub(crate) fn flood_forever(call: &Call) -> Result<()> {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let mut busy = Vec::new();
    for index in [0, 1] {
        busy.push(Ring::set_up(&mut vm, index, BASE + index as u64 * LEN as u64, 1024, 0)?);
    }
    println!("ready");
    std::thread::scope(|scope| {
        for (vcpu, ring) in vm.vcpus.iter_mut().zip(&mut busy) {
            let on_stop = |stop| matches!(stop, Stop::Tick);
            scope.spawn(move || while vcpu.flood(ring, call, u64::MAX, on_stop).is_ok() {});
        }
    });
    Ok(())
}

/// A child that floods its rings with a call until it is killed, at the latest when this is dropped.
pub(super) struct Victim(Child);

impl Victim {
    /// Starts it; the host knows its VM when this returns.
    pub(super) fn start(call: &Call) -> Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .arg("flood")
            .args([call.op.0.into(), call.arg[0], call.arg[1]].map(|word: u64| word.to_string()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut child = Self(child);
        let mut line = String::new();
        let output = child.0.stdout.take().ok_or("the child has no output")?;
        BufReader::new(output).read_line(&mut line)?;
        check_eq!(line, "ready\n", "what the child said");
        Ok(child)
    }

    /// Its pid.
    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn killed() -> CaseResult {
    for round in 0..20 {
        let child = Victim::start(&NOP)?;
        let pid = child.pid();
        check_eq!(
            stats::directories("kvm_dlh", pid)?.len(),
            1,
            "VMs the module knows of the child"
        );
        std::thread::sleep(Duration::from_millis(round));
        drop(child);
        wait_until(PATIENCE, "the module has forgotten the VM", || {
            stats::directories("kvm_dlh", pid).is_ok_and(|found| found.is_empty())
        })?;
    }
    Ok(Verdict::Pass)
}

/// What a VM that comes and goes does meanwhile; told how many there were before it.
type Life = fn(&mut Vm, u32) -> Result<()>;

/// Makes VMs and lets them go after their `life`, `most` of them, or, where that takes longer than `limit`, at least
/// `least`; returns how many.
pub(super) fn vms_in_turn(least: u32, most: u32, limit: Duration, life: Life) -> Result<u32> {
    let started = Instant::now();
    let mut made = 0;
    while made < least || (made < most && started.elapsed() < limit) {
        life(&mut Vm::new(VmConfig { memory: 16 * PAGE, ..VmConfig::default() })?, made)?;
        made += 1;
    }
    Ok(made)
}

/// With a ring. Some go with work to do, some without, some without the ring.
pub(super) fn life_with_ring(vm: &mut Vm, before: u32) -> Result<()> {
    let mut ring = Ring::set_up(vm, 0, BASE, 64, before)?;
    ring.push(&NOP, 3)?;
    match before % 4 {
        0 => vm.vcpus[0].exit(Exit::Pio)?,
        1 => vm.vcpus[0].exit(Exit::Cpuid)?,
        2 => {
            let rax = vm.hypercall(0, Function::RingTeardown as u64, ring.id(), 0, 0)?;
            check_eq!(rax, 0, "RING_TEARDOWN");
        }
        _ => (),
    }
    vm.stats()?.check_law()
}

/// Without kvm_dlh.
pub(super) fn stock_life(vm: &mut Vm, _before: u32) -> Result<()> {
    vm.vcpus[0].exit(Exit::Pio)?;
    vm.vcpus[0].exit(Exit::Cpuid)
}

fn many_vms() -> CaseResult {
    let started = Instant::now();
    let made = vms_in_turn(50, 300, Duration::from_secs(20), life_with_ring)?;
    println!("# {made} VMs in {:.1} s", started.elapsed().as_secs_f64());
    wait_until(PATIENCE, "the module has forgotten the VMs", || {
        stats::directories("kvm_dlh", std::process::id()).is_ok_and(|left| left.is_empty())
    })?;
    Ok(Verdict::Pass)
}
