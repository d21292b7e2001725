// SPDX-License-Identifier: GPL-2.0

//! What users may keep from going on, and whom that must not keep: a VMM that is stopped, a file or an address space
//! that is locked, more memory than can be released at once. Removes the modules at the end.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use dlh_abi::{Error, Function};

use super::puppet::{self, Puppet, Realtime, LEN};
use super::races::Victim;
use super::reporting::{report, with_bridge, Entry, Setup, MIB, PLACE};
use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, PAGE};
use crate::stats;
use crate::thread::{wait_until, with_vcpu};
use crate::vcpu::Exit;
use crate::vm::{Vm, VmConfig, BASE};

const GIB: usize = 1 << 30;
/// What the bridge takes on at once: [`MOST_PAGES`](../../../../../ksm-bridge/merger.rs).
const AT_ONCE: usize = GIB;
/// More than any machine of a test has: nothing of it is ever touched.
const SPARSE: usize = 128 * GIB;
/// For what an idle machine does at once.
const PATIENCE: Duration = Duration::from_secs(60);
/// The status of a report that is to be made again.
const BUSY: i64 = -(Error::Busy as i64);

pub(super) fn cases() -> Vec<Case> {
    const CASES: &[Entry] = &[
        ("what waits for the worker is bounded in pages", bounded),
        ("untouched memory of 128 GiB is released at once", sparse),
        ("KICK returns while others go on reporting 128 GiB", kick),
        ("a locked file keeps reports, and nobody else", locked_file),
        ("a locked address space keeps reports, and nobody else", locked_mappings),
        ("a stopped VMM keeps nobody", stopped),
        ("VMs of stopped VMMs end", buried),
        ("the modules can be removed while a VMM is stopped", removed),
    ];
    with_bridge(CASES)
}

/// A VM with memory of which nothing is touched.
fn sparse_setup() -> Result<Setup> {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    let slot = vm.add_memory(PLACE, Mapping::new(Backing::Sparse, SPARSE)?)?;
    let memory = vm.region(slot).mapping.clone();
    Setup::with_slot(vm, memory, slot)
}

/// The worker cannot run before the drain is over: there is one CPU, which the vCPU's thread keeps.
fn bounded() -> CaseResult {
    let mut setup = sparse_setup()?;
    // Bytes of the reports in one drain, and how many of them fit.
    let quarter = AT_ONCE / 4;
    let cases: [(&[usize], usize); 4] = [
        (&[quarter; 32], 4),
        (&[AT_ONCE, PAGE, PAGE], 1),
        (&[2 * AT_ONCE, quarter, PAGE], 1),
        (&[PAGE, AT_ONCE, PAGE], 2),
    ];
    for (sizes, fit) in cases {
        let before = setup.vm.bridge_stats()?;
        let mut positions = Vec::new();
        let mut gpa = PLACE;
        for &bytes in sizes {
            positions.push(setup.ring.place(&report(gpa, bytes as u64))?);
            gpa += bytes as u64;
        }
        setup.ring.publish();
        {
            let _realtime = Realtime::begin()?;
            setup.vm.vcpus[0].exit(Exit::Pio)?;
        }
        let accepted: Vec<_> =
            positions.iter().map(|&position| i64::from(setup.ring.status(position))).collect();
        check!(accepted.iter().all(|status| [0, BUSY].contains(status)), "{accepted:?}");
        let count = accepted.iter().filter(|&&status| status == 0).count();
        check_eq!(count, fit, "reports of {sizes:?} accepted ({accepted:?})");
        let after = setup.vm.bridge_stats()?;
        check_eq!(after.since(&before, "busy")?, (sizes.len() - fit) as u64, "busy");
    }
    setup.finish()
}

fn sparse() -> CaseResult {
    let mut setup = sparse_setup()?;
    for _ in 0..3 {
        let started = Instant::now();
        check_eq!(setup.report(PLACE, SPARSE as u64)?, 0, "status");
        println!("# {} ms", started.elapsed().as_millis());
    }
    let merged = setup.vm.bridge_stats()?.get("merged_pages")?;
    check!(merged >= 3 * (SPARSE / PAGE) as u64, "only {merged} pages were merged");
    setup.finish()
}

