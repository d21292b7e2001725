// SPDX-License-Identifier: GPL-2.0

//! The operation FREE_PAGES: what was named may become zeroes, and nothing else ever does.

use std::sync::atomic::Ordering;
use std::time::Duration;

use dlh_abi::{Error, Function, Operation};

use super::reporting::{
    check_fell, check_refused, pattern, report, rss_anon, with_bridge, Entry, Setup, MIB,
    PAGE_BYTES, PLACE,
};
use crate::ktap::{check, check_eq, Case, CaseResult};
use crate::memory::{Backing, Mapping, HUGE_PAGE, PAGE};
use crate::ring::Ring;
use crate::thread::with_vcpu;
use crate::vcpu::{Exit, Stop};
use crate::vm::BASE;

pub(super) fn cases() -> Vec<Case> {
    const CASES: &[Entry] = &[
        ("anonymous memory is given back, its neighbours stay", anonymous),
        ("memory of transparent huge pages is given back", transparent_huge),
        ("a part of a huge page leaves the rest as it is", part_of_huge),
        ("every other page", every_other_page),
        ("memory that was never touched", untouched),
        ("a report twice over", twice),
        ("many small reports in a full ring", many_reports),
        ("a report by CALL", by_call),
        ("KICK waits for a report", by_kick),
        ("done moves on without exits", without_exits),
        ("pages that are used again keep what is written", used_again),
        ("the guest and the VMM see the same pages afterwards", same_view),
        ("ranges that are no ranges of pages", bad_ranges),
        ("ranges that are not in one memslot", bad_memory),
        ("a report of the ring's own memory", own_ring),
        ("memslots that go away below reports", memslot_goes),
    ];
    with_bridge(CASES)
}

fn anonymous() -> CaseResult {
    let mut setup = Setup::anonymous(18 * MIB)?;
    let before = setup.vm.bridge_stats()?;
    let rss = rss_anon()?;
    check_eq!(setup.report(PLACE + MIB as u64, 16 * MIB as u64)?, 0, "status");
    check_fell(rss, 16 * MIB)?;
    check_eq!(setup.check_reported(MIB, 16 * MIB)?, 4096, "pages of zeroes");
    setup.check_kept(0, MIB)?;
    setup.check_kept(17 * MIB, MIB)?;
    let after = setup.vm.bridge_stats()?;
    check_eq!(after.since(&before, "reported_pages")?, 4096, "reported_pages");
    check_eq!(after.since(&before, "merged_pages")?, 4096, "merged_pages");
    setup.finish()
}

fn transparent_huge() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::TransparentHuge, 8 * HUGE_PAGE)?)?;
    let rss = rss_anon()?;
    let status = setup.report(PLACE + HUGE_PAGE as u64, 6 * HUGE_PAGE as u64)?;
    check_eq!(status, 0, "status");
    check_fell(rss, 6 * HUGE_PAGE)?;
    setup.check_reported(HUGE_PAGE, 6 * HUGE_PAGE)?;
    setup.check_kept(0, HUGE_PAGE)?;
    setup.check_kept(7 * HUGE_PAGE, HUGE_PAGE)?;
    setup.finish()
}

fn part_of_huge() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::TransparentHuge, 3 * HUGE_PAGE)?)?;
    // Within the first page, then from the middle of the second to that of the third.
    for (first, pages) in [(3, 200), (512 + 100, 512)] {
        let (offset, len) = (first * PAGE, pages * PAGE);
        let status = setup.report(PLACE + offset as u64, len as u64)?;
        check_eq!(status, 0, "status");
        setup.check_reported(offset, len)?;
    }
    setup.check_kept(0, 3 * PAGE)?;
    setup.check_kept(203 * PAGE, (512 + 100 - 203) * PAGE)?;
    setup.check_kept((1024 + 100) * PAGE, (512 - 100) * PAGE)?;
    setup.finish()
}

fn every_other_page() -> CaseResult {
    let pages = 400;
    let mut setup = Setup::anonymous(pages * PAGE)?;
    for page in (0..pages).step_by(2) {
        setup.submit(PLACE + (page * PAGE) as u64, PAGE_BYTES)?;
    }
    setup.vm.vcpus[0].exit(Exit::Pio)?;
    setup.wait(setup.ring.tail().wrapping_sub(1))?;
    let mut zeroes = 0;
    for page in (0..pages).step_by(2) {
        zeroes += setup.check_reported(page * PAGE, PAGE)?;
        setup.check_kept((page + 1) * PAGE, PAGE)?;
    }
    check_eq!(zeroes, pages as u64 / 2, "pages of zeroes");
    setup.finish()
}

fn untouched() -> CaseResult {
    let mut setup = Setup::unfilled(Mapping::new(Backing::Anonymous, 4 * MIB)?)?;
    let rss = rss_anon()?;
    check_eq!(setup.report(PLACE, 4 * MIB as u64)?, 0, "status");
    check!(rss_anon()? <= rss + 512, "reporting untouched memory made it use some");
    check_eq!(setup.memory.first_difference(0, 4 * MIB, |_| 0), None, "what is not zero");
    setup.finish()
}

