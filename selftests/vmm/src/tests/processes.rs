// SPDX-License-Identifier: GPL-2.0

//! What VMMs do as processes: have several VMs, fork, dump core, and live in a cgroup with hardly more memory than they
//! use. Debugfs is not needed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use dlh_abi::Error;

use super::hosts::{check_given, check_ring};
use super::reporting::{pattern, Entry, Setup, MIB, PLACE};
use crate::ktap::{check, check_eq, failed, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, PAGE};
use crate::thread::wait_until;

/// Generous: for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) const CASES: &[Entry] = &[
    ("two VMs in one process", two),
    ("a descriptor that a fork inherits, and memory that it shares", || forked(Backing::Anonymous)),
    ("a descriptor that a fork inherits, and shared memory", || forked(Backing::SharedMemfd)),
    ("memory.max just above the footprint, private anonymous memory", || limited("anonymous")),
    ("memory.max just above the footprint, shared memory", || limited("memfd")),
    ("a VMM dumps core in the middle of reports", dumps_core),
];

/// The directories in sysfs of the VMs of a process.
fn directories(pid: u32) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/kernel/ksm_bridge")? {
        let path = entry?.path();
        // It may go meanwhile.
        let of = fs::read_to_string(path.join("vmm_pid")).unwrap_or_default();
        if of.trim() == pid.to_string() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Waits until a process has as many VMs that the bridge knows.
pub(super) fn wait_known(pid: u32, count: usize) -> Result<()> {
    wait_until(PATIENCE, &format!("{count} VMs of process {pid} are known"), || {
        directories(pid).is_ok_and(|found| found.len() == count)
    })
}

/// Says of the last VM of a process whether its memory may be given up.
pub(super) fn choose(pid: u32, choice: &str) -> Result<()> {
    match directories(pid)?.last() {
        Some(path) => Ok(fs::write(path.join("allow"), choice)?),
        None => failed(format!("process {pid} has no VM that is known")),
    }
}

fn two() -> CaseResult {
    let pid = std::process::id();
    // Those of the cases before.
    wait_known(pid, 0)?;
    let mut one = Setup::new(Mapping::new(Backing::Anonymous, 4 * MIB)?)?;
    let first = directories(pid)?;
    let mut other = Setup::new(Mapping::new(Backing::SharedMemfd, 4 * MIB)?)?;
    let both = directories(pid)?;
    check_eq!((first.len(), both.len()), (1, 2), "directories: {first:?}, then {both:?}");
    check_given(&mut one, 0, MIB)?;
    other.check_kept(0, 4 * MIB)?;
    check_given(&mut other, 0, 2 * MIB)?;
    one.check_kept(MIB, 3 * MIB)?;
    // Both at once: each to its own.
    let positions =
        [&mut one, &mut other].map(|setup| setup.submit(PLACE + 2 * MIB as u64, MIB as u64));
    for (setup, position) in [&mut one, &mut other].into_iter().zip(positions) {
        let position = position?;
        setup.vm.vcpus[0].exit(crate::vcpu::Exit::Pio)?;
        setup.wait(position)?;
        check_eq!(setup.ring.status(position), 0, "status");
        check_eq!(setup.memory.resident(2 * MIB, MIB)?, 0, "pages that are there");
        setup.check_kept(3 * MIB, MIB)?;
    }
    // What is said of one is not said of the other.
    fs::write(first[0].join("allow"), "no")?;
    let busy = i64::from(one.report(PLACE + 3 * MIB as u64, MIB as u64)?);
    check_eq!(busy, Error::Busy.to_rax(), "status of the VM that may not");
    one.check_kept(3 * MIB, MIB)?;
    check_eq!(other.report(PLACE + 3 * MIB as u64, MIB as u64)?, 0, "status of the other one");
    drop(one);
    wait_known(pid, 1)?;
    check_ring(other)
}

/// Writes to, or reads from, a pipe by its descriptors only: a child of a fork does no more than that.
fn pipe() -> Result<[i32; 2]> {
    let mut ends = [0; 2];
    // SAFETY: Two words for two descriptors.
    if unsafe { libc::pipe(ends.as_mut_ptr()) } < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(ends)
}