/// One vCPU reports as fast as it can, another one waits for what it sees of that.
fn kick() -> CaseResult {
    let mut setup = sparse_setup()?;
    let id = setup.ring.id();
    let mut other = setup.vm.vcpus.remove(1);
    let mut vcpu = setup.vm.vcpus.remove(0);
    let ring = &mut setup.ring;
    with_vcpu(
        &mut vcpu,
        |vcpu| {
            vcpu.flood(ring, &report(PLACE, SPARSE as u64), u64::MAX, |stop| {
                stop == crate::vcpu::Stop::Tick
            })
        },
        || {
            for _ in 0..5 {
                let started = Instant::now();
                let rax = other.hypercall(Function::Kick as u64, id, 0, 0)?;
                check_eq!(rax, 0, "KICK");
                println!("# {} ms", started.elapsed().as_millis());
            }
            Ok(())
        },
    )?;
    setup.vm.vcpus = vec![vcpu, other];
    setup.finish()
}

/// A write to a file that does not get on: it has the lock of the inode, and waits for a page that nobody delivers.
struct StuckWrite {
    armed: Option<std::os::fd::OwnedFd>,
    writer: Option<std::thread::JoinHandle<std::io::Result<usize>>>,
}

impl StuckWrite {
    fn begin(file: &Mapping) -> Result<Self> {
        let source = Mapping::new(Backing::Anonymous, PAGE)?;
        let armed = source.arm_userfaultfd()?;
        let mut file = std::fs::File::from(file.file()?.try_clone()?);
        let writer = std::thread::spawn(move || source.write_to(&mut file));
        let mut poll = libc::pollfd { fd: armed.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: One pollfd. It is ready once the writer has faulted, which it does under the lock.
        let ready = unsafe { libc::poll(&raw mut poll, 1, PATIENCE.as_millis() as i32) };
        check_eq!(ready, 1, "faults of the writer");
        Ok(Self { armed: Some(armed), writer: Some(writer) })
    }

    fn end(&mut self) -> Result<()> {
        // Nobody is responsible for the page any more, so it is one of zeroes.
        self.armed = None;
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let written = writer.join().map_err(|_| "the writer panicked")??;
        check_eq!(written, PAGE, "bytes written");
        Ok(())
    }
}

impl Drop for StuckWrite {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn skipped_busy(puppet: &Puppet) -> Result<u64> {
    stats::of_process("ksm_bridge", puppet.pid())?.get("skipped_busy")
}

fn locked_file() -> CaseResult {
    // One page more, which is written to.
    let file = Mapping::new(Backing::SharedMemfd, LEN + PAGE)?;
    let mut puppet = Puppet::start(Some(&file))?;
    let mut stuck = StuckWrite::begin(&file)?;
    for round in 1..=3 {
        check_eq!(puppet.ask("report")?, BUSY, "status while the file is locked");
        check_eq!(skipped_busy(&puppet)?, round * (LEN / PAGE) as u64, "skipped_busy");
        check_eq!(puppet.ask("released")?, 0, "pages released of the locked file");
    }
    bystander()?;
    stuck.end()?;
    check_eq!(puppet.ask("report")?, 0, "status when the file is free again");
    check_eq!(puppet.ask("released")?, (LEN / PAGE) as i64, "pages released");

    // Killed while the worker tries.
    puppet.ask("fill")?;
    let mut stuck = StuckWrite::begin(&file)?;
    puppet.tell("report")?;
    puppet.kill()?;
    forgotten(puppet.pid())?;
    stuck.end()?;
    Ok(Verdict::Pass)
}

/// Keeps the mmap lock of a process; see selftests/modules/vmm_holder.c.
struct Holder;

impl Holder {
    const PARAMETER: &str = "/sys/module/vmm_holder/parameters/mmap_lock";

