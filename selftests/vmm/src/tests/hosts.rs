// SPDX-License-Identifier: GPL-2.0

//! What hosts do with memory beside giving it to guests: limits, nodes, huge pages by themselves, locks; and hosts
//! where less can be seen or done. Whether pages are given up is seen in the memory itself: debugfs is not needed.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;

use dlh_abi::Function;

use super::processes;
use super::reporting::{pattern, with_bridge, Entry, Setup, MIB, PAGE_BYTES, PLACE};
use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, HUGE_PAGE, PAGE};
use crate::ring::NOP;
use crate::stats::NoDebugfs;
use crate::thread::{wait_until, PATIENCE};
use crate::vcpu::Exit;

const GIB: usize = 1 << 30;

pub(super) fn cases() -> Vec<Case> {
    const CASES: &[Entry] = &[
        ("private anonymous memory is given up", || plain(Backing::Anonymous)),
        ("shared memory is given up", || plain(Backing::SharedMemfd)),
        ("preallocated memory of one node comes back from there", node),
        ("a ring whose memory is looked after by NUMA balancing", balanced),
        ("khugepaged, with its defaults, after reports of single pages", khugepaged),
        ("memory that is locked as it comes is left alone", locked_on_fault),
        ("a guest of 256 GiB that are mostly not there", sparse),
    ];
    const LAST: &[Entry] = &[("reports are served where the kernel is locked down", lockdown)];
    [with_bridge(CASES), with_bridge(processes::CASES), with_bridge(LAST)]
        .into_iter()
        .flatten()
        .collect()
}

/// Checks, by the memory alone, that a range is there, is given up when it is reported, and can be used again; and
/// that what is around it stays as it was. The memory is as [`Setup::new`] fills it.
pub(super) fn check_given(setup: &mut Setup, offset: usize, len: usize) -> Result<()> {
    let memory = setup.memory.clone();
    check_eq!(memory.resident(offset, len)?, len / PAGE, "pages that are there before the report");
    check_eq!(setup.report(PLACE + offset as u64, len as u64)?, 0, "status");
    // First of all: to look at what is not there brings it back.
    check_eq!(memory.resident(offset, len)?, 0, "pages that are there after the report");
    check_eq!(memory.first_difference(offset, len, |_| 0), None, "what is not zero");
    setup.check_kept(0, offset)?;
    setup.check_kept(offset + len, memory.len() - offset - len)?;
    setup.vm.vcpus[0].store(PLACE + offset as u64 + 8, 0x5a5a)?;
    let seen = memory.word32(offset + 8).load(Ordering::SeqCst);
    check_eq!(seen, 0x5a5a, "what the VMM reads where the guest wrote");
    Ok(())
}

/// Checks that the ring goes on, by what the guest sees of it.
pub(super) fn check_ring(mut setup: Setup) -> CaseResult {
    setup.ring.push(&NOP, 5)?;
    setup.vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(setup.ring.done(), setup.ring.tail(), "done after 5 entries and an exit");
    check_eq!(setup.ring.declined(), 0, "calls that were declined");
    let down = setup.vm.hypercall(0, Function::RingTeardown as u64, setup.ring.id(), 0, 0)?;
    check_eq!(down, 0, "taking the ring down");
    Ok(Verdict::Pass)
}

fn plain(backing: Backing) -> CaseResult {
    let mut setup = Setup::new(Mapping::new(backing, 10 * MIB)?)?;
    check_given(&mut setup, MIB, 8 * MIB)?;
    check_ring(setup)
}

/// The nodes whose memory is bound to; the last one, which is not that of the only CPU.
fn last_node() -> Result<Option<u32>> {
    let mut last = 0;
    for node in 1..64 {
        if Path::new(&format!("/sys/devices/system/node/node{node}")).exists() {
            last = node;
        }
    }
    Ok((last != 0).then_some(last))
}

fn node() -> CaseResult {
    let Some(node) = last_node()? else {
        return Ok(Verdict::Skip("the host has one node".into()));
    };
    for backing in [Backing::Anonymous, Backing::SharedMemfd] {
        let mapping = Mapping::new(backing, 6 * MIB)?;
        mapping.bind_to_node(node)?;
        mapping.populate()?;
        let mut setup = Setup::new(mapping)?;
        let memory = setup.memory.clone();
        check_eq!(memory.node_of(MIB)?, node as i32, "node of what was preallocated");
        check_given(&mut setup, MIB, 4 * MIB)?;
        // The first page is back already.
        for at in [MIB, 3 * MIB, 5 * MIB - PAGE] {
            setup.vm.vcpus[0].store(PLACE + at as u64, 7)?;
            check_eq!(memory.node_of(at)?, node as i32, "node of what the guest uses again");
        }
        check_ring(setup)?;
    }
    Ok(Verdict::Pass)
}