/// A copy of the VMM does not have the VM, but shares its memory: what is private stays as it was there, what is
/// shared goes there, too. The VM lasts until the copy has gone.
fn forked(backing: Backing) -> CaseResult {
    const RUN: libc::c_ulong = 0xae80;
    let pid = std::process::id();
    wait_known(pid, 0)?;
    let mut setup = Setup::new(Mapping::new(backing, 4 * MIB)?)?;
    let shared = backing == Backing::SharedMemfd;
    let [hear, tell] = pipe()?;
    let vcpu = setup.vm.vcpus[0].descriptor();
    let memory = setup.memory.clone();
    // SAFETY: This process has one thread but for the bridge's, and the child makes system calls and reads memory.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut byte = 0u8;
        // SAFETY: One byte each time; the descriptor is a vCPU's, which takes no argument for this.
        unsafe {
            libc::read(hear, (&raw mut byte).cast(), 1);
            let refused = libc::ioctl(vcpu, RUN, 0) < 0 && *libc::__errno_location() == libc::EIO;
            let word = |at: usize| if shared && at < 2 * MIB { 0 } else { pattern(at) };
            let right = memory.first_difference(0, 4 * MIB, word).is_none();
            if !refused || !right {
                libc::_exit(1 + i32::from(refused) + 2 * i32::from(right));
            }
            // Keeps the VM until it is told to go, and says that all was well.
            libc::read(hear, (&raw mut byte).cast(), 1);
            libc::_exit(0);
        }
    }
    check!(child > 0, "fork gave {child}");
    // Whatever happens here, the child must not outlive the case.
    let outcome = parent_of(&mut setup, shared, tell, pid);
    drop(setup);
    let known = if outcome.is_ok() { wait_known(pid, 1) } else { Ok(()) };
    let mut status = 0;
    // SAFETY: Closes our ends, which nobody else uses, and waits for our own child.
    unsafe {
        libc::write(tell, b"x".as_ptr().cast(), 1);
        libc::close(tell);
        libc::close(hear);
        libc::waitpid(child, &raw mut status, 0);
    }
    outcome?;
    known?;
    let ended = ExitStatus::from_raw(status);
    check_eq!(ended.code(), Some(0), "how the copy ended (2: its memory, 3: KVM_RUN)");
    wait_known(pid, 0)?;
    Ok(Verdict::Pass)
}

fn parent_of(setup: &mut Setup, shared: bool, tell: i32, pid: u32) -> Result<()> {
    check_eq!(directories(pid)?.len(), 1, "VMs that are known");
    check_eq!(setup.report(PLACE, 2 * MIB as u64)?, 0, "status");
    check_eq!(setup.memory.resident(0, 2 * MIB)?, 0, "pages that are there after the report");
    if !shared {
        check_eq!(setup.memory.first_difference(0, 2 * MIB, |_| 0), None, "what is not zero");
    }
    setup.check_kept(2 * MIB, 2 * MIB)?;
    // SAFETY: One byte to our own pipe.
    check_eq!(unsafe { libc::write(tell, b"x".as_ptr().cast(), 1) }, 1, "bytes told to the copy");
    Ok(())
}

/// A program that this one runs, with a line to and from it; killed at the end.
struct Helper {
    process: Child,
    says: BufReader<ChildStdout>,
}

impl Helper {
    fn start(
        arguments: &[&str],
        begin: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        // SAFETY: What is done between fork and exec is a write to an open file, and setting a limit.
        unsafe { command.pre_exec(begin) };
        let mut process = command.spawn()?;
        let says = BufReader::new(process.stdout.take().ok_or("no pipe")?);
        Ok(Self { process, says })
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }

    fn tell(&mut self) -> Result<()> {
        Ok(self.process.stdin.as_mut().ok_or("no pipe")?.write_all(b"\n")?)
    }

    /// The next line; empty if it has ended.
    fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        self.says.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A cgroup, removed at the end; the process in it must be gone by then.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        let path = root.join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn number(&self, file: &str) -> Result<u64> {
        Ok(fs::read_to_string(self.0.join(file))?.trim().parse()?)
    }

