// SPDX-License-Identifier: GPL-2.0

//! Delivery: every entry once, in its place, at whatever exit comes, before user space runs.

use std::sync::atomic::Ordering;
use std::time::Duration;

use dlh_abi::{header, Error, Function, RingSize};

use super::check_ring_works;
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::PAGE;
use crate::ring::{Ring, NOP, UNKNOWN};
use crate::stats::{self, Stats};
use crate::thread::{wait_until, with_vcpu, PATIENCE};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Irqchip, Vm, VmConfig, BASE};

const TEARDOWN: u64 = Function::RingTeardown as u64;
/// Entries that are executed at any exit: the default of the module's budget_entries.
const BUDGET: u32 = 512;
/// Another place for a ring.
const OTHER: u64 = BASE + 0x20_0000;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("first positions 0 to 130", || positions(0..=130)),
        Case::new("first positions up to the wrap of the index", || {
            positions(u32::MAX - 130..=u32::MAX)
        }),
        Case::new("first positions around the sign bit", || {
            positions((1 << 31) - 3..=(1 << 31) + 3)
        }),
    ];
    for exit in Exit::ALL {
        cases.push(Case::new(format!("entries are executed at this exit: {exit:?}"), move || {
            at_exit(exit)
        }));
    }
    cases.extend([
        Case::new("entries are executed at an interrupt of the host", host_interrupt),
        Case::new("entries are executed when a signal ends KVM_RUN", signal),
        Case::new("entries are executed before a halted vCPU waits in the kernel", halted),
        Case::new("publishing makes no exits", no_exits),
        Case::new("the largest ring, full, in one go", largest),
        Case::new("every size of ring", every_size),
        Case::new("KICK of an idle ring and of a full one", kick),
        Case::new("a status is written once, and only where it is not 0", status_written_once),
        Case::new("a new ring replaces the old one", replace),
        Case::new("nothing is executed after teardown", teardown),
        Case::new("a ring survives other exits and idle times", idle),
        Case::new("four vCPUs fill their rings at the same time", four_vcpus),
        Case::new("a ring is worked on no matter which vCPU exits", other_vcpu),
        Case::new("rings of one thread come and go in any order", many_of_one_thread),
        Case::new("a thousand rings, one after the other", thousand),
    ]);
    cases
}

/// Counts calls; compares with what should have happened to them, where there are statistics.
struct Tally {
    before: Option<Stats>,
    executed: u64,
    declined: u64,
}

impl Tally {
    fn new(vm: &Vm) -> Result<Self> {
        let before = stats::are_there().then(|| vm.stats()).transpose()?;
        Ok(Self { before, executed: 0, declined: 0 })
    }

    fn check(&self, vm: &Vm) -> Result<()> {
        let Some(before) = &self.before else { return Ok(()) };
        let after = vm.stats()?;
        check_eq!(after.since(before, "executed")?, self.executed, "calls executed");
        check_eq!(after.since(before, "declined")?, self.declined, "calls declined");
        let submitted = self.executed + self.declined;
        check_eq!(after.since(before, "submitted")?, submitted, "calls submitted");
        check_eq!(after.get("pending")?, 0, "calls pending");
        after.check_law()
    }
}

/// What stands in the entry at a position, so that a mix-up of slots shows.
fn is_unknown(position: u32) -> bool {
    position.wrapping_mul(0x9e37_79b1) >> 30 == 0
}

/// Stages `count` entries; returns their positions.
fn stage(ring: &mut Ring, tally: &mut Tally, count: u32) -> Result<Vec<u32>> {
    let mut positions = Vec::new();
    for _ in 0..count {
        let unknown = is_unknown(ring.tail());
        positions.push(ring.stage(if unknown { &UNKNOWN } else { &NOP })?);
        *(if unknown { &mut tally.declined } else { &mut tally.executed }) += 1;
    }
    Ok(positions)
}

fn check_statuses(ring: &Ring, positions: &[u32]) -> Result<()> {
    for &position in positions {
        let expected = if is_unknown(position) { Error::Operation.to_rax() } else { 0 };
        check_eq!(i64::from(ring.status(position)), expected, "status of entry {position}");
    }
    Ok(())
}

