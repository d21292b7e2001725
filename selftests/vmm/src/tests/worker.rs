// SPDX-License-Identifier: GPL-2.0

//! The worker of a VM: what it may use, how root bounds that, and what becomes of more than it can do. The
//! bridge is inserted with `merge=share worker_cpu_percent=10`.

use std::fs;
use std::time::{Duration, Instant};

use dlh_abi::Error;

use super::reporting::{report, with_bridge, Entry, Setup, MIB, PAGE_BYTES, PLACE};
use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result};
use crate::memory::{Backing, Mapping, PAGE};
use crate::thread::wait_until;
use crate::vcpu::Exit;

/// Half more than the share that the module is inserted with.
const MOST_PERCENT: u128 = 15;
/// CPU time of the worker after which its share is judged.
const ENOUGH: Duration = Duration::from_millis(1200);

pub(super) fn cases() -> Vec<Case> {
    const CASES: &[Entry] = &[
        ("root can put the worker into a cgroup", cgroup),
        ("the worker uses nothing while nothing is reported", idle),
        ("the worker keeps to its share of a CPU", share_of_cpu),
        ("more than the worker can do is declined, and taken later", overload),
        ("the zero page is mapped at once", zero_page),
    ];
    with_bridge(CASES)
}

/// The folder in `/proc` of the only worker for this process. Those of VMs that have just ended may be there still.
fn worker() -> Result<String> {
    let name = format!("ksm_bridge/{}", std::process::id());
    let find = || -> Result<Vec<String>> {
        let mut found = Vec::new();
        for process in fs::read_dir("/proc")? {
            let process = process?.path();
            if fs::read_to_string(process.join("comm")).is_ok_and(|comm| comm.trim() == name) {
                found.push(process.display().to_string());
            }
        }
        Ok(found)
    };
    wait_until(Duration::from_secs(60), "there is one worker for this process", || {
        find().is_ok_and(|found| found.len() == 1)
    })?;
    Ok(find()?.pop().ok_or("the worker has gone")?)
}

/// CPU time of a thread.
fn cpu_time(task: &str) -> Result<Duration> {
    let stat = fs::read_to_string(format!("{task}/schedstat"))?;
    let nanoseconds = stat.split_whitespace().next().ok_or("schedstat is empty")?.parse()?;
    Ok(Duration::from_nanos(nanoseconds))
}

/// It is a thread of the kernel's, which root may move.
fn cgroup() -> CaseResult {
    const GROUP: &str = "/sys/fs/cgroup/dlh-worker";
    let mut setup = Setup::anonymous(8 * MIB)?;
    let task = worker()?;
    let (its, id) = (format!("{task}/cgroup"), task.trim_start_matches("/proc/"));
    check_eq!(fs::read_to_string(&its)?, "0::/\n", "cgroup of the worker");
    fs::create_dir(GROUP)?;
    let moved = fs::write(format!("{GROUP}/cgroup.procs"), id);
    let group = fs::read_to_string(&its);
    let used = || -> Result<u64> {
        let stat = fs::read_to_string(format!("{GROUP}/cpu.stat"))?;
        let line = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
        Ok(line.ok_or("no usage_usec in cpu.stat")?.trim().parse()?)
    };
    let before = used();
    let status = setup.report(PLACE, 8 * MIB as u64);
    let after = used();
    fs::write("/sys/fs/cgroup/cgroup.procs", id)?;
    fs::remove_dir(GROUP)?;
    moved?;
    check_eq!(group?, "0::/dlh-worker\n", "cgroup of the worker that was moved");
    check_eq!(status?, 0, "status");
    check!(after? > before?, "the group is not charged for the worker's time");
    setup.finish()
}

fn idle() -> CaseResult {
    let setup = Setup::anonymous(MIB)?;
    let task = worker()?;
    // It has said that it is done, and may still be on its way to sleep.
    let mut before = cpu_time(&task)?;
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let now = cpu_time(&task)?;
        if std::mem::replace(&mut before, now) == now {
            break;
        }
    }
    std::thread::sleep(Duration::from_secs(2));
    check_eq!(cpu_time(&task)?, before, "CPU time of the worker");
    setup.finish()
}

