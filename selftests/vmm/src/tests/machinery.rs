// SPDX-License-Identifier: GPL-2.0

//! The VMM and its guest code do what the other subjects take for granted. No module is needed.

use std::sync::atomic::Ordering;

use dlh_abi::{header, Cookie, RawEntry, RingSize, RING_ACTIVE};

use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping};
use crate::ring::{Ring, NOP, UNKNOWN};
use crate::thread::{wait_until, with_vcpu, PATIENCE};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Irqchip, Vm, VmConfig, BASE};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("the guest makes each kind of exit", exits),
        Case::new("the guest copies staged entries and publishes them", publishes),
        Case::new("the guest produces entries by itself", floods),
        Case::new("the guest loads and stores", loads_and_stores),
        Case::new("the guest calls from user mode and comes back", user_mode),
        Case::new("the guest calls from system management mode and comes back", smm),
        Case::new("a spinning and a halted vCPU can be had back", interrupts),
        Case::new("memory that went away stops the guest", missing_memory),
        Case::new("memory of every kind holds what is written", kinds),
    ]
}

fn ring_alone(vm: &Vm, start: u32) -> Result<Ring> {
    let size = RingSize::try_from(64).map_err(|e| format!("{e:?}"))?;
    let ring = Ring::unregistered(vm, BASE, size, Cookie(0x1234_5678_9abc_def0), start)?;
    let (memory, offset) = vm.memory_at(BASE)?;
    memory.word32(offset + header::DONE).store(start, Ordering::SeqCst);
    memory.word32(offset + header::FLAGS).store(RING_ACTIVE, Ordering::SeqCst);
    Ok(ring)
}

fn exits() -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    for vcpu in [0, 1, 0] {
        for exit in Exit::ALL {
            let before = vm.exits()?;
            vm.vcpus[vcpu].exit(exit)?;
            check!(vm.exits()? > before, "{exit:?} made no exit");
        }
    }
    Ok(Verdict::Pass)
}

fn publishes() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let start = u32::MAX - 10;
    let mut ring = ring_alone(&vm, start)?;
    for (index, exit) in Exit::ALL.into_iter().enumerate() {
        let call = if index % 2 == 0 { NOP } else { UNKNOWN };
        let positions = (0..5).map(|_| ring.stage(&call)).collect::<Result<Vec<_>>>()?;
        let published = vm.vcpus[0].publish(&mut ring, 1000, exit)?;
        check_eq!(published.done, start, "what the guest read as done");
        check_eq!(ring.guest_tail(), ring.tail(), "the tail the guest stored");
        let (memory, offset) = vm.memory_at(BASE)?;
        for position in positions {
            let raw = RawEntry::new(ring.cookie(), position, &call);
            let at = offset + 128 + position as usize % 64 * RawEntry::BYTES;
            let words = memory.snapshot(at, RawEntry::BYTES);
            check_eq!(words, [raw.tag, raw.op.into(), raw.arg[0], raw.arg[1]], "entry {position}");
        }
    }
    Ok(Verdict::Pass)
}

fn floods() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = ring_alone(&vm, 0)?;
    let flooded = vm.vcpus[0].flood(&mut ring, &UNKNOWN, 50, |_| true)?;
    check_eq!((flooded.stop, flooded.tail, flooded.full), (Stop::Done, 50, 0), "50 entries");
    for position in 0..50 {
        let (memory, offset) = vm.memory_at(BASE)?;
        let words = memory.snapshot(offset + 128 + position * RawEntry::BYTES, RawEntry::BYTES);
        let tag = ring.cookie().tag(position as u32);
        check_eq!(words, [tag, UNKNOWN.op.0.into(), 0, 0], "entry {position}");
    }
    // Nobody makes room, so that it waits until the ring says it is detached.
    let before = vm.own_exits()?;
    let mut vcpu = vm.vcpus.remove(0);
    let (flooded, ()) = with_vcpu(
        &mut vcpu,
        |vcpu| vcpu.flood(&mut ring, &UNKNOWN, 50, |stop| stop == Stop::Interrupted),
        || {
            // A guest that finds it full exits each time that it looks; what it did before took next to none.
            wait_until(PATIENCE, "the guest has found the ring full", || {
                vm.own_exits().is_ok_and(|exits| exits > before + 100)
            })?;
            let (memory, offset) = vm.memory_at(BASE)?;
            memory.word32(offset + header::FLAGS).store(0, Ordering::SeqCst);
            Ok(())
        },
    )?;
    check_eq!((flooded.stop, flooded.tail), (Stop::Done, 64), "a full ring that is detached");
    check!(flooded.full > 0, "the guest did not find the ring full");
    Ok(Verdict::Pass)
}

