// SPDX-License-Identifier: GPL-2.0

//! Memory that is no ring any more: the host lets go of it without a trace.

use std::sync::atomic::Ordering;

use dlh_abi::{header, Cookie, Error, Function, RawEntry};

use super::{check_ring_works, check_vm_works};
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping};
use crate::ring::{Ring, NOP};
use crate::vcpu::Exit;
use crate::vm::{Vm, VmConfig, BASE};

/// Where the rings to spoil are, clear of those that check whether the VM works.
const PLACE: u64 = BASE + 0x10_0000;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: &'static str, spoil: fn(&mut Ring) -> Result<()>| {
        cases.push(Case::new(name, move || spoiled(spoil)));
    };
    add("a tag that is 0", |ring| with_tag(ring, |_, _| 0));
    add("a tag that is off by one", |ring| with_tag(ring, |cookie, at| cookie.tag(at) + 1));
    add("a tag of another cookie", |ring| with_tag(ring, |cookie, at| Cookie(!cookie.0).tag(at)));
    add("a tag of the lap before", |ring| {
        with_tag(ring, |cookie, at| cookie.tag(at.wrapping_sub(64)))
    });
    add("a tag of the lap after", |ring| {
        with_tag(ring, |cookie, at| cookie.tag(at.wrapping_add(64)))
    });
    add("a slot that was never filled", |ring| {
        ring.publish_tail(ring.tail().wrapping_add(1));
        Ok(())
    });
    add("a tail that is one too far ahead", |ring| tail_at(ring, 65));
    add("a tail that is 2 laps ahead", |ring| tail_at(ring, 128));
    add("a tail that is half the index space ahead", |ring| tail_at(ring, 1 << 31));
    add("a tail that went back by one", |ring| tail_at(ring, u32::MAX));
    add("a tail that went back by a lap", |ring| tail_at(ring, 0u32.wrapping_sub(64)));
    add("a ring overwritten with zeroes", |ring| {
        ring.overwrite(|_| 0);
        Ok(())
    });
    add("a ring overwritten with ones", |ring| {
        ring.overwrite(|_| u64::MAX);
        Ok(())
    });
    add("a ring overwritten with random words", |ring| {
        ring.overwrite(random);
        Ok(())
    });
    add("a ring overwritten with random words but for a plausible tail", |ring| {
        let tail = ring.tail().wrapping_add(3);
        ring.overwrite(random);
        ring.publish_tail(tail);
        Ok(())
    });
    cases.extend([
        Case::new("good entries before a bad one", good_then_bad),
        Case::new("a zeroed ring whose index is 0", zeroed_at_zero),
        Case::new("a spoiled ring's id is no longer one", id_gone),
        Case::new("a flood that spoils a ring again and again", repeatedly),
        Case::new("a done that the guest has changed", done_changed),
        Case::new("other changes to the host's words do not matter", host_words),
        Case::new("memory in another use that looks like an idle ring", idle_but_foreign),
        Case::new("another vCPU's ring is not affected", other_vcpu),
    ]);
    cases
}