/// Publishes from inside the guest, and checks `done` at each point where someone sees the exit.
fn publish(vm: &mut Vm, ring: &mut Ring, spins: u64, exit: Exit) -> Result<()> {
    let (start, tail) = (ring.done(), ring.tail());
    let stop = vm.vcpus[0].begin_publish(ring, spins, exit)?;
    check_eq!(ring.guest_tail(), tail, "the tail the guest stored, {exit:?}");
    check_eq!(ring.done(), tail, "done when the VMM sees {stop:?} of {exit:?}");
    let published = vm.vcpus[0].finish_publish(stop)?;
    // The host may leave some for later before it lets the vCPU go on.
    let least = if exit == Exit::Kick { u32::MAX } else { BUDGET };
    let expected = tail.wrapping_sub(start).min(least);
    let seen = published.done.wrapping_sub(start);
    check!(
        (expected..=tail.wrapping_sub(start)).contains(&seen),
        "done moved by {seen} before the guest saw it after {exit:?}, expected {expected}"
    );
    if exit == Exit::Kick {
        check_eq!(published.result, 0, "result of KICK");
    }
    Ok(())
}

fn positions(starts: impl Iterator<Item = u32>) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    for start in starts {
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, start)?;
        let mut tally = Tally::new(&vm)?;
        // Ends in the first lap, at its end, with a full ring, and somewhere in the third lap.
        for (count, exit) in
            [1, 62, 64, 3].into_iter().zip(Exit::ALL.into_iter().cycle().skip(start as usize % 5))
        {
            let positions = stage(&mut ring, &mut tally, count)?;
            publish(&mut vm, &mut ring, 0, exit)?;
            check_statuses(&ring, &positions)?;
        }
        check_eq!(ring.tail(), start.wrapping_add(130), "where the producer is");
        check_eq!(ring.declined(), tally.declined, "declined in the header, start {start}");
        tally.check(&vm)?;
    }
    Ok(Verdict::Pass)
}

fn at_exit(exit: Exit) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, u32::MAX - 100)?;
    let mut tally = Tally::new(&vm)?;
    for round in 0..200 {
        let positions = stage(&mut ring, &mut tally, round % 65)?;
        publish(&mut vm, &mut ring, u64::from(round % 7) * 1000, exit)?;
        check_statuses(&ring, &positions)?;
    }
    tally.check(&vm)?;
    Ok(Verdict::Pass)
}

/// Many seconds of a loop without an exit.
const LONG: u64 = 1 << 40;

fn host_interrupt() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let mut tally = Tally::new(&vm)?;
    stage(&mut ring, &mut tally, 64)?;
    let mut vcpu = vm.vcpus.remove(0);
    let watched = vm.memory_at(BASE)?.0;
    let stop = with_vcpu(
        &mut vcpu,
        |vcpu| vcpu.begin_publish(&mut ring, LONG, Exit::Pio),
        || {
            wait_until(PATIENCE, "done while the guest spins", || {
                watched.word32(header::DONE).load(Ordering::SeqCst) == 64
            })
        },
    )?
    .0;
    check_eq!(stop, Stop::Interrupted, "how the guest stopped");
    vcpu.park()?;
    tally.check(&vm)?;
    Ok(Verdict::Pass)
}

fn signal() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let mut tally = Tally::new(&vm)?;
    for round in 1..=10 {
        stage(&mut ring, &mut tally, round)?;
        let mut vcpu = vm.vcpus.remove(0);
        let tail = ring.tail();
        with_vcpu(
            &mut vcpu,
            |vcpu| {
                let stop = vcpu.begin_publish(&mut ring, LONG, Exit::Pio)?;
                check_eq!(stop, Stop::Interrupted, "how the guest stopped");
                // A signal may come before the guest has begun.
                if ring.guest_tail() == tail {
                    check_eq!(ring.done(), tail, "done when KVM_RUN was interrupted");
                }
                while ring.done() != tail {
                    vcpu.resume()?;
                }
                Ok(())
            },
            || {
                std::thread::sleep(Duration::from_millis(3 * u64::from(round)));
                Ok(())
            },
        )?;
        vcpu.park()?;
        vm.vcpus.push(vcpu);
    }
    tally.check(&vm)?;
    Ok(Verdict::Pass)
}

