// SPDX-License-Identifier: GPL-2.0

//! The operation FREE_PAGES: what was named may become zeroes, and nothing else ever does.

use std::fs;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use dlh_abi::{has_passed, Call, Error, Function, Operation, FEATURE_FREE_PAGES};

use super::check_vm_works;
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, FILE_WORD, HUGE_PAGE, PAGE};
use crate::ring::Ring;
use crate::thread::{wait_until, with_vcpu};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Slot, Vm, VmConfig, BASE};

/// Where the memory to report is.
const PLACE: u64 = 0x2000_0000;
const PAGE_BYTES: u64 = PAGE as u64;
const MIB: usize = 1 << 20;
/// How long the host may take for a report.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a case is made of.
type Entry = (&'static str, fn() -> CaseResult);

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
        ("locked memory is left alone", locked),
        ("memory of other kinds is left alone", other_kinds),
        ("memory armed with userfaultfd is left alone", userfaultfd),
        ("memory pinned for input and output is left alone", pinned),
        ("a report of the ring's own memory", own_ring),
        ("memslots that go away below reports", memslot_goes),
    ];
    CASES
        .iter()
        .map(|&(name, run)| {
            Case::new(name, move || {
                let mut vm = Vm::new(VmConfig::default())?;
                let features = vm.hypercall(0, Function::Features as u64, 0, 0, 0)?;
                check!(features > 0, "FEATURES gave {features}");
                if features as u64 & u64::from(FEATURE_FREE_PAGES) == 0 {
                    return Ok(Verdict::Skip("the host does not have ksm_bridge.ko".into()));
                }
                drop(vm);
                run()
            })
        })
        .collect()
}