fn twice() -> CaseResult {
    let mut setup = Setup::anonymous(2 * MIB)?;
    for _ in 0..3 {
        check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status");
        setup.check_reported(0, MIB)?;
        setup.check_kept(MIB, MIB)?;
    }
    // Overlapping, in one go.
    let last = [(0, 256), (128, 256), (0, 1), (255, 2)]
        .map(|(page, pages)| setup.submit(PLACE + page * PAGE_BYTES, pages * PAGE_BYTES));
    setup.vm.vcpus[0].exit(Exit::Cpuid)?;
    for position in last {
        let position = position?;
        setup.wait(position)?;
        check_eq!(setup.ring.status(position), 0, "status");
    }
    setup.check_kept(384 * PAGE, 2 * MIB - 384 * PAGE)?;
    setup.finish()
}

fn many_reports() -> CaseResult {
    let pages = 1024;
    let mut setup = Setup::anonymous(pages * PAGE)?;
    let before = setup.vm.bridge_stats()?;
    let rss = rss_anon()?;
    for page in 0..pages as u64 {
        // In an order that has no runs.
        let page = page * 389 % pages as u64;
        while setup.ring.place(&report(PLACE + page * PAGE_BYTES, PAGE_BYTES)).is_err() {
            setup.ring.publish();
            setup.vm.vcpus[0].exit(Exit::Cpuid)?;
        }
    }
    setup.ring.publish();
    setup.vm.vcpus[0].exit(Exit::Pio)?;
    setup.wait(setup.ring.tail().wrapping_sub(1))?;
    check_eq!(setup.ring.declined(), 0, "entries declined");
    check_fell(rss, pages * PAGE)?;
    setup.check_reported(0, pages * PAGE)?;
    let after = setup.vm.bridge_stats()?;
    check_eq!(after.since(&before, "reported_pages")?, pages as u64, "reported_pages");
    setup.finish()
}

fn by_call() -> CaseResult {
    let mut setup = Setup::anonymous(4 * MIB)?;
    let call = Function::Call as u64;
    let op = Operation::FREE_PAGES.0.into();
    let result = setup.vm.hypercall(0, call, op, PLACE + MIB as u64, 2 * MIB as u64)?;
    check_eq!(result, 0, "RAX");
    // Accepted means: executed before the vCPU went on.
    check_eq!(setup.check_reported(MIB, 2 * MIB)?, 512, "pages of zeroes");
    setup.check_kept(0, MIB)?;
    setup.check_kept(3 * MIB, MIB)?;
    setup.finish()
}

fn by_kick() -> CaseResult {
    let mut setup = Setup::anonymous(8 * MIB)?;
    for round in 0..8 {
        let position = setup.ring.stage(&report(PLACE + round * MIB as u64, MIB as u64))?;
        let published = setup.vm.vcpus[0].publish(&mut setup.ring, 0, Exit::Kick)?;
        check_eq!(published.result, 0, "KICK");
        check_eq!(published.done, position.wrapping_add(1), "done as the guest sees it after KICK");
        check_eq!(setup.check_reported(round as usize * MIB, MIB)?, 256, "pages of zeroes");
    }
    setup.finish()
}

fn without_exits() -> CaseResult {
    let mut setup = Setup::anonymous(8 * MIB)?;
    let position = setup.ring.stage(&report(PLACE, 8 * MIB as u64))?;
    // After the CPUID of the publication the guest is back in its loop, and the vCPU stays there.
    setup.vm.vcpus[0].publish(&mut setup.ring, 0, Exit::Cpuid)?;
    setup.wait(position)?;
    setup.check_reported(0, 8 * MIB)?;
    setup.finish()
}

fn used_again() -> CaseResult {
    let pages = 64;
    let mut setup = Setup::anonymous(pages * PAGE)?;
    let len = pages * PAGE;
    for round in 0..100 {
        let offset = round % 8 * PAGE;
        let status = setup.report(PLACE + offset as u64, (len - offset) as u64)?;
        check_eq!(status, 0, "status");
        // The promise is over: from here on it is memory like any other.
        setup.memory.fill(0, len, pattern);
        if round % 10 == 0 {
            std::thread::sleep(Duration::from_millis(30));
        }
        for exit in [Exit::Cpuid, Exit::Pio] {
            setup.vm.vcpus[0].exit(exit)?;
        }
        setup.check_kept(0, len)?;
    }
    std::thread::sleep(Duration::from_millis(300));
    setup.check_kept(0, len)?;
    setup.finish()
}

