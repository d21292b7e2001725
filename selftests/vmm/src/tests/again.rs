// SPDX-License-Identifier: GPL-2.0

//! The question of FREE_PAGES: whether a guest is to report all that is free once more.

use std::sync::atomic::Ordering;

use dlh_abi::{Error, FreePages};

use super::reporting::{report, with_bridge, Entry, Setup, MIB, PAGE_BYTES, PLACE};
use crate::ktap::{check, check_eq, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, HUGE_PAGE, PAGE};
use crate::vcpu::Exit;
use crate::vm::Vm;

pub(super) fn cases() -> Vec<crate::ktap::Case> {
    const CASES: &[Entry] = &[
        ("a host that knows nothing of a VM wants its reports, once", first),
        ("the operator has a guest report again", wanted),
        ("what was kept for a pin is asked for again, and not too often", pinned),
        ("a shared file that somebody has read is asked for again", || refilled(false)),
        ("shared huge pages that somebody has read are asked for again", || refilled(true)),
        ("what the guest uses again is not taken for filled", in_use),
        ("other memory that somebody has read is not filled", others),
        ("a question is answered by CALL, and beside reports in a ring", everywhere),
    ];
    with_bridge(CASES)
}

const AGAIN: i32 = -(Error::Again as i32);

/// Asks through the ring.
fn ask(setup: &mut Setup) -> Result<i32> {
    let before = setup.vm.bridge_stats()?;
    let position = setup.ring.place(&FreePages::Question.call())?;
    setup.ring.publish();
    setup.vm.vcpus[0].exit(Exit::Pio)?;
    setup.wait(position)?;
    let status = setup.ring.status(position);
    check!([0, AGAIN].contains(&status), "a question got {status}");
    let after = setup.vm.bridge_stats()?;
    check_eq!(after.since(&before, "asked_again")?, u64::from(status == AGAIN), "asked_again");
    check_eq!(after.since(&before, "reported_pages")?, 0, "pages that a question names");
    Ok(status)
}

/// Has everything in a mapping read by the VMM.
fn read_all(mapping: &Mapping) {
    for at in (0..mapping.len()).step_by(PAGE) {
        let _ = mapping.word(at).load(Ordering::Relaxed);
    }
}

fn map_refilled(vm: &Vm) -> Result<u64> {
    vm.bridge_stats()?.get("map_refilled")
}

fn first() -> CaseResult {
    let mut setup = Setup::anonymous(MIB)?;
    check_eq!(ask(&mut setup)?, AGAIN, "the first answer");
    for _ in 0..3 {
        check_eq!(ask(&mut setup)?, 0, "another answer");
        check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status of a report");
    }
    setup.finish()
}

fn wanted() -> CaseResult {
    let mut setup = Setup::anonymous(MIB)?;
    ask(&mut setup)?;
    for _ in 0..3 {
        setup.vm.bridge_again()?;
        check_eq!(ask(&mut setup)?, AGAIN, "the answer when the operator wants it");
        check_eq!(ask(&mut setup)?, 0, "the answer after that");
    }
    setup.finish()
}

fn pinned() -> CaseResult {
    let mut setup = Setup::anonymous(MIB)?;
    ask(&mut setup)?;
    let ring = setup.memory.pin()?;
    check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status of what is pinned");
    check_eq!(ask(&mut setup)?, AGAIN, "the answer when something was kept");
    // It is pinned still; the next time is a minute away.
    for _ in 0..3 {
        check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status of what is pinned");
        check_eq!(ask(&mut setup)?, 0, "the answer right after that");
    }
    setup.check_kept(0, MIB)?;
    drop(ring);
    // Whatever else is the case.
    setup.vm.bridge_again()?;
    check_eq!(ask(&mut setup)?, AGAIN, "the answer when the operator wants it");
    setup.finish()
}

