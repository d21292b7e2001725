// SPDX-License-Identifier: GPL-2.0

//! Memslots of guest_memfd: no ring in them, and nothing in them is given back.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use dlh_abi::{Call, Error, Function, Operation};

use super::{check_ring_works, check_vm_works};
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, PAGE};
use crate::ring::{Ring, NOP};
use crate::vcpu::Exit;
use crate::vm::{GuestMemfd, Slot, Vm, VmConfig, BASE};

/// Where the memory is.
const PLACE: u64 = 0x2000_0000;
const LEN: usize = 2 << 20;
const SETUP: u64 = Function::RingSetup as u64;

/// What the VMM has of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mapped,
    Beside,
}

impl Kind {
    fn make(self) -> Result<GuestMemfd> {
        Ok(match self {
            Kind::Mapped => GuestMemfd::Mapped(LEN),
            Kind::Beside => GuestMemfd::Beside(Arc::new(Mapping::new(Backing::Anonymous, LEN)?)),
        })
    }
}

/// What a case is made of.
type Entry = (&'static str, fn(Kind) -> CaseResult);

pub(super) fn cases() -> Vec<Case> {
    const CASES: &[Entry] = &[
        ("the guest has it as memory", is_memory),
        ("a ring is refused", ring_refused),
        ("a ring whose place it takes is detached", ring_replaced),
        ("reports keep what is in it", reports),
    ];
    let kinds = [
        (Kind::Mapped, "mapped guest_memfd"),
        (Kind::Beside, "guest_memfd beside anonymous memory"),
    ];
    let with_kind = |&(name, run): &'static Entry| {
        kinds.map(|(kind, of)| {
            Case::new(format!("{of}: {name}"), move || {
                // Not every kernel lets any VM have it.
                match guest_memfd(kind) {
                    Ok(_) => run(kind),
                    Err(error) => Ok(Verdict::Skip(format!("no such memory here: {error}"))),
                }
            })
        })
    };
    CASES.iter().flat_map(with_kind).collect()
}

/// A VM with memory of guest_memfd at [`PLACE`].
fn guest_memfd(kind: Kind) -> Result<(Vm, Arc<Mapping>, Slot)> {
    let mut vm = Vm::new(VmConfig::default())?;
    let slot = vm.add_guest_memfd(PLACE, kind.make()?)?;
    let memory = vm.region(slot).mapping.clone();
    Ok((vm, memory, slot))
}