/// How many page faults NUMA balancing has made.
fn hint_faults() -> Result<u64> {
    let counters = fs::read_to_string("/proc/vmstat")?;
    let found = counters.lines().find_map(|line| line.strip_prefix("numa_hint_faults "));
    Ok(found.ok_or("no numa_hint_faults in /proc/vmstat")?.parse()?)
}

/// NUMA balancing takes the access to pages away, all the time here, to see who misses it.
fn balanced() -> CaseResult {
    const SWITCH: &str = "/proc/sys/kernel/numa_balancing";
    const PACE: &str = "/sys/kernel/debug/sched/numa_balancing";
    const ENOUGH: u64 = 500;
    if last_node()?.is_none() {
        return Ok(Verdict::Skip("the host has one node".into()));
    }
    if !Path::new(PACE).exists() {
        return Err(NoDebugfs.into());
    }
    let files = [SWITCH.to_owned()].into_iter().chain(
        ["scan_delay_ms", "scan_period_min_ms", "scan_period_max_ms"]
            .map(|f| format!("{PACE}/{f}")),
    );
    let mut usual = Vec::new();
    for file in files {
        usual.push((fs::read_to_string(&file)?, file.clone()));
        fs::write(&file, "1")?;
    }
    let outcome = while_balanced(ENOUGH);
    for (value, file) in usual.into_iter().rev() {
        fs::write(file, value)?;
    }
    outcome
}

fn while_balanced(enough: u64) -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::Anonymous, 2 * MIB)?)?;
    let before = hint_faults()?;
    let mut laps = 0;
    while hint_faults()? - before < enough {
        setup.ring.push(&NOP, 3)?;
        setup.vm.vcpus[0].exit(Exit::Pio)?;
        let shown = || setup.ring.done() == setup.ring.tail();
        check!(
            shown(),
            "after {laps} laps done is {}, not {}",
            setup.ring.done(),
            setup.ring.tail()
        );
        laps += 1;
    }
    println!("# {laps} laps, {enough} page faults");
    check_given(&mut setup, MIB, MIB / 2)?;
    check_ring(setup)
}

/// KiB of this process's memory that are in transparent huge pages.
fn huge_kib() -> Result<u64> {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup")?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    let value = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(value.ok_or("no AnonHugePages in /proc/self/smaps_rollup")?.parse()?)
}

fn khugepaged() -> CaseResult {
    const CONTROL: &str = "/sys/kernel/mm/transparent_hugepage";
    if fs::read_to_string(format!("{CONTROL}/enabled"))?.contains("[never]") {
        return Ok(Verdict::Skip("no transparent huge pages here".into()));
    }
    let most = fs::read_to_string(format!("{CONTROL}/khugepaged/max_ptes_none"))?;
    check_eq!(most.trim(), "511", "max_ptes_none, of which this is about the default");
    let len = 4 * HUGE_PAGE;
    let mut setup = Setup::new(Mapping::new(Backing::Anonymous, len)?)?;
    let memory = setup.memory.clone();
    let reported = |at: usize| at / PAGE % 2 == 1;
    for page in (0..len).step_by(PAGE).filter(|&page| reported(page)) {
        check_eq!(setup.report(PLACE + page as u64, PAGE_BYTES)?, 0, "status");
    }
    check_eq!(memory.resident(0, len)?, len / PAGE / 2, "pages that are there after the reports");
    let before = huge_kib()?;
    memory.want_huge_pages()?;
    // Sooner than every 10 s; what it does is its default.
    let pause = format!("{CONTROL}/khugepaged/scan_sleep_millisecs");
    let usual = fs::read_to_string(&pause)?;
    fs::write(&pause, "20")?;
    let expected = before + len as u64 / 1024;
    let done = wait_until(PATIENCE, "huge pages in place of small ones", || {
        huge_kib().is_ok_and(|now| now >= expected)
    });
    fs::write(&pause, usual)?;
    done?;
    // It has filled up what was given up, with zeroes.
    check_eq!(memory.resident(0, len)?, len / PAGE, "pages that are there after khugepaged");
    let word = |at: usize| if reported(at) { 0 } else { pattern(at) };
    check_eq!(
        memory.first_difference(0, len, word),
        None,
        "what khugepaged, or a report, has lost"
    );
    // All of that is the guest's, to use and to report.
    memory.fill(0, len, pattern);
    check_given(&mut setup, HUGE_PAGE, 2 * HUGE_PAGE)?;
    check_ring(setup)
}