/// What the memory is filled with; never 0.
fn pattern(at: usize) -> u64 {
    (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// A VM with a ring, and memory to report at [`PLACE`].
struct Setup {
    vm: Vm,
    ring: Ring,
    memory: Arc<Mapping>,
    slot: Slot,
}

impl Setup {
    fn new(mapping: Mapping) -> Result<Self> {
        mapping.fill(0, mapping.len(), pattern);
        Self::unfilled(mapping)
    }

    fn unfilled(mapping: Mapping) -> Result<Self> {
        let mut vm = Vm::new(VmConfig::default())?;
        let slot = vm.add_memory(PLACE, mapping)?;
        let memory = vm.region(slot).mapping.clone();
        Self::with_slot(vm, memory, slot)
    }

    fn with_slot(mut vm: Vm, memory: Arc<Mapping>, slot: Slot) -> Result<Self> {
        let ring = Ring::set_up(&mut vm, 0, BASE, 256, 0)?;
        let mut setup = Self { vm, ring, memory, slot };
        // The bridge gets to know a VM by its first report; this one is of no interest.
        check_eq!(setup.report(BASE + MIB as u64, PAGE_BYTES)?, 0, "status of the first report");
        Ok(setup)
    }

    fn anonymous(len: usize) -> Result<Self> {
        Self::new(Mapping::new(Backing::Anonymous, len)?)
    }

    /// Publishes a report; returns its position.
    fn submit(&mut self, gpa: u64, bytes: u64) -> Result<u32> {
        let position = self.ring.place(&report(gpa, bytes))?;
        self.ring.publish();
        Ok(position)
    }

    /// Reports a range and waits until the host is done with it; returns the status.
    fn report(&mut self, gpa: u64, bytes: u64) -> Result<i32> {
        let position = self.submit(gpa, bytes)?;
        self.vm.vcpus[0].exit(Exit::Pio)?;
        self.wait(position)?;
        Ok(self.ring.status(position))
    }

    /// Waits until done has passed a position. The vCPU does not run meanwhile.
    fn wait(&self, position: u32) -> Result<()> {
        wait_until(PATIENCE, "done has passed the report", || {
            has_passed(self.ring.done(), position)
        })
    }

    /// Checks a range that must be as it was.
    fn check_kept(&self, offset: usize, len: usize) -> Result<()> {
        let changed = self.memory.first_difference(offset, len, pattern);
        check_eq!(changed, None, "offset of lost data");
        Ok(())
    }

    /// Checks a range of which every page may be zeroes or as it was; returns the pages of zeroes.
    fn check_reported(&self, offset: usize, len: usize) -> Result<u64> {
        let mut zeroes = 0;
        for page in (offset..offset + len).step_by(PAGE) {
            if self.memory.first_difference(page, PAGE, |_| 0).is_none() {
                zeroes += 1;
            } else {
                let changed = self.memory.first_difference(page, PAGE, pattern);
                check_eq!(changed, None, "offset of what is neither zero nor as it was");
            }
        }
        Ok(zeroes)
    }

    fn finish(mut self) -> CaseResult {
        self.vm.stats()?.check_law()?;
        check_vm_works(&mut self.vm)?;
        Ok(Verdict::Pass)
    }
}

fn report(gpa: u64, bytes: u64) -> Call {
    Call { op: Operation::FREE_PAGES, arg: [gpa, bytes] }
}

/// KiB of anonymous memory this process has.
fn rss_anon() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let value = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(value.ok_or("no RssAnon in /proc/self/status")?.parse()?)
}

/// Checks that this process has lost about this much anonymous memory.
fn check_fell(before: u64, bytes: usize) -> Result<()> {
    let now = rss_anon()?;
    let fell = before.saturating_sub(now) * 1024;
    // What the kernel counts lags by some pages for each CPU.
    let expected = bytes as u64 - bytes as u64 / 8;
    check!(fell >= expected, "RssAnon fell by {fell} from {before} KiB, {bytes} were reported");
    Ok(())
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

/// Checks that each report gets this status, and that no data are lost.
fn check_refused(setup: &mut Setup, error: Error, ranges: &[(u64, u64)]) -> Result<()> {
    for &(gpa, bytes) in ranges {
        let before = setup.vm.bridge_stats()?;
        let status = i64::from(setup.report(gpa, bytes)?);
        check_eq!(status, error.to_rax(), "status of {bytes:#x} bytes at {gpa:#x}");
        let after = setup.vm.bridge_stats()?;
        check_eq!(after.since(&before, "merged_pages")?, 0, "pages merged by a bad report");
        setup.check_kept(0, setup.memory.len())?;
    }
    Ok(())
}

fn bad_ranges() -> CaseResult {
    let mut setup = Setup::anonymous(MIB)?;
    let ranges = [
        (PLACE + 1, PAGE_BYTES),
        (PLACE + 2048, PAGE_BYTES),
        (PLACE, 1),
        (PLACE, PAGE_BYTES - 1),
        (PLACE, PAGE_BYTES + 1),
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

/// Reports all of the memory, which the host must leave alone and count as such.
fn check_skipped(setup: &mut Setup, counter: &str) -> Result<()> {
    let before = setup.vm.bridge_stats()?;
    let len = setup.memory.len();
    let status = setup.report(PLACE, len as u64)?;
    check!(
        [0, -(Error::Memory as i32)].contains(&status),
        "status {status} of memory that is skipped"
    );
    let after = setup.vm.bridge_stats()?;
    let pages = (len / PAGE) as u64;
    check_eq!(after.since(&before, counter)?, pages, "{counter}");
    check_eq!(after.since(&before, "merged_pages")?, 0, "merged_pages");
    setup.check_kept(0, len)
}

fn locked() -> CaseResult {
    let mapping = Mapping::new(Backing::Anonymous, MIB)?;
    mapping.lock(0, MIB)?;
    let mut setup = Setup::new(mapping)?;
    check_skipped(&mut setup, "skipped_locked")?;
    setup.finish()?;

    // Only a part in the middle.
    let mut setup = Setup::anonymous(3 * MIB)?;
    setup.memory.lock(MIB, MIB)?;
    let before = setup.vm.bridge_stats()?;
    setup.report(PLACE, 3 * MIB as u64)?;
    setup.check_kept(MIB, MIB)?;
    setup.check_reported(0, MIB)?;
    setup.check_reported(2 * MIB, MIB)?;
    let after = setup.vm.bridge_stats()?;
    check_eq!(after.since(&before, "skipped_locked")?, 256, "skipped_locked");
    setup.finish()
}

fn other_kinds() -> CaseResult {
    for backing in [Backing::SharedMemfd, Backing::PrivateMemfd, Backing::Hugetlb] {
        let mapping = match Mapping::new(backing, 2 * HUGE_PAGE) {
            Err(error) if backing == Backing::Hugetlb => {
                println!("# no huge pages to test with: {error}");
                continue;
            }
            mapping => mapping?,
        };
        println!("# {backing:?}");
        let mut setup = Setup::new(mapping)?;
        check_skipped(&mut setup, "skipped_kind")?;
        setup.finish()?;
    }
    // Private pages over a file: giving them back would bring the file's content to light.
    let mut setup = Setup::unfilled(Mapping::new(Backing::PrivateMemfd, MIB)?)?;
    setup.report(PLACE, MIB as u64)?;
    let changed = setup.memory.first_difference(0, MIB, |_| FILE_WORD);
    check_eq!(changed, None, "offset of what changed in a file's mapping");

    println!("# read-only");
    let mut vm = Vm::new(VmConfig::default())?;
    let mapping = Mapping::new(Backing::Anonymous, MIB)?;
    mapping.fill(0, MIB, pattern);
    let slot = vm.add_readonly_memory(PLACE, mapping)?;
    let memory = vm.region(slot).mapping.clone();
    let mut setup = Setup::with_slot(vm, memory, slot)?;
    check_skipped(&mut setup, "skipped_readonly")?;
    // However long the range is that begins there: it costs the host nothing.
    let ranges = [(PLACE, 2 * MIB as u64), (PLACE, 1 << 45), (PLACE, (1 << 52) - PLACE)];
    check_refused(&mut setup, Error::Memory, &ranges)?;
    setup.finish()
}

fn userfaultfd() -> CaseResult {
    let setup = Setup::anonymous(MIB)?;
    let armed = match setup.memory.arm_userfaultfd() {
        Ok(armed) => armed,
        Err(error) => return Ok(Verdict::Skip(format!("no userfaultfd here: {error}"))),
    };
    let mut setup = setup;
    check_skipped(&mut setup, "skipped_uffd")?;
    drop(armed);
    // Nobody watches the memory any more.
    check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status");
    check_eq!(setup.check_reported(0, MIB)?, 256, "pages of zeroes");
    setup.finish()
}

fn pinned() -> CaseResult {
    let mut setup = Setup::anonymous(MIB)?;
    let ring = match setup.memory.pin() {
        Ok(ring) => ring,
        Err(error) => return Ok(Verdict::Skip(format!("no io_uring here: {error}"))),
    };
    check_skipped(&mut setup, "skipped_pinned")?;
    drop(ring);
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