/// What the memory is filled with; never 0.
fn pattern(at: usize) -> u64 {
    (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

fn is_memory(kind: Kind) -> CaseResult {
    let (mut vm, memory, _) = guest_memfd(kind)?;
    memory.fill(0, LEN, pattern);
    for at in (0..LEN).step_by(LEN / 8) {
        let word = pattern(at) as u32;
        check_eq!(vm.vcpus[0].load(PLACE + at as u64)?, word, "what the guest reads at {at:#x}");
        vm.vcpus[0].store(PLACE + at as u64 + 64, !word)?;
        let seen = memory.word32(at + 64).load(Ordering::SeqCst);
        check_eq!(seen, !word, "what the VMM reads where the guest wrote, {at:#x}");
    }
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn ring_refused(kind: Kind) -> CaseResult {
    let (mut vm, memory, slot) = guest_memfd(kind)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    memory.fill(0, LEN, pattern);
    for (offset, size) in [(0, 64), (PAGE as u64, 64), (0, 1024), (LEN as u64 - 4096, 64)] {
        let before = vm.stats()?;
        let rax = vm.hypercall(0, SETUP, PLACE + offset, size, 0)?;
        check_eq!(rax, Error::Memory.to_rax(), "RING_SETUP of {size} entries at {offset:#x}");
        let after = vm.stats()?;
        check_eq!(after.since(&before, "errors_memory")?, 1, "errors_memory");
        check_eq!(after.since(&before, "rings_set_up")?, 0, "rings_set_up");
        check_eq!(memory.first_difference(0, LEN, pattern), None, "what the host wrote there");
        ring.push(&NOP, 3)?;
        vm.vcpus[0].exit(Exit::Pio)?;
        check_eq!(ring.done(), ring.tail(), "done of the ring that was there before");
    }
    vm.stats()?.check_law()?;
    // It is the memory, not the place.
    vm.remove_memory(slot)?;
    vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, LEN)?)?;
    check_ring_works(&mut vm, 0, PLACE)?;
    Ok(Verdict::Pass)
}

/// Everything stands where it stood, in the same memory even if that can be had; but now it is private.
fn ring_replaced(kind: Kind) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let slot = vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, LEN)?)?;
    let mut ring = Ring::set_up(&mut vm, 0, PLACE, 64, 0)?;
    ring.push(&NOP, 3)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.tail(), "done before");
    let old = vm.remove_memory(slot)?;
    let before = vm.stats()?;
    let seen = match kind {
        Kind::Mapped => kind.make()?,
        Kind::Beside => GuestMemfd::Beside(old.clone()),
    };
    let slot = vm.add_guest_memfd(PLACE, seen)?;
    let memory = vm.region(slot).mapping.clone();
    memory.fill(0, LEN, |at| old.word(at).load(Ordering::SeqCst));
    // The guest goes on as if it were its ring.
    for _ in 0..2 {
        ring.stage(&NOP)?;
        vm.vcpus[0].publish(&mut ring, 0, Exit::Cpuid)?;
    }
    let written = memory.snapshot(0, LEN);
    for exit in [Exit::Cpuid, Exit::Pio, Exit::Hlt] {
        vm.vcpus[0].exit(exit)?;
    }
    check!(memory.snapshot(0, LEN) == written, "the host wrote to memory of guest_memfd");
    let after = vm.stats()?;
    check_eq!(after.since(&before, "executed")?, 0, "entries executed");
    let rax = vm.hypercall(0, Function::Kick as u64, ring.id(), 0, 0)?;
    check_eq!(rax, Error::NoRing.to_rax(), "KICK of the ring whose place was taken");
    after.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn reports(kind: Kind) -> CaseResult {
    let (mut vm, memory, _) = guest_memfd(kind)?;
    let report =
        |gpa: u64, bytes: usize| Call { op: Operation::FREE_PAGES, arg: [gpa, bytes as u64] };
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    // The bridge gets to know a VM by its first report. It works, so that what follows says something.
    let usual = vm.add_memory(PLACE + (1 << 28), Mapping::new(Backing::Anonymous, LEN)?)?;
    let usual = vm.region(usual).mapping.clone();
    usual.fill(0, LEN, pattern);
    ring.push(&report(PLACE + (1 << 28), LEN), 1)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(usual.first_difference(0, LEN, |_| 0), None, "offset of what was not given back");

    memory.fill(0, LEN, pattern);
    for (offset, len) in [(0, LEN), (PAGE, PAGE), (LEN / 2, LEN / 2), (0, 2 * LEN)] {
        let before = vm.bridge_stats()?;
        let call = report(PLACE + offset as u64, len);
        let position = ring.place(&call)?;
        ring.publish();
        vm.vcpus[0].exit(Exit::Pio)?;
        check_eq!(ring.done(), ring.tail(), "done after a report");
        let rax = vm.hypercall(
            0,
            Function::Call as u64,
            Operation::FREE_PAGES.0.into(),
            call.arg[0],
            call.arg[1],
        )?;
        let after = vm.bridge_stats()?;
        let skipped = after.since(&before, "skipped_private")?;
        for status in [ring.status(position).into(), rax] {
            // Dealt with by giving nothing back, or declined.
            let pages = 2 * (len / PAGE) as u64;
            let fine = status == Error::Memory.to_rax() || (status == 0 && skipped == pages);
            check!(fine, "status {status} of {len:#x} bytes at {offset:#x}, {skipped} skipped");
        }
        check_eq!(after.since(&before, "merged_pages")?, 0, "merged_pages");
        check_eq!(memory.first_difference(0, LEN, pattern), None, "offset of lost data");
        for at in (0..LEN).step_by(LEN / 8) {
            let seen = vm.vcpus[0].load(PLACE + at as u64)?;
            check_eq!(seen, pattern(at) as u32, "what the guest reads at {at:#x}");
        }
    }
    vm.stats()?.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}