    /// How often something has happened, by its name in a file of counters.
    fn event(&self, name: &str) -> Result<u64> {
        let events = fs::read_to_string(self.0.join("memory.events"))?;
        let found = events.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(found.ok_or("no such event")?.parse()?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = wait_until(PATIENCE, "the cgroup can go", || fs::remove_dir(&self.0).is_ok());
    }
}

/// A guest goes through eight times the memory that its VMM may have, and reports each piece before it uses the next.
fn limited(kind: &str) -> CaseResult {
    const STEP: usize = 8;
    const ROOM: u64 = 3 << 20;
    let cgroup = Cgroup::new("limited")?;
    let procs = File::options().write(true).open(cgroup.0.join("cgroup.procs"))?;
    let (mib, step) = (8 * STEP, STEP);
    let mut vmm = Helper::start(
        &["sweep", kind, "--mib", &mib.to_string(), "--step", &step.to_string()],
        move || procs.write_all_at(b"0", 0),
    )?;
    check_eq!(vmm.hear()?, "ready", "what the VMM says");
    let before = cgroup.number("memory.current")?;
    let most = before + ((STEP as u64) << 20) + ROOM;
    fs::write(cgroup.0.join("memory.swap.max"), "0").ok();
    fs::write(cgroup.0.join("memory.max"), most.to_string())?;
    for lap in 0..3 {
        vmm.tell()?;
        let said = vmm.hear()?;
        let (killed, at_limit) = (cgroup.event("oom_kill")?, cgroup.event("max")?);
        println!("# lap {lap}: {said}; at the limit {at_limit} times, {before} bytes at first, {most} at most");
        check_eq!(
            (said.as_str(), killed),
            ("swept", 0),
            "what the VMM says, and how many were killed"
        );
    }
    drop(vmm);
    Ok(Verdict::Pass)
}

/// Whether all that the headers of a core file promise is there.
fn is_complete(core: &Path) -> Result<bool> {
    let mut file = File::open(core)?;
    let mut header = [0; 64];
    file.read_exact(&mut header)?;
    let word = |at: usize, len: usize, from: &[u8]| {
        from[at..at + len].iter().rev().fold(0u64, |word, &byte| (word << 8) | u64::from(byte))
    };
    let (offset, size, count) = (word(32, 8, &header), word(54, 2, &header), word(56, 2, &header));
    let mut end = 0;
    for index in 0..count {
        let mut segment = [0; 56];
        file.read_exact_at(&mut segment, offset + index * size)?;
        end = end.max(word(8, 8, &segment) + word(32, 8, &segment));
    }
    Ok(header[..4] == *b"\x7fELF" && count > 4 && end == file.metadata()?.len())
}

/// How many pages of what a tenant fills its memory with a core file has.
fn pages_in(core: &Path) -> Result<usize> {
    let bytes = fs::read(core)?;
    let is_page = |page: &[u8]| {
        let words =
            page.chunks(8).map(|w| w.iter().rev().fold(0u64, |v, &b| (v << 8) | u64::from(b)));
        let mut words = words.enumerate();
        let first = words.next().map_or(0, |(_, word)| word);
        first >> 63 == 1 && words.all(|(index, word)| word == first + 8 * index as u64)
    };
    Ok(bytes.chunks(PAGE).filter(|page| is_page(page)).count())
}

fn dumps_core() -> CaseResult {
    const PATTERN: &str = "/proc/sys/kernel/core_pattern";
    let usual = fs::read_to_string(PATTERN)?;
    fs::write(PATTERN, "/tmp/core.%p")?;
    // Before a report, right after it was asked for, later, and after a no: then all of the memory is still there.
    let rounds = [Some(0), Some(2), Some(20), Some(100), None];
    let outcome = rounds.into_iter().try_for_each(dump_core);
    fs::write(PATTERN, usual)?;
    outcome.map(|()| Verdict::Pass)
}

fn dump_core(delay_ms: Option<u64>) -> Result<()> {
    const MIB_EACH: usize = 4;
    let unlimited = || {
        let most = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: Sets a limit of the calling process.
        match unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const most) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    let mut vmm =
        Helper::start(&["tenant", "anonymous", "--mib", &MIB_EACH.to_string()], unlimited)?;
    let pid = vmm.pid();
    check_eq!(vmm.hear()?, "ready", "what the VMM says");
    vmm.tell()?;
    let pages = MIB_EACH * MIB / PAGE;
    check_eq!(vmm.hear()?, format!("0 {pages}"), "status, and pages given up");
    if delay_ms.is_none() {
        choose(pid, "no")?;
    }
    vmm.tell()?;
    match delay_ms {
        Some(delay) => std::thread::sleep(Duration::from_millis(delay)),
        None => check_eq!(vmm.hear()?, "-1109 0", "status, and pages given up, after a no"),
    }
    let began = Instant::now();
    // SAFETY: Sends a signal to our own child, which has not been waited for.
    unsafe { libc::kill(pid as i32, libc::SIGABRT) };
    let mut ended = None;
    while ended.is_none() && began.elapsed() < PATIENCE {
        ended = vmm.process.try_wait()?;
        std::thread::sleep(Duration::from_millis(5));
    }
    let Some(ended) = ended else { return failed("the VMM has not ended") };
    let core = PathBuf::from(format!("/tmp/core.{pid}"));
    check!(ended.core_dumped() && core.exists(), "the VMM ended without a core file: {ended}");
    let (complete, found) = (is_complete(&core)?, pages_in(&core)?);
    println!("# {delay_ms:?} ms: dumped in {:?}, {found} of {pages} pages filled", began.elapsed());
    fs::remove_file(&core)?;
    check!(complete, "the core file is not complete");
    check!(delay_ms.is_some() || found == pages, "{found} of {pages} pages in the core file");
    wait_known(pid, 0)
}