fn same_view() -> CaseResult {
    let pages = 64;
    let mut setup = Setup::anonymous(pages * PAGE)?;
    let gpa = |page: usize| PLACE + (page * PAGE) as u64;
    for round in 1..=5 {
        // The guest's own page tables of the second level point to the pages from here on.
        for page in 0..pages {
            setup.vm.vcpus[0].store(gpa(page), page as u32 + round)?;
        }
        check_eq!(setup.report(PLACE, (pages * PAGE) as u64)?, 0, "status");
        for page in 0..pages {
            let vmm = setup.memory.word32(page * PAGE + 8).load(Ordering::SeqCst);
            let guest = setup.vm.vcpus[0].load(gpa(page) + 8)?;
            check_eq!(guest, vmm, "what the guest and the VMM read in page {page}");
            let value = !(page as u32) ^ round;
            setup.vm.vcpus[0].store(gpa(page) + 16, value)?;
            let vmm = setup.memory.word32(page * PAGE + 16).load(Ordering::SeqCst);
            check_eq!(vmm, value, "what the VMM reads where the guest wrote, page {page}");
            let word = setup.memory.word32(page * PAGE + 24);
            word.store(value ^ 0x55, Ordering::SeqCst);
            let guest = setup.vm.vcpus[0].load(gpa(page) + 24)?;
            check_eq!(guest, value ^ 0x55, "what the guest reads where the VMM wrote");
        }
    }
    setup.finish()
}

fn bad_ranges() -> CaseResult {
    let mut setup = Setup::anonymous(MIB)?;
    let ranges = [
        (PLACE + 1, PAGE_BYTES),
        (PLACE + 2048, PAGE_BYTES),
        (PLACE, 1),
        (PLACE, PAGE_BYTES - 1),
        (PLACE, PAGE_BYTES + 2),
        (PLACE, PAGE_BYTES + 4),
        // The flag alone, and beside what is none.
        (PLACE, PAGE_BYTES + 5),
        (PLACE + 1, PAGE_BYTES + 1),
        // A question names nothing.
        (PLACE, 2),
        (0, 3),
        (PLACE, 0),
        (PLACE, 1 << 52),
        (PLACE, 1 << 63),
        (PLACE, 0u64.wrapping_sub(PAGE_BYTES)),
        (0u64.wrapping_sub(PAGE_BYTES), PAGE_BYTES),
        (0u64.wrapping_sub(PAGE_BYTES), 2 * PAGE_BYTES),
        (1 << 63, PAGE_BYTES),
        (u64::MAX, u64::MAX),
    ];
    check_refused(&mut setup, Error::Argument, &ranges)?;
    setup.finish()
}

fn bad_memory() -> CaseResult {
    let mut setup = Setup::anonymous(MIB)?;
    let end = PLACE + MIB as u64;
    // A neighbour, of the same kind.
    setup.vm.add_memory(end, Mapping::new(Backing::Anonymous, MIB)?)?;
    let ranges = [
        (0x7000_0000, PAGE_BYTES),
        (PLACE - PAGE_BYTES, PAGE_BYTES),
        (PLACE - PAGE_BYTES, 2 * PAGE_BYTES),
        (end - PAGE_BYTES, 2 * PAGE_BYTES),
        (PLACE, 2 * MIB as u64),
        (PLACE, 1 << 40),
        (end + MIB as u64, PAGE_BYTES),
        (end + MIB as u64 - PAGE_BYTES, 2 * PAGE_BYTES),
        ((1 << 52) - PAGE_BYTES, PAGE_BYTES),
    ];
    check_refused(&mut setup, Error::Memory, &ranges)?;
    setup.finish()
}

fn own_ring() -> CaseResult {
    // Against the rules, but only the guest itself may suffer.
    let mut setup = Setup::anonymous(MIB)?;
    for _ in 0..20 {
        setup.ring = Ring::set_up(&mut setup.vm, 0, BASE, 64, 0)?;
        setup.submit(BASE, MIB as u64)?;
        setup.submit(PLACE, PAGE_BYTES)?;
        for exit in [Exit::Cpuid, Exit::Pio] {
            setup.vm.vcpus[0].exit(exit)?;
        }
        std::thread::sleep(Duration::from_millis(10));
        setup.vm.vcpus[0].exit(Exit::Pio)?;
    }
    setup.check_kept(PAGE, MIB - PAGE)?;
    setup.finish()
}

fn memslot_goes() -> CaseResult {
    let len = 8 * MIB;
    let mut setup = Setup::anonymous(len)?;
    for round in 0..20 {
        let call = report(PLACE, len as u64);
        let mut vcpu = setup.vm.vcpus.remove(0);
        let (vm, ring, slot) = (&mut setup.vm, &mut setup.ring, setup.slot);
        with_vcpu(
            &mut vcpu,
            |vcpu| vcpu.flood(ring, &call, u64::MAX, |stop| stop != Stop::Interrupted),
            || {
                std::thread::sleep(Duration::from_millis(round));
                vm.remove_memory(slot)
            },
        )?;
        setup.vm.vcpus.push(vcpu);
        // What the process keeps is its own: the VM can do nothing to it any more.
        setup.wait(setup.ring.tail().wrapping_sub(1))?;
        setup.memory.fill(0, len, pattern);
        setup.vm.vcpus[0].exit(Exit::Pio)?;
        std::thread::sleep(Duration::from_millis(10));
        setup.check_kept(0, len)?;
        setup.slot = setup.vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, len)?)?;
        setup.memory = setup.vm.region(setup.slot).mapping.clone();
        setup.memory.fill(0, len, pattern);
    }
    setup.finish()
}