fn halted() -> CaseResult {
    let mut vm = Vm::new(VmConfig { irqchip: Irqchip::Kernel, ..VmConfig::default() })?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let mut tally = Tally::new(&vm)?;
    for round in 1..=10 {
        let positions = stage(&mut ring, &mut tally, round)?;
        let tail = ring.tail();
        let mut vcpu = vm.vcpus.remove(0);
        let watched = vm.memory_at(BASE)?.0;
        let stop = with_vcpu(
            &mut vcpu,
            |vcpu| vcpu.begin_publish(&mut ring, 0, Exit::Hlt),
            || {
                wait_until(PATIENCE, "done while the guest is halted", || {
                    watched.word32(header::DONE).load(Ordering::SeqCst) == tail
                })
            },
        )?
        .0;
        check_eq!(stop, Stop::Interrupted, "how the halted guest stopped");
        vcpu.park()?;
        vm.vcpus.push(vcpu);
        check_statuses(&ring, &positions)?;
    }
    tally.check(&vm)?;
    Ok(Verdict::Pass)
}

fn no_exits() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let entries = 16384;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, entries, 0)?;
    let before = vm.own_exits()?;
    let stats = vm.stats()?;
    let count = 400_000;
    let flooded = vm.vcpus[0].flood(&mut ring, &NOP, count, |_| true)?;
    check_eq!(flooded.stop, Stop::Done, "how the flood ended");
    check_eq!(u64::from(flooded.tail), count, "entries the guest has placed");
    check_eq!(u64::from(ring.done()), count, "entries done");
    check_eq!(vm.stats()?.since(&stats, "executed")?, count, "entries executed");
    let exits = vm.own_exits()? - before;
    println!("# {count} entries, {exits} exits, {} times full", flooded.full);
    check!(exits < count / 100, "{exits} exits for {count} entries");
    vm.check_law()?;
    Ok(Verdict::Pass)
}

fn largest() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, RingSize::MAX, u32::MAX - 1000)?;
    let mut tally = Tally::new(&vm)?;
    for _ in 0..2 {
        let positions = stage(&mut ring, &mut tally, RingSize::MAX)?;
        check!(ring.stage(&NOP).is_err(), "a full ring took one more entry");
        publish(&mut vm, &mut ring, 0, Exit::Pio)?;
        check_statuses(&ring, &positions)?;
    }
    tally.check(&vm)?;
    Ok(Verdict::Pass)
}

fn every_size() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    for shift in 6..=16 {
        let size = 1 << shift;
        let mut ring = Ring::set_up(&mut vm, 0, BASE, size, 0u32.wrapping_sub(size / 2))?;
        let after = BASE as usize + ring.bytes();
        let (memory, offset) = vm.memory_at(after as u64)?;
        let rest = PAGE - offset % PAGE;
        memory.fill(offset, rest, |at| !(at as u64));
        let mut tally = Tally::new(&vm)?;
        for count in [size, 1, size - 1, size] {
            let positions = stage(&mut ring, &mut tally, count)?;
            publish(&mut vm, &mut ring, 0, Exit::Cpuid)?;
            check_statuses(&ring, &positions)?;
        }
        tally.check(&vm)?;
        let changed = memory.first_difference(offset, rest, |at| !(at as u64));
        check_eq!(changed, None, "bytes changed behind a ring of {size}");
    }
    Ok(Verdict::Pass)
}

fn kick() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 1024, 0)?;
    let kick = Function::Kick as u64;
    for count in [0, 1, 1024, 1000] {
        ring.push(&NOP, count)?;
        check_eq!(vm.hypercall(0, kick, ring.id(), 0, 0)?, 0, "KICK of {count} entries");
        check_eq!(ring.done(), ring.tail(), "done after KICK of {count} entries");
    }
    vm.check_law()?;
    Ok(Verdict::Pass)
}