fn locked_on_fault() -> CaseResult {
    let (len, used) = (4 * MIB, 2 * MIB);
    let mapping = Mapping::new(Backing::Anonymous, len)?;
    mapping.fill(0, used / 2, pattern);
    mapping.lock_on_fault()?;
    mapping.fill(used / 2, used / 2, pattern);
    let mut setup = Setup::unfilled(mapping)?;
    let memory = setup.memory.clone();
    check_eq!(memory.resident(0, len)?, used / PAGE, "pages that are there");
    check_eq!(setup.report(PLACE, len as u64)?, 0, "status");
    check_eq!(memory.resident(0, len)?, used / PAGE, "pages that are there after the report");
    setup.check_kept(0, used)?;
    setup.vm.vcpus[0].store(PLACE + used as u64, 7)?;
    check_eq!(memory.resident(0, len)?, used / PAGE + 1, "pages that are there after a store");
    check_ring(setup)
}

fn sparse() -> CaseResult {
    let len = 256 * GIB;
    let mut setup = Setup::unfilled(Mapping::new(Backing::Sparse, len)?)?;
    let memory = setup.memory.clone();
    // What there is lies far apart, one piece at each end.
    let size = 2 * MIB;
    let places = [0, GIB - size / 2, 100 * GIB, 255 * GIB, len - size];
    for place in places {
        memory.fill(place, size, pattern);
    }
    // The first and the last page of each stay, and what lies around it is not there.
    for place in places {
        let (from, bytes) = (place + PAGE, size - 2 * PAGE);
        check_eq!(setup.report(PLACE + from as u64, bytes as u64)?, 0, "status at {place:#x}");
        check_eq!(memory.resident(place, size)?, 2, "pages that are there at {place:#x}");
        check_eq!(memory.first_difference(from, bytes, |_| 0), None, "what is not zero");
        for page in [place, place + size - PAGE] {
            check_eq!(memory.first_difference(page, PAGE, pattern), None, "what was lost");
        }
    }
    // All of a piece of it, with next to nothing in it.
    check_eq!(setup.report(PLACE + 100 * GIB as u64, GIB as u64)?, 0, "status of 1 GiB");
    check_eq!(memory.resident(100 * GIB, GIB)?, 0, "pages that are there in 1 GiB");
    setup.vm.vcpus[0].store(PLACE + (255 * GIB + PAGE) as u64, 7)?;
    check_eq!(memory.word32(255 * GIB + PAGE).load(Ordering::SeqCst), 7, "what the guest wrote");
    check_ring(setup)
}

fn lockdown() -> CaseResult {
    const SWITCH: &str = "/sys/kernel/security/lockdown";
    // It may be mounted already.
    let _ = Command::new("mount")
        .args(["-t", "securityfs", "none", "/sys/kernel/security"])
        .status()?;
    if !Path::new(SWITCH).exists() {
        return Ok(Verdict::Skip("this kernel cannot be locked down".into()));
    }
    let mut before = Setup::new(Mapping::new(Backing::Anonymous, 4 * MIB)?)?;
    check_given(&mut before, MIB, MIB)?;
    fs::write(SWITCH, "confidentiality")?;
    // That it is, is shown by a module without a signature.
    let insmod = Command::new("insmod").arg("build/modules/dlh_guest.ko").output()?;
    let said = String::from_utf8_lossy(&insmod.stderr).into_owned();
    check!(said.contains("not permitted"), "insmod of an unsigned module: {said}");
    // A VM of before, and one whose probes and directories are made now.
    before.memory.fill(0, 4 * MIB, pattern);
    check_given(&mut before, 2 * MIB, MIB)?;
    check_ring(before)?;
    processes::wait_known(std::process::id(), 0)?;
    let mut after = Setup::new(Mapping::new(Backing::SharedMemfd, 4 * MIB)?)?;
    check_given(&mut after, MIB, 2 * MIB)?;
    // Root's word is heard as ever.
    processes::choose(std::process::id(), "no")?;
    let status = i64::from(after.report(PLACE, MIB as u64)?);
    check_eq!(status, dlh_abi::Error::Busy.to_rax(), "status after a no");
    processes::choose(std::process::id(), "default")?;
    match after.report(PLACE, MIB as u64)? {
        0 => check_ring_declined(after),
        status => failed(format!("status {status} after a default")),
    }
}

/// As [`check_ring`], where one call was declined.
fn check_ring_declined(mut setup: Setup) -> CaseResult {
    check_eq!(setup.ring.declined(), 1, "calls that were declined");
    setup.ring.push(&NOP, 5)?;
    setup.vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(setup.ring.done(), setup.ring.tail(), "done after 5 entries and an exit");
    Ok(Verdict::Pass)
}
