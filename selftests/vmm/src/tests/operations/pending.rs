// SPDX-License-Identifier: GPL-2.0

//! Calls that are pending for a while: in the C sample a workqueue completes them, which is on no thread of
//! the VMM; in the Rust sample a thread of the VMM does.

use std::sync::atomic::Ordering;
use std::time::Duration;

use dlh_abi::{header, Call, Error, Function};

use super::{execute, remove_at_once, Account, Build, Ending, Sample, CALL, LONG, MOST_MS, OTHER};
use crate::ktap::{check, check_eq, failed, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping};
use crate::ring::Ring;
use crate::stats::directories;
use crate::tests::races::Victim;
use crate::tests::{check_ring_works, check_vm_works};
use crate::thread::{wait_until, with_vcpu, PATIENCE};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Vm, VmConfig, BASE};

/// Where memory is that goes.
const PLACE: u64 = 0x2000_0000;
/// For a shorter time than [`LONG`].
const SHORT: u64 = 300;
/// Calls that may wait in a sample, of one VM; the next one is refused.
const MOST_WAITING: u64 = 256;

/// As [`try_watch_done`], with a long time that is long enough for this machine.
fn watch_done(
    build: &Build,
    sample: Sample,
    endings: impl Fn(u64) -> [Ending; 4],
    first: u32,
) -> Result<Ring> {
    build.samples.insert(sample.module)?;
    let mut long = LONG;
    for _ in 0..10 {
        if let Some(ring) = try_watch_done(sample, endings(long), first)? {
            return Ok(ring);
        }
        long = MOST_MS.min(2 * long);
    }
    failed(format!("nothing was seen of calls that are pending for {long} ms"))
}

/// Publishes calls, two of which are pending for a [`SHORT`] and for a long time, and watches `done` meanwhile: it gets
/// to `first` and stays there until the long one has ended. `None` if that was over before it could be looked at.
fn try_watch_done(sample: Sample, endings: [Ending; 4], first: u32) -> Result<Option<Ring>> {
    let mut vm = Vm::new(VmConfig::default())?;
    let account = sample.attach(&mut vm)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    for ending in endings {
        ring.stage(&sample.call(1, ending))?;
    }
    let accepted = endings.iter().filter(|ending| !matches!(ending, Ending::Refused)).count();
    let (memory, offset) = vm.memory_at(BASE)?;
    let done = || memory.word32(offset + header::DONE).load(Ordering::SeqCst);
    let mut vcpu = vm.vcpus.remove(0);
    let (published, looks) = with_vcpu(
        &mut vcpu,
        |vcpu| vcpu.publish(&mut ring, 0, Exit::Cpuid),
        || {
            // The one that attached it, and all but the long one.
            let others = || account.get("calls").is_ok_and(|calls| calls >= accepted as u64);
            wait_until(PATIENCE, "the others have ended", others)?;
            wait_until(PATIENCE, "done is shown", || done() >= first)?;
            let mut looks = 0;
            while looks < 50 {
                let seen = done();
                // In this order: it was waiting when that was seen.
                if account.get("waiting")? != 1 {
                    break;
                }
                check_eq!(seen, first, "done before the long one has ended");
                std::thread::sleep(Duration::from_millis(2));
                looks += 1;
            }
            wait_until(PATIENCE, "the end is shown", || done() == 4)?;
            Ok(looks)
        },
    )?;
    if looks == 0 {
        return Ok(None);
    }
    check!(published.done <= first, "right after its exit the guest saw done {}", published.done);
    vm.vcpus.push(vcpu);
    check_eq!(vm.stats()?.get("pending")?, 0, "pending");
    vm.stats()?.check_law()?;
    check_ring_works(&mut vm, 0, OTHER)?;
    Ok(Some(ring))
}

pub(super) fn done_waits(build: &Build, sample: Sample) -> CaseResult {
    let endings = |long| [Ending::Late(long), Ending::Late(SHORT), Ending::AtOnce, Ending::Refused];
    let ring = watch_done(build, sample, endings, 0)?;
    let statuses: Vec<_> = (0..4).map(|position| i64::from(ring.status(position))).collect();
    check_eq!(statuses, [0, 0, 0, Error::Busy.to_rax()], "statuses");
    check_eq!(ring.declined(), 1, "declined in the header");
    Ok(Verdict::Pass)
}