fn status_written_once() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let mark = 0x5a5a_5a5a;
    let nop = ring.place(&NOP)?;
    ring.set_status(nop, mark);
    let unknown = ring.place(&UNKNOWN)?;
    ring.publish();
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.status(nop), mark, "status word of an entry with status 0");
    check_eq!(i64::from(ring.status(unknown)), Error::Operation.to_rax(), "status");
    // What has been finished is the guest's again.
    ring.set_status(unknown, mark);
    let before = ring.snapshot();
    for exit in [Exit::Pio, Exit::Cpuid, Exit::Hlt, Exit::Hypercall] {
        vm.vcpus[0].exit(exit)?;
    }
    check!(ring.snapshot() == before, "the host wrote to an idle ring");
    Ok(Verdict::Pass)
}

fn replace() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut old = Ring::set_up(&mut vm, 0, BASE, 64, 7)?;
    old.push(&NOP, 10)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(old.done(), old.tail(), "done of the old ring");
    let mut new = Ring::set_up(&mut vm, 0, OTHER, 64, 99)?;
    check!(new.cookie() != old.cookie(), "both rings have the same secret");
    let mut tally = Tally::new(&vm)?;
    old.push(&UNKNOWN, 3)?;
    let before = old.snapshot();
    stage(&mut new, &mut tally, 40)?;
    publish(&mut vm, &mut new, 0, Exit::Cpuid)?;
    check!(old.snapshot() == before, "the host wrote to the replaced ring");
    tally.check(&vm)?;
    // In the same place, entries of the old registration mean nothing.
    let mut third = Ring::set_up(&mut vm, 0, OTHER, 128, 0)?;
    check!(third.cookie() != new.cookie(), "both rings have the same secret");
    stage(&mut third, &mut tally, 128)?;
    publish(&mut vm, &mut third, 0, Exit::Pio)?;
    tally.check(&vm)?;
    Ok(Verdict::Pass)
}

fn teardown() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    for published_before in [0, 64] {
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
        let mut tally = Tally::new(&vm)?;
        ring.push(&NOP, published_before)?;
        check_eq!(vm.hypercall(0, TEARDOWN, ring.id(), 0, 0)?, 0, "RING_TEARDOWN");
        // What was published before may or may not have been executed; done says which it is.
        tally.executed = ring.done().into();
        check!(ring.done() <= published_before, "done is {}", ring.done());
        tally.check(&vm)?;
        let position = ring.tail();
        if let Some(raw) = ring.prepare(&UNKNOWN) {
            ring.write_entry(position, &raw);
        }
        ring.publish();
        let before = ring.snapshot();
        for exit in [Exit::Pio, Exit::Cpuid, Exit::Hlt, Exit::Hypercall] {
            vm.vcpus[0].exit(exit)?;
        }
        check!(ring.snapshot() == before, "the host wrote to a ring that was taken down");
        tally.check(&vm)?;
        check_ring_works(&mut vm, 0, BASE)?;
    }
    Ok(Verdict::Pass)
}

fn idle() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 3)?;
    let mut tally = Tally::new(&vm)?;
    for round in 0..50 {
        for exit in [Exit::Pio, Exit::Cpuid, Exit::Hlt, Exit::Hypercall] {
            vm.vcpus[0].exit(exit)?;
        }
        stage(&mut ring, &mut tally, 1)?;
        publish(&mut vm, &mut ring, 0, Exit::Pio)?;
        if round % 10 == 0 {
            std::thread::sleep(Duration::from_millis(20));
            tally.check(&vm)?;
        }
    }
    tally.check(&vm)?;
    Ok(Verdict::Pass)
}