fn share_of_cpu() -> CaseResult {
    let len = 8 * MIB;
    let mut setup = Setup::anonymous(len)?;
    let task = worker()?;
    let (began, before) = (Instant::now(), cpu_time(&task)?);
    let (mut rounds, mut declined) = (0, 0);
    // It is kept from work after what it has used: the longest round may be the last.
    let (mut last, mut longest) = (before, Duration::ZERO);
    while declined == 0 || cpu_time(&task)? - before < ENOUGH {
        // There is something to release each time.
        for page in (0..len).step_by(PAGE) {
            setup.memory.word(page).store(1, std::sync::atomic::Ordering::Relaxed);
        }
        match setup.report(PLACE, len as u64)? {
            0 => {
                rounds += 1;
                let now = cpu_time(&task)?;
                longest = longest.max(now - last);
                last = now;
            }
            status if i64::from(status) == Error::Busy.to_rax() => {
                declined += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            status => return failed(format!("status {status}")),
        }
    }
    let used = cpu_time(&task)? - before;
    let percent = 100 * (used - longest).as_millis() / began.elapsed().as_millis();
    println!("# {percent} % of a CPU beside {longest:?}, {rounds} rounds, {declined} declined");
    check!(percent < MOST_PERCENT, "the worker has used {percent} % of a CPU");
    // What it was ahead by is paid for, for the cases that follow.
    while i64::from(setup.report(PLACE, PAGE_BYTES)?) == Error::Busy.to_rax() {
        std::thread::sleep(Duration::from_millis(50));
    }
    setup.finish()
}

fn overload() -> CaseResult {
    let len = 64 * MIB;
    let mut setup = Setup::new(Mapping::new(Backing::Anonymous, len)?)?;
    let before = setup.vm.bridge_stats()?;
    // Four times as many as may wait.
    let vm = &mut setup.vm;
    let mut ring = crate::ring::Ring::set_up(vm, 0, crate::vm::BASE, 1024, 0)?;
    let count = 1024;
    let mut last = 0;
    for page in 0..count {
        last = ring.place(&report(PLACE + (2 * page * PAGE) as u64, PAGE_BYTES))?;
    }
    ring.publish();
    vm.vcpus[0].exit(Exit::Pio)?;
    crate::thread::wait_until(crate::thread::PATIENCE, "done has passed all", || {
        dlh_abi::has_passed(ring.done(), last)
    })?;
    let first = last.wrapping_add(1).wrapping_sub(count as u32);
    let declined: Vec<_> =
        (0..count).filter(|&page| ring.status(first.wrapping_add(page as u32)) != 0).collect();
    println!("# {} of {count} reports were declined", declined.len());
    check!(!declined.is_empty(), "nothing was declined");
    check!(declined.len() < count, "everything was declined");
    let busy = vm.bridge_stats()?.since(&before, "busy")?;
    check_eq!(busy as usize, declined.len(), "busy");
    for page in &declined {
        let at = 2 * page * PAGE;
        let kept = setup.memory.first_difference(at, PAGE, super::reporting::pattern);
        check_eq!(kept, None, "what has changed in a page whose report was declined");
    }
    for page in declined {
        let mut status = Error::Busy.to_rax();
        let began = Instant::now();
        while status == Error::Busy.to_rax() && began.elapsed() < crate::thread::PATIENCE {
            let position = ring.place(&report(PLACE + (2 * page * PAGE) as u64, PAGE_BYTES))?;
            ring.publish();
            setup.vm.vcpus[0].exit(Exit::Cpuid)?;
            crate::thread::wait_until(crate::thread::PATIENCE, "done has passed it", || {
                dlh_abi::has_passed(ring.done(), position)
            })?;
            status = i64::from(ring.status(position));
            if status != 0 {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        check_eq!(status, 0, "status of a report that was declined before");
    }
    for page in 0..count {
        let at = 2 * page * PAGE;
        check_eq!(setup.memory.first_difference(at, PAGE, |_| 0), None, "what is not zero");
        setup.check_kept(at + PAGE, PAGE)?;
    }
    setup.ring = ring;
    setup.finish()
}

/// Page faults of this process that took no reading.
fn minor_faults() -> Result<u64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let rest = stat.rsplit_once(')').ok_or("no name in /proc/self/stat")?.1;
    Ok(rest.split_whitespace().nth(7).ok_or("/proc/self/stat is too short")?.parse()?)
}

fn zero_page() -> CaseResult {
    let len = 8 * MIB;
    let mut setup = Setup::anonymous(len)?;
    check_eq!(setup.report(PLACE, len as u64)?, 0, "status");
    let before = minor_faults()?;
    check_eq!(setup.memory.first_difference(0, len, |_| 0), None, "what is not zero");
    let faults = minor_faults()? - before;
    println!("# {faults} page faults to read {} pages", len / PAGE);
    check!(faults < (len / PAGE / 16) as u64, "{faults} page faults: the zero page was not there");
    // It is nobody's: what is written is a copy.
    setup.memory.fill(0, MIB, super::reporting::pattern);
    check_eq!(setup.memory.first_difference(MIB, len - MIB, |_| 0), None, "what is not zero");
    setup.check_kept(0, MIB)?;
    setup.finish()
}