pub(super) fn done_follows(build: &Build, sample: Sample) -> CaseResult {
    let endings = |long| [Ending::AtOnce, Ending::Late(SHORT), Ending::Late(long), Ending::Early];
    let ring = watch_done(build, sample, endings, 2)?;
    check_eq!(ring.declined(), 0, "declined in the header");
    Ok(Verdict::Pass)
}

/// Calls are taken at the exit of vCPU 0, which then waits for them on its way to the VMM; vCPU 1 makes a
/// hypercall for the ring.
pub(super) fn waits(build: &Build, sample: Sample) -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    build.samples.insert(sample.module)?;
    let account = sample.attach(&mut vm)?;
    for function in [Function::Kick, Function::RingTeardown] {
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
        let id = ring.id();
        for ms in [SHORT, 2 * SHORT, 0] {
            ring.stage(&sample.call(1, Ending::Late(ms)))?;
        }
        let (memory, offset) = vm.memory_at(BASE)?;
        let calls = account.get("calls")?;
        let mut vcpu = vm.vcpus.remove(0);
        with_vcpu(
            &mut vcpu,
            |vcpu| vcpu.publish(&mut ring, 0, Exit::Cpuid),
            || {
                account.wait_accepted(calls + 3)?;
                // Number 0 is the other vCPU: the first one has been taken out.
                check_eq!(vm.hypercall(0, function as u64, id, 0, 0)?, 0, "{function:?}");
                check_eq!(account.get("calls")?, calls + 3, "calls after {function:?}");
                if function == Function::Kick {
                    // A ring that is being taken down need not show the end of its calls.
                    let done = memory.word32(offset + header::DONE).load(Ordering::SeqCst);
                    check_eq!(done, 3, "done after a KICK");
                }
                Ok(())
            },
        )?;
        vm.vcpus.insert(0, vcpu);
        // On the ring's own vCPU the calls are taken by the hypercall itself.
        let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
        ring.stage(&sample.call(1, Ending::Late(SHORT)))?;
        let published = vm.vcpus[0].publish(&mut ring, 0, Exit::Kick)?;
        check_eq!((published.done, published.result), (1, 0), "done and result of a KICK");
        vm.stats()?.check_law()?;
    }
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

pub(super) fn interrupted(build: &Build, sample: Sample) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    build.samples.insert(sample.module)?;
    sample.attach(&mut vm)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let mut vcpu = vm.vcpus.remove(0);
    let call = sample.call(1, Ending::Late(7));
    let mut pending = Vec::new();
    with_vcpu(
        &mut vcpu,
        |vcpu| {
            vcpu.flood(&mut ring, &call, u64::MAX, |_| {
                pending.push(vm.stats().and_then(|stats| stats.get("pending")).ok());
                pending.len() < 100
            })
        },
        || Ok(()),
    )?;
    let left = pending.iter().filter(|&&count| count != Some(0)).count();
    check_eq!(left, 0, "returns from KVM_RUN with calls pending, of {}", pending.len());
    vm.vcpus.push(vcpu);
    vm.stats()?.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

pub(super) fn memslot_goes(build: &Build, sample: Sample) -> CaseResult {
    let len = 1 << 20;
    let mut vm = Vm::new(VmConfig::default())?;
    build.samples.insert(sample.module)?;
    let account = sample.attach(&mut vm)?;
    for refill in [false, true] {
        let slot = vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, len)?)?;
        let mut ring = Ring::set_up(&mut vm, 0, PLACE, 64, 0)?;
        for ms in [2 * SHORT, SHORT, 2 * SHORT] {
            ring.stage(&sample.call(1, Ending::Late(ms)))?;
        }
        let before = vm.stats()?;
        let calls = account.get("calls")?;
        let mut vcpu = vm.vcpus.remove(0);
        let (_, left) = with_vcpu(
            &mut vcpu,
            |vcpu| vcpu.begin_publish(&mut ring, 0, Exit::Cpuid),
            || {
                account.wait_accepted(calls + 3)?;
                let old = vm.remove_memory(slot)?;
                if refill {
                    // In the same place, what is pending must not be written to.
                    vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, len)?)?;
                }
                let left = old.snapshot(0, len);
                Ok((old, left))
            },
        )?;
        vcpu.park()?;
        vm.vcpus.push(vcpu);
        check_eq!(account.get("calls")?, calls + 3, "calls that ended");
        check!(left.0.snapshot(0, len) == left.1, "the memory that has gone was written to");
        if refill {
            let (memory, _) = vm.memory_at(PLACE)?;
            check_eq!(memory.first_difference(0, len, |_| 0), None, "what the new memory holds");
            vm.remove_memory(vm.slot_at(PLACE)?)?;
        }
        let after = vm.stats()?;
        check_eq!(after.since(&before, "executed")?, 3, "executed");
        check_eq!(after.get("pending")?, 0, "pending");
        after.check_law()?;
        check_vm_works(&mut vm)?;
    }
    Ok(Verdict::Pass)
}