fn four_vcpus() -> CaseResult {
    let vcpus = 4;
    let count = 50_000;
    let mut vm = Vm::new(VmConfig { vcpus, ..VmConfig::default() })?;
    let before = vm.stats()?;
    let mut rings = Vec::new();
    for vcpu in 0..vcpus {
        let gpa = BASE + vcpu as u64 * 0x10_0000;
        rings.push(Ring::set_up(&mut vm, vcpu, gpa, 64 << vcpu, u32::MAX - 999)?);
    }
    for ring in &rings {
        let same = rings.iter().filter(|other| other.id() == ring.id()).count();
        check_eq!(same, 1, "rings with the id {}", ring.id());
    }
    let vcpus = std::mem::take(&mut vm.vcpus);
    let mut busy: Vec<_> = vcpus.into_iter().zip(rings).collect();
    std::thread::scope(|scope| {
        let workers: Vec<_> = busy
            .iter_mut()
            .map(|(vcpu, ring)| {
                scope.spawn(move || {
                    let flooded = vcpu.flood(ring, &NOP, count, |_| true)?;
                    check_eq!(flooded.stop, Stop::Done, "how the flood ended");
                    check_eq!(ring.done(), ring.tail(), "done when the flood was over");
                    check_eq!(ring.tail(), (u32::MAX - 999).wrapping_add(count as u32), "tail");
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| -> Result<()> {
            worker.join().map_err(|_| "a vCPU thread panicked")?
        })
    })?;
    let after = vm.stats()?;
    check_eq!(after.since(&before, "executed")?, 4 * count, "entries executed");
    after.check_law()?;
    Ok(Verdict::Pass)
}

fn other_vcpu() -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let mut rings =
        [Ring::set_up(&mut vm, 0, BASE, 64, 0)?, Ring::set_up(&mut vm, 1, OTHER, 64, 0)?];
    let kick = Function::Kick as u64;
    for owner in [0, 1] {
        let ring = &mut rings[owner];
        ring.push(&NOP, 5)?;
        // Who else may work on it is the host's affair; a kick by anyone is enough.
        let result = vm.hypercall(1 - owner, kick, ring.id(), 0, 0)?;
        check_eq!(result, 0, "KICK by the other vCPU");
        check_eq!(ring.done(), ring.tail(), "done after a KICK by the other vCPU");
        let result = vm.hypercall(1 - owner, TEARDOWN, ring.id(), 0, 0)?;
        check_eq!(result, 0, "RING_TEARDOWN by the other vCPU");
    }
    vm.check_law()?;
    Ok(Verdict::Pass)
}

/// All of a thread's rings are in one place of the host's table. Any of them may go at any time, and the others
/// are still found.
fn many_of_one_thread() -> CaseResult {
    const VCPUS: usize = 8;
    let mut vm = Vm::new(VmConfig { vcpus: VCPUS, ..VmConfig::default() })?;
    let place = |vcpu: usize| BASE + vcpu as u64 * 0x1_0000;
    let mut rings: Vec<Option<Ring>> = (0..VCPUS).map(|_| None).collect();
    let mut random = 1_u64;
    for _ in 0..200 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let vcpu = (random >> 33) as usize % VCPUS;
        rings[vcpu] = match rings[vcpu].take() {
            Some(ring) => {
                let result = vm.hypercall(vcpu, TEARDOWN, ring.id(), 0, 0)?;
                check_eq!(result, 0, "RING_TEARDOWN of ring {vcpu}");
                None
            }
            None => Some(Ring::set_up(&mut vm, vcpu, place(vcpu), 64, 0)?),
        };
        for (vcpu, ring) in rings.iter_mut().enumerate() {
            let Some(ring) = ring else { continue };
            ring.push(&NOP, 3)?;
            vm.vcpus[vcpu].exit(Exit::Pio)?;
            check_eq!(ring.done(), ring.tail(), "done of ring {vcpu} when KVM_RUN has returned");
        }
    }
    let there = rings.iter().flatten().count();
    check_eq!(vm.rings()?.lines().count(), there, "rings that the host shows");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn thousand() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let before = vm.stats()?;
    for _ in 0..1000 {
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
        ring.push(&NOP, 1)?;
        vm.vcpus[0].exit(Exit::Cpuid)?;
        check_eq!(ring.done(), ring.tail(), "done after an exit");
        let result = vm.hypercall(0, TEARDOWN, ring.id(), 0, 0)?;
        check_eq!(result, 0, "RING_TEARDOWN");
    }
    let after = vm.stats()?;
    check_eq!(after.since(&before, "rings_set_up")?, 1000, "rings_set_up");
    after.check_law()?;
    Ok(Verdict::Pass)
}
