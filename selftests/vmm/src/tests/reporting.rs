// SPDX-License-Identifier: GPL-2.0

//! What the subjects about FREE_PAGES share: a VM with memory that it reports, and how to look at it.

use std::fs;
use std::sync::Arc;

use dlh_abi::{has_passed, Call, Error, Function, Operation, FEATURE_FREE_PAGES};

use super::check_vm_works;
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, PAGE};
use crate::ring::Ring;
use crate::thread::{wait_until, PATIENCE};
use crate::vcpu::Exit;
use crate::vm::{Slot, Vm, VmConfig, BASE};

/// Where the memory to report is.
pub(super) const PLACE: u64 = 0x2000_0000;
pub(super) const PAGE_BYTES: u64 = PAGE as u64;
pub(super) const MIB: usize = 1 << 20;

/// What a case is made of.
pub(super) type Entry = (&'static str, fn() -> CaseResult);

/// Cases for hosts that have ksm_bridge.ko.
pub(super) fn with_bridge(cases: &'static [Entry]) -> Vec<Case> {
    cases.iter().map(|&(name, run)| case_with_bridge(name, run)).collect()
}

/// One case for a host that has ksm_bridge.ko.
pub(super) fn case_with_bridge(
    name: impl Into<String>,
    run: impl Fn() -> CaseResult + 'static,
) -> Case {
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
}

/// What the memory is filled with; never 0.
pub(super) fn pattern(at: usize) -> u64 {
    (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// A VM with a ring, and memory to report at [`PLACE`].
pub(super) struct Setup {
    pub(super) vm: Vm,
    pub(super) ring: Ring,
    pub(super) memory: Arc<Mapping>,
    pub(super) slot: Slot,
}

impl Setup {
    pub(super) fn new(mapping: Mapping) -> Result<Self> {
        mapping.fill(0, mapping.len(), pattern);
        Self::unfilled(mapping)
    }

    pub(super) fn unfilled(mapping: Mapping) -> Result<Self> {
        let mut vm = Vm::new(VmConfig::default())?;
        let slot = vm.add_memory(PLACE, mapping)?;
        let memory = vm.region(slot).mapping.clone();
        Self::with_slot(vm, memory, slot)
    }

    pub(super) fn with_slot(mut vm: Vm, memory: Arc<Mapping>, slot: Slot) -> Result<Self> {
        let ring = Ring::set_up(&mut vm, 0, BASE, 256, 0)?;
        let mut setup = Self { vm, ring, memory, slot };
        // The bridge gets to know a VM by its first report; this one is of no interest.
        check_eq!(setup.report(BASE + MIB as u64, PAGE_BYTES)?, 0, "status of the first report");
        Ok(setup)
    }

    pub(super) fn anonymous(len: usize) -> Result<Self> {
        Self::new(Mapping::new(Backing::Anonymous, len)?)
    }

    /// Publishes a report; returns its position.
    pub(super) fn submit(&mut self, gpa: u64, bytes: u64) -> Result<u32> {
        let position = self.ring.place(&report(gpa, bytes))?;
        self.ring.publish();
        Ok(position)
    }

    /// Reports a range and waits until the host is done with it; returns the status.
    pub(super) fn report(&mut self, gpa: u64, bytes: u64) -> Result<i32> {
        let position = self.submit(gpa, bytes)?;
        self.vm.vcpus[0].exit(Exit::Pio)?;
        self.wait(position)?;
        Ok(self.ring.status(position))
    }

    /// Waits until done has passed a position. The vCPU does not run meanwhile.
    pub(super) fn wait(&self, position: u32) -> Result<()> {
        wait_until(PATIENCE, "done has passed the report", || {
            has_passed(self.ring.done(), position)
        })
    }

    /// Checks a range that must be as it was.
    pub(super) fn check_kept(&self, offset: usize, len: usize) -> Result<()> {
        let changed = self.memory.first_difference(offset, len, pattern);
        check_eq!(changed, None, "offset of lost data");
        Ok(())
    }

    /// Checks a range of which every page may be zeroes or as it was; returns the pages of zeroes.
    pub(super) fn check_reported(&self, offset: usize, len: usize) -> Result<u64> {
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

    pub(super) fn finish(mut self) -> CaseResult {
        self.vm.check_law()?;
        check_vm_works(&mut self.vm)?;
        Ok(Verdict::Pass)
    }
}

pub(super) fn report(gpa: u64, bytes: u64) -> Call {
    Call { op: Operation::FREE_PAGES, arg: [gpa, bytes] }
}

/// KiB of anonymous memory this process has.
pub(super) fn rss_anon() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let value = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(value.ok_or("no RssAnon in /proc/self/status")?.parse()?)
}

/// Checks that this process has lost about this much anonymous memory.
pub(super) fn check_fell(before: u64, bytes: usize) -> Result<()> {
    let now = rss_anon()?;
    let fell = before.saturating_sub(now) * 1024;
    // What the kernel counts lags by some pages for each CPU.
    let expected = bytes as u64 - bytes as u64 / 8;
    check!(fell >= expected, "RssAnon fell by {fell} from {before} KiB, {bytes} were reported");
    Ok(())
}

/// Checks that each report gets this status, and that no data are lost.
pub(super) fn check_refused(setup: &mut Setup, error: Error, ranges: &[(u64, u64)]) -> Result<()> {
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

/// Reports all of the memory, which the host must leave alone and count as such.
pub(super) fn check_skipped(setup: &mut Setup, counter: &str) -> Result<()> {
    check_kept_as(setup, counter, &[0, -(Error::Memory as i32)])
}

/// The same, of memory that is better reported again.
pub(super) fn check_postponed(setup: &mut Setup, counter: &str) -> Result<()> {
    check_kept_as(setup, counter, &[-(Error::Busy as i32)])
}

fn check_kept_as(setup: &mut Setup, counter: &str, allowed: &[i32]) -> Result<()> {
    let before = setup.vm.bridge_stats()?;
    let len = setup.memory.len();
    let status = setup.report(PLACE, len as u64)?;
    check!(allowed.contains(&status), "status {status} of memory that is skipped");
    let after = setup.vm.bridge_stats()?;
    let pages = (len / PAGE) as u64;
    check_eq!(after.since(&before, counter)?, pages, "{counter}");
    check_eq!(after.since(&before, "merged_pages")?, 0, "merged_pages");
    setup.check_kept(0, len)
}