fn refilled(huge: bool) -> CaseResult {
    let backing =
        if huge { Backing::Hugetlb { shift: 21, shared: true } } else { Backing::SharedMemfd };
    let mut setup = Setup::new(Mapping::new(backing, 12 * MIB)?)?;
    ask(&mut setup)?;
    check_eq!(setup.report(PLACE + 2 * MIB as u64, 8 * MIB as u64)?, 0, "status");
    check_eq!(map_refilled(&setup.vm)?, 0, "map_refilled");
    check_eq!(ask(&mut setup)?, 0, "the answer before anybody has read there");
    read_all(&setup.memory);
    let pages = (8 * MIB / PAGE) as u64;
    check_eq!(map_refilled(&setup.vm)?, pages, "map_refilled");
    check_eq!(ask(&mut setup)?, AGAIN, "the answer when all of it is there");
    // Reported once more, it is gone.
    check_eq!(setup.report(PLACE + 2 * MIB as u64, 8 * MIB as u64)?, 0, "status");
    check_eq!(map_refilled(&setup.vm)?, 0, "map_refilled");
    check_eq!(ask(&mut setup)?, 0, "the answer when it is gone again");
    setup.check_kept(0, 2 * MIB)?;
    setup.check_kept(10 * MIB, 2 * MIB)?;
    setup.finish()
}

fn in_use() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::SharedMemfd, 8 * MIB)?)?;
    ask(&mut setup)?;
    check_eq!(setup.report(PLACE, 8 * MIB as u64)?, 0, "status");
    for page in 0..1500 {
        setup.vm.vcpus[0].store(PLACE + page * PAGE_BYTES, 1)?;
    }
    check_eq!(map_refilled(&setup.vm)?, 0, "map_refilled when the guest has written there");
    check_eq!(ask(&mut setup)?, 0, "the answer when the guest has written there");
    // Somebody reads some of the rest: too little for a round of reports.
    for page in 0..400 {
        let _ = setup.memory.word((1600 + page) * PAGE).load(Ordering::Relaxed);
    }
    check_eq!(map_refilled(&setup.vm)?, 400, "map_refilled when somebody has read some");
    check_eq!(ask(&mut setup)?, 0, "the answer when somebody has read some");
    setup.finish()
}

fn others() -> CaseResult {
    for backing in [Backing::Anonymous, Backing::EmptyPrivateMemfd] {
        let mut setup = Setup::new(Mapping::new(backing, 8 * MIB)?)?;
        ask(&mut setup)?;
        check_eq!(setup.report(PLACE, 8 * MIB as u64)?, 0, "status");
        read_all(&setup.memory);
        check_eq!(map_refilled(&setup.vm)?, 0, "map_refilled of {backing:?}");
        check_eq!(ask(&mut setup)?, 0, "the answer for {backing:?}");
        setup.finish()?;
    }
    Ok(Verdict::Pass)
}

fn everywhere() -> CaseResult {
    let mut setup = Setup::anonymous(2 * HUGE_PAGE)?;
    let call = FreePages::Question.call();
    let [first, second] = call.arg;
    let number = dlh_abi::Function::Call as u64;
    let made = setup.vm.hypercall(0, number, u64::from(call.op.0), first, second)?;
    check_eq!(made, i64::from(AGAIN), "the answer to a CALL");
    let made = setup.vm.hypercall(0, number, u64::from(call.op.0), first, second)?;
    check_eq!(made, 0, "the answer to another");
    setup.vm.bridge_again()?;
    let mut told = 0;
    let mut positions = Vec::new();
    for page in 0..50 {
        setup.ring.place(&report(PLACE + page * PAGE_BYTES, PAGE_BYTES))?;
        positions.push(setup.ring.place(&call)?);
    }
    setup.ring.publish();
    setup.vm.vcpus[0].exit(Exit::Pio)?;
    setup.wait(positions[49])?;
    for position in positions {
        told += u32::from(setup.ring.status(position) == AGAIN);
    }
    check_eq!(told, 1, "questions that were told so");
    check_eq!(setup.check_reported(0, 50 * PAGE)?, 50, "pages of zeroes");
    setup.finish()
}