/// Splitmix64, of the place.
fn random(at: usize) -> u64 {
    let mut x = (at as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Publishes an entry with another tag.
fn with_tag(ring: &mut Ring, tag: impl Fn(Cookie, u32) -> u64) -> Result<()> {
    let position = ring.tail();
    let raw = ring.prepare(&NOP).ok_or("the ring is full")?;
    ring.write_entry(position, &RawEntry { tag: tag(ring.cookie(), position), ..raw });
    ring.publish();
    Ok(())
}

/// Fills every slot with good entries and then publishes a tail this far ahead of done.
fn tail_at(ring: &mut Ring, ahead: u32) -> Result<()> {
    let start = ring.tail();
    for _ in 0..ring.entries() {
        ring.place(&NOP)?;
    }
    ring.publish_tail(start.wrapping_add(ahead));
    Ok(())
}

/// A ring that has been in use for two laps and a bit.
fn used_ring(vm: &mut Vm) -> Result<Ring> {
    let mut ring = Ring::set_up(vm, 0, PLACE, 64, u32::MAX - 100)?;
    for count in [64, 64, 5] {
        ring.push(&NOP, count)?;
        vm.vcpus[0].exit(Exit::Pio)?;
    }
    check_eq!(ring.done(), ring.tail(), "done of the ring before it is spoiled");
    Ok(ring)
}

/// Checks that several exits execute nothing and leave the memory as it is.
fn check_left_alone(vm: &mut Vm, ring: &Ring) -> Result<()> {
    let memory = ring.snapshot();
    let stats = vm.stats()?;
    for exit in [Exit::Pio, Exit::Cpuid, Exit::Hlt, Exit::Hypercall] {
        vm.vcpus[0].exit(exit)?;
        check!(ring.snapshot() == memory, "the host wrote to the spoiled ring, {exit:?}");
    }
    let after = vm.stats()?;
    check_eq!(after.since(&stats, "executed")?, 0, "entries executed from a spoiled ring");
    after.check_law()
}

fn spoiled(spoil: fn(&mut Ring) -> Result<()>) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    for _ in 0..3 {
        let mut ring = used_ring(&mut vm)?;
        let before = vm.stats()?;
        spoil(&mut ring)?;
        check_left_alone(&mut vm, &ring)?;
        check_eq!(vm.stats()?.since(&before, "rings_broken")?, 1, "rings_broken");
        check_eq!(vm.stats()?.since(&before, "executed")?, 0, "entries executed");

        // It stays out of use even if everything is as it should be again.
        let position = ring.done();
        ring.set_producer_tail(position);
        ring.push(&NOP, 1)?;
        check_left_alone(&mut vm, &ring)?;
        check_eq!(vm.stats()?.since(&before, "rings_broken")?, 1, "rings_broken");
        let mut memory = ring.snapshot();
        check_vm_works(&mut vm)?;
        // Only where the header is still the ring's may its owner be told that it has been replaced.
        if memory[header::COOKIE / 8] == ring.cookie().0 {
            memory[header::FLAGS / 8] &= 0xffff_ffff;
            memory[header::FLAGS / 8] |= u64::from(ring.flags()) << 32;
        }
        check!(ring.snapshot() == memory, "the host wrote to the ring that was replaced");
        check_ring_works(&mut vm, 0, PLACE)?;
    }
    Ok(Verdict::Pass)
}

fn good_then_bad() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = used_ring(&mut vm)?;
    let before = vm.stats()?;
    let done = ring.done();
    ring.push(&NOP, 3)?;
    with_tag(&mut ring, |_, _| 1)?;
    ring.push(&NOP, 3)?;
    let mut memory = ring.snapshot();
    vm.vcpus[0].exit(Exit::Pio)?;
    // Only done may have moved, and not past the bad entry; its word has flags in the other half.
    let word = 64 / 8;
    let seen = ring.snapshot()[word];
    memory[word] = seen;
    check!(ring.snapshot() == memory, "the host wrote more than done");
    check!(ring.done().wrapping_sub(done) <= 3, "done went from {done} to {}", ring.done());
    let after = vm.stats()?;
    check!(after.since(&before, "executed")? <= 3, "{after:?}: more executed than there was");
    check_eq!(after.since(&before, "rings_broken")?, 1, "rings_broken");
    check_left_alone(&mut vm, &ring)?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn zeroed_at_zero() -> CaseResult {
    // Looks like an empty ring; what must not happen is that anything is written to it.
    let mut vm = Vm::new(VmConfig::default())?;
    let ring = Ring::set_up(&mut vm, 0, PLACE, 64, 0)?;
    ring.overwrite(|_| 0);
    check_left_alone(&mut vm, &ring)?;
    // And as soon as there is more than zeroes, it is broken.
    let before = vm.stats()?;
    ring.publish_tail(1);
    check_left_alone(&mut vm, &ring)?;
    check_eq!(vm.stats()?.since(&before, "rings_broken")?, 1, "rings_broken");
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn idle_but_foreign() -> CaseResult {
    // The kernel that set the ring up is gone; in what the memory is now, both indices read as 0.
    let mut vm = Vm::new(VmConfig::default())?;
    let ring = Ring::set_up(&mut vm, 0, PLACE, 64, 0)?;
    let indices = [header::TAIL, header::DONE];
    ring.overwrite(|at| if indices.contains(&at) { 0 } else { random(at) });
    // A memslot that comes or goes has the host look at every ring.
    let before = vm.stats()?;
    let slot = vm.add_memory(PLACE + 0x1000_0000, Mapping::new(Backing::Anonymous, 1 << 20)?)?;
    check_left_alone(&mut vm, &ring)?;
    vm.remove_memory(slot)?;
    check_left_alone(&mut vm, &ring)?;
    check_eq!(vm.stats()?.since(&before, "rings_broken")?, 1, "rings_broken");
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn id_gone() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let ring = used_ring(&mut vm)?;
    ring.overwrite(random);
    let memory = ring.snapshot();
    // The first call may be what finds out.
    let rax = vm.hypercall(0, Function::Kick as u64, ring.id(), 0, 0)?;
    let gone = [Error::NoRing.to_rax(), Error::Gone.to_rax()];
    check!(gone.contains(&rax), "KICK of a spoiled ring gave {rax}");
    let no_ring = Error::NoRing.to_rax();
    // A guest that has seen the flag may clean up; its memory stays what it is.
    let rax = vm.hypercall(0, Function::RingTeardown as u64, ring.id(), 0, 0)?;
    check!([0, no_ring].contains(&rax), "RING_TEARDOWN of a spoiled ring gave {rax}");
    check!(ring.snapshot() == memory, "RING_TEARDOWN wrote to the spoiled ring");
    for function in [Function::RingTeardown, Function::Kick] {
        let rax = vm.hypercall(0, function as u64, ring.id(), 0, 0)?;
        check_eq!(rax, no_ring, "{function:?} of a spoiled ring");
        check!(ring.snapshot() == memory, "{function:?} wrote to the spoiled ring");
    }
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn repeatedly() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let before = vm.stats()?;
    let rounds = 300;
    for round in 0..rounds {
        let mut ring = Ring::set_up(&mut vm, 0, PLACE, 64, round)?;
        ring.push(&NOP, round % 60)?;
        vm.vcpus[0].exit(Exit::Cpuid)?;
        ring.overwrite(|at| random(at + round as usize * 4096));
        vm.vcpus[0].exit(Exit::Cpuid)?;
    }
    let after = vm.stats()?;
    check_eq!(after.since(&before, "rings_broken")?, u64::from(rounds), "rings_broken");
    after.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn done_changed() -> CaseResult {
    // Another value means that the memory went back in time: the host must not go on from there.
    let mut vm = Vm::new(VmConfig::default())?;
    for change in [1, 64, u32::MAX, 1 << 31] {
        let mut ring = used_ring(&mut vm)?;
        let before = vm.stats()?;
        let done = ring.done();
        ring.push(&NOP, 3)?;
        let (memory, offset) = vm.memory_at(PLACE)?;
        let word = memory.word32(offset + header::DONE);
        word.store(done.wrapping_add(change), Ordering::SeqCst);
        check_left_alone(&mut vm, &ring)?;
        check_eq!(vm.stats()?.since(&before, "rings_broken")?, 1, "rings_broken");
        check_eq!(vm.stats()?.since(&before, "executed")?, 0, "entries executed");
        check_vm_works(&mut vm)?;
    }
    Ok(Verdict::Pass)
}

fn host_words() -> CaseResult {
    // The host keeps its own state; but for done and the cookie, by which it knows its ring, the words
    // in memory are only what it tells the guest.
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = used_ring(&mut vm)?;
    let before = vm.stats()?;
    let (memory, offset) = vm.memory_at(PLACE)?;
    for round in 1..=5 {
        let tail = ring.tail();
        memory.word32(offset + header::FLAGS).store(0, Ordering::SeqCst);
        for word in (header::DECLINED..dlh_abi::HEADER_BYTES).step_by(8) {
            memory.word(offset + word).store(random(word), Ordering::SeqCst);
        }
        ring.push(&NOP, 3)?;
        vm.vcpus[0].exit(Exit::Pio)?;
        check_eq!(ring.done(), tail.wrapping_add(3), "done after round {round}");
        check_eq!(vm.stats()?.since(&before, "executed")?, 3 * round, "entries executed");
    }
    check_eq!(vm.stats()?.since(&before, "rings_broken")?, 0, "rings_broken");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn other_vcpu() -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let spoiled = used_ring(&mut vm)?;
    let mut good = Ring::set_up(&mut vm, 1, PLACE + 0x10_0000, 64, 0)?;
    good.push(&NOP, 10)?;
    spoiled.overwrite(random);
    for vcpu in [0, 1] {
        vm.vcpus[vcpu].exit(Exit::Pio)?;
    }
    check_eq!(good.done(), good.tail(), "done of the other vCPU's ring");
    good.push(&NOP, 64)?;
    vm.vcpus[1].exit(Exit::Cpuid)?;
    check_eq!(good.done(), good.tail(), "done of the other vCPU's ring");
    check_left_alone(&mut vm, &spoiled)?;
    Ok(Verdict::Pass)
}