pub(super) fn goes_while_pending(build: &Build, sample: Sample) -> CaseResult {
    const ROUNDS: u64 = 4;
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 1024, 0)?;
    let mut vcpu = vm.vcpus.remove(0);
    let call = sample.call(1, Ending::Late(MOST_MS));
    with_vcpu(
        &mut vcpu,
        |vcpu| vcpu.flood(&mut ring, &call, u64::MAX, |stop| stop != Stop::Interrupted),
        || {
            for round in 1..=ROUNDS {
                build.samples.insert(sample.module)?;
                let list = || directories(sample.module, std::process::id()).unwrap_or_default();
                wait_until(PATIENCE, "the flood has reached the sample", || !list().is_empty())?;
                Account(list().remove(0)).wait("waiting", MOST_WAITING)?;
                // Some rounds with the ring full and all of it refused but those, some before that.
                if round % 2 == 0 {
                    std::thread::sleep(Duration::from_millis(200));
                }
                remove_at_once(build, sample)?;
                // All of those are declined, and the ring goes on.
                let before = vm.stats()?;
                let grown = || vm.stats().and_then(|now| now.since(&before, "errors_operation"));
                wait_until(PATIENCE, "the ring goes on", || grown().is_ok_and(|n| n > 2048))?;
                let gone = vm.stats()?.get("errors_gone")?;
                check_eq!(gone, round * MOST_WAITING, "calls declined by the sample as it went");
            }
            Ok(())
        },
    )?;
    vm.vcpus.push(vcpu);
    let stats = vm.stats()?;
    check_eq!(stats.get("executed")?, 0, "executed");
    check_eq!(stats.get("pending")?, 0, "pending");
    stats.check_law()?;
    build.samples.insert(sample.module)?;
    let account = sample.attach(&mut vm)?;
    execute(&mut vm, &mut ring, &[(sample.call(7, Ending::Late(1)), 0); 3])?;
    check_eq!(account.get("sum")?, 21, "sum afterwards");
    Ok(Verdict::Pass)
}

pub(super) fn goes_during_call(build: &Build, sample: Sample) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    build.samples.insert(sample.module)?;
    let account = sample.attach(&mut vm)?;
    let Call { op, arg } = sample.call(1, Ending::Late(MOST_MS));
    let mut vcpu = vm.vcpus.remove(0);
    let (rax, ()) = with_vcpu(
        &mut vcpu,
        |vcpu| vcpu.hypercall(CALL, op.0.into(), arg[0], arg[1]),
        || {
            account.wait("waiting", 1)?;
            remove_at_once(build, sample)
        },
    )?;
    vm.vcpus.push(vcpu);
    check_eq!(rax, Error::Gone.to_rax(), "the CALL that was pending");
    vm.stats()?.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

pub(super) fn killed(build: &Build, sample: Sample) -> CaseResult {
    build.samples.insert(sample.module)?;
    for round in 0..5 {
        let child = Victim::start(&sample.call(1, Ending::Late(1000)))?;
        let pid = child.pid();
        let left = |module| directories(module, pid).map_or(0, |found| found.len());
        wait_until(PATIENCE, "the sample knows the VM", || left(sample.module) == 1)?;
        std::thread::sleep(Duration::from_millis(round * 20));
        // Waits for its end, which waits for the calls.
        drop(child);
        wait_until(PATIENCE, "the VM is forgotten", || {
            left(sample.module) == 0 && left("kvm_dlh") == 0
        })?;
    }
    remove_at_once(build, sample)?;
    Ok(Verdict::Pass)
}