    fn begin(pid: u32) -> Result<Self> {
        std::fs::File::options()
            .write(true)
            .open(Self::PARAMETER)?
            .write_all(pid.to_string().as_bytes())?;
        Ok(Self)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::PARAMETER, "0");
    }
}

fn locked_mappings() -> CaseResult {
    if !std::path::Path::new(Holder::PARAMETER).exists() {
        return Ok(Verdict::Skip("vmm_holder.ko is not there".into()));
    }
    let file = Mapping::new(Backing::SharedMemfd, LEN)?;
    for memory in [None, Some(&file)] {
        let mut puppet = Puppet::start(memory)?;
        // What it needs for that it has from now on.
        check_eq!(puppet.ask("report")?, 0, "status");
        puppet.ask("fill")?;
        let before = skipped_busy(&puppet)?;
        let holder = Holder::begin(puppet.pid())?;
        check_eq!(puppet.ask("report")?, BUSY, "status while the mappings are locked");
        check_eq!(skipped_busy(&puppet)? - before, (LEN / PAGE) as u64, "skipped_busy");
        bystander()?;
        drop(holder);
        check_eq!(puppet.ask("released")?, 0, "pages released of what was locked");
        check_eq!(puppet.ask("report")?, 0, "status afterwards");
        check_eq!(puppet.ask("released")?, (LEN / PAGE) as i64, "pages released");
    }
    Ok(Verdict::Pass)
}

/// Waits until the modules have no VM of a process any more.
fn forgotten(pid: u32) -> Result<()> {
    wait_until(PATIENCE, "the modules have forgotten the VM", || {
        ["kvm_dlh", "ksm_bridge"]
            .iter()
            .all(|module| stats::directories(module, pid).is_ok_and(|found| found.is_empty()))
    })
}

/// Another VM, which comes, reports, and goes.
fn bystander() -> Result<()> {
    let mut other = Puppet::start(None)?;
    check_eq!(other.ask("report")?, 0, "status of another VM's report");
    check_eq!(other.ask("released")?, (LEN / PAGE) as i64, "its pages released");
    check_eq!(other.ask("close")?, 0, "closing another VM");
    forgotten(other.pid())
}

fn executed(pid: u32) -> Result<u64> {
    stats::of_process("kvm_dlh", pid)?.get("executed")
}

fn stopped() -> CaseResult {
    // Above its rings.
    let victim = Victim::start(&report(BASE + 2 * MIB as u64, 2 * MIB as u64))?;
    let pid = victim.pid();
    for round in 0..8 {
        std::thread::sleep(Duration::from_millis(round));
        puppet::stop(pid)?;
        puppet::no_kernel_thread_waits()?;
        if round % 4 == 0 {
            bystander()?;
        }
        let before = executed(pid)?;
        puppet::signal(pid, libc::SIGCONT)?;
        wait_until(PATIENCE, "the VM goes on", || executed(pid).is_ok_and(|now| now > before))?;
    }
    puppet::stop(pid)?;
    drop(victim);
    forgotten(pid)?;
    Ok(Verdict::Pass)
}

fn buried() -> CaseResult {
    let mut puppets = Vec::new();
    for _ in 0..10 {
        let mut puppet = Puppet::start(None)?;
        puppet.tell("abandon")?;
        puppet::has_stopped(puppet.pid())?;
        puppets.push(puppet);
    }
    for puppet in &puppets {
        forgotten(puppet.pid())?;
        check!(puppet::states(puppet.pid()).chars().all(|state| state == 'T'), "it has gone on");
    }
    puppet::no_kernel_thread_waits()?;
    Ok(Verdict::Pass)
}

fn removed() -> CaseResult {
    let victim = Victim::start(&report(BASE + 2 * MIB as u64, 2 * MIB as u64))?;
    let idle = Puppet::start(None)?;
    for pid in [victim.pid(), idle.pid()] {
        puppet::stop(pid)?;
    }
    let mut rmmod = Command::new("rmmod").args(["ksm_bridge", "kvm_dlh"]).spawn()?;
    let started = Instant::now();
    let status = loop {
        if let Some(status) = rmmod.try_wait()? {
            break status;
        }
        if started.elapsed() > PATIENCE {
            return failed(format!("rmmod has not returned after {PATIENCE:?}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    check_eq!(status.code(), Some(0), "rmmod");
    for pid in [victim.pid(), idle.pid()] {
        puppet::signal(pid, libc::SIGCONT)?;
    }
    Ok(Verdict::Pass)
}