fn loads_and_stores() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let (memory, _) = vm.memory_at(BASE)?;
    for at in [64usize, 4096, 1 << 20, (4 << 20) - 68] {
        let gpa = BASE + at as u64;
        vm.vcpus[0].store(gpa, at as u32 ^ 0xdead_0000)?;
        check_eq!(memory.word32(at).load(Ordering::SeqCst), at as u32 ^ 0xdead_0000, "stored");
        memory.word32(at).store(at as u32 + 1, Ordering::SeqCst);
        check_eq!(vm.vcpus[0].load(gpa)?, at as u32 + 1, "loaded");
    }
    Ok(Verdict::Pass)
}

fn user_mode() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    for _ in 0..3 {
        check_eq!(vm.vcpus[0].user_hypercall([0; 4])?, -1, "a hypercall at CPL 3");
        vm.vcpus[0].exit(Exit::Cpuid)?;
    }
    Ok(Verdict::Pass)
}

fn smm() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    if !vm.enable_smm()? {
        return Ok(Verdict::Skip("KVM has no system management mode".into()));
    }
    for _ in 0..3 {
        // A function that neither a host with the module nor one without has.
        let eax = vm.vcpus[0].smm_hypercall([u64::MAX, 0, 0, 0])?;
        check!(eax < 0, "a hypercall in SMM gave {eax}");
        vm.vcpus[0].exit(Exit::Cpuid)?;
    }
    Ok(Verdict::Pass)
}

fn interrupts() -> CaseResult {
    let kinds = [(Irqchip::Vmm, Exit::Pio, 1 << 40), (Irqchip::Kernel, Exit::Hlt, 0)];
    for (irqchip, exit, spins) in kinds {
        let mut vm = Vm::new(VmConfig { irqchip, ..VmConfig::default() })?;
        let mut ring = ring_alone(&vm, 0)?;
        for tail in 1..=5 {
            ring.stage(&NOP)?;
            let (memory, _) = vm.memory_at(BASE)?;
            let mut vcpu = vm.vcpus.remove(0);
            let (stop, ()) = with_vcpu(
                &mut vcpu,
                |vcpu| vcpu.begin_publish(&mut ring, spins, exit),
                || {
                    wait_until(PATIENCE, "the tail is published", || {
                        memory.word32(0).load(Ordering::SeqCst) == tail
                    })
                },
            )?;
            check_eq!(stop, Stop::Interrupted, "how the guest stopped, {exit:?}");
            vcpu.park()?;
            vm.vcpus.push(vcpu);
        }
    }
    Ok(Verdict::Pass)
}

fn missing_memory() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = ring_alone(&vm, 0)?;
    let slot = vm.add_memory(BASE + (64 << 20), Mapping::new(Backing::Anonymous, 1 << 20)?)?;
    vm.vcpus[0].store(BASE + (64 << 20), 1)?;
    vm.unmap_memory(slot)?;
    let stopped = vm.vcpus[0].store(BASE + (64 << 20), 1);
    check!(stopped.is_err(), "a store to memory that is not mapped worked");
    vm.vcpus[0].park()?;
    vm.remove_memory(slot)?;

    let mut seen = None;
    let base = vm.slot_at(BASE)?;
    vm.remove_memory(base)?;
    let flooded = vm.vcpus[0].flood(&mut ring, &NOP, 10, |stop| {
        seen = Some(stop);
        false
    })?;
    check_eq!(seen, Some(Stop::Mmio { address: BASE + 64, write: false }), "how the flood stopped");
    check_eq!(flooded.stop, Stop::Mmio { address: BASE + 64, write: false }, "how it stopped");
    vm.vcpus[0].exit(Exit::Cpuid)?;
    Ok(Verdict::Pass)
}

fn kinds() -> CaseResult {
    // Those of huge pages are in the subject `kinds`: only there the host has some.
    for backing in [
        Backing::Anonymous,
        Backing::TransparentHuge,
        Backing::SharedMemfd,
        Backing::PrivateMemfd,
        Backing::EmptyPrivateMemfd,
        Backing::SealedMemfd,
    ] {
        let mapping = Mapping::new(backing, 4 << 20)?;
        let mut vm = Vm::new(VmConfig { memory: 0, ..VmConfig::default() })?;
        let slot = vm.add_memory(BASE, mapping)?;
        let memory = vm.region(slot).mapping.clone();
        memory.fill(0, memory.len(), |at| at as u64);
        check_eq!(memory.first_difference(0, memory.len(), |at| at as u64), None, "{backing:?}");
        check_eq!(vm.vcpus[0].load(BASE + 0x12340)?, 0x12340, "what the guest reads, {backing:?}");
    }
    Ok(Verdict::Pass)
}
