// SPDX-License-Identifier: GPL-2.0

//! A VMM in a process of its own, that does what it is told: to be stopped, killed, and kept waiting.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use super::reporting::{pattern, Setup, MIB, PLACE};
use crate::ktap::{check, failed, Result};
use crate::memory::{Backing, Mapping};
use crate::thread::wait_until;

/// Bytes of the memory that it reports.
pub(super) const LEN: usize = 4 * MIB;
/// For what an idle machine does at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// The process: makes a VM with memory of its own, or of a file, and obeys, a word a line. Each answer is a line.
pub(crate) fn obey(memory: Option<PathBuf>) -> Result<()> {
    let mapping = match memory {
        Some(path) => {
            let file = std::fs::File::options().read(true).write(true).open(path)?;
            Mapping::of_file(file.into(), LEN)?
        }
        None => Mapping::new(Backing::Anonymous, LEN)?,
    };
    let mut setup = Some(Setup::new(mapping)?);
    println!("0");
    let mut line = String::with_capacity(64);
    let mut input = std::io::stdin().lock();
    while input.read_line(&mut line)? > 0 {
        match (line.trim(), setup.as_mut()) {
            // What becomes of a report of all of the memory.
            ("report", Some(setup)) => println!("{}", setup.report(PLACE, LEN as u64)?),
            // How many pages have been released; the others must be as they were.
            ("released", Some(setup)) => println!("{}", setup.check_reported(0, LEN)?),
            ("fill", Some(setup)) => {
                setup.memory.fill(0, LEN, pattern);
                println!("0");
            }
            ("close", Some(_)) => {
                setup = None;
                println!("0");
            }
            // With some more VMs, it ends them, and stops before anybody else of this CPU gets to run.
            ("abandon", Some(_)) => {
                let mut more = Vec::new();
                for _ in 0..3 {
                    more.push(Setup::anonymous(MIB)?);
                }
                let _realtime = Realtime::begin()?;
                drop((setup.take(), more));
                signal(std::process::id(), libc::SIGSTOP)?;
            }
            (word, _) => return failed(format!("what is {word:?}?")),
        }
        line.clear();
    }
    Ok(())
}

/// Such a process, which is killed at the latest when this is dropped.
pub(super) struct Puppet {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Puppet {
    /// Starts it, with the memory of a file of this process, or with its own. The host knows its VM when this returns.
    pub(super) fn start(memory: Option<&Mapping>) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("obey");
        if let Some(memory) = memory {
            let descriptor = memory.file()?.as_raw_fd();
            command.arg(format!("/proc/{}/fd/{descriptor}", std::process::id()));
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().ok_or("the child has no input")?;
        let output = BufReader::new(child.stdout.take().ok_or("the child has no output")?);
        let mut puppet = Self { child, input, output };
        puppet.answer()?;
        Ok(puppet)
    }

    /// Its pid.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it begin something.
    pub(super) fn tell(&mut self, what: &str) -> Result<()> {
        Ok(writeln!(self.input, "{what}")?)
    }

    /// What it says.
    pub(super) fn answer(&mut self) -> Result<i64> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        line.trim().parse().map_err(|_| format!("the child said {line:?}").into())
    }

    /// Has it do something, and waits for what it says.
    pub(super) fn ask(&mut self, what: &str) -> Result<i64> {
        self.tell(what)?;
        self.answer()
    }

    /// Kills it, and waits until it has ended.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        for _ in 0..PATIENCE.as_millis() {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        failed(format!("{PATIENCE:?} after SIGKILL it is still there: {:?}", states(self.pid())))
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // Without waiting: what cannot be killed must not keep those who look at it.
        let _ = self.child.kill();
    }
}

/// While this lives, the current thread keeps the CPU from all ordinary ones.
pub(super) struct Realtime;

impl Realtime {
    pub(super) fn begin() -> Result<Self> {
        Self::set(libc::SCHED_FIFO, 1)?;
        Ok(Self)
    }

    fn set(policy: i32, priority: i32) -> Result<()> {
        let param = libc::sched_param { sched_priority: priority };
        // SAFETY: Of the current thread.
        let error = unsafe { libc::sched_setscheduler(0, policy, &param) };
        check!(error == 0, "sched_setscheduler: {}", std::io::Error::last_os_error());
        Ok(())
    }
}

impl Drop for Realtime {
    fn drop(&mut self) {
        let _ = Self::set(libc::SCHED_OTHER, 0);
    }
}

/// The state of one task, as in `/proc`, and its flags.
fn state(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.nth(5)?.parse().ok()?))
}

/// The states of all threads of a process.
pub(super) fn states(pid: u32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
    stats.filter_map(|stat| Some(state(&stat)?.0)).collect()
}

/// Stops a process, and waits until all its threads have stopped in the ordinary way.
pub(super) fn stop(pid: u32) -> Result<()> {
    signal(pid, libc::SIGSTOP)?;
    has_stopped(pid)
}

/// Waits until all threads of a process have stopped in the ordinary way.
pub(super) fn has_stopped(pid: u32) -> Result<()> {
    wait_until(PATIENCE, "all threads of the VMM are stopped", || {
        let states = states(pid);
        !states.is_empty() && states.chars().all(|state| state == 'T')
    })
    .map_err(|error| format!("{error}: {}", states(pid)).into())
}

/// Sends a signal.
pub(super) fn signal(pid: u32, signal: i32) -> Result<()> {
    // SAFETY: Sends a signal, to a child of ours.
    let error = unsafe { libc::kill(pid as i32, signal) };
    check!(error == 0, "kill: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Waits for a moment in which no kernel thread is in an uninterruptible wait.
pub(super) fn no_kernel_thread_waits() -> Result<()> {
    const PF_KTHREAD: u64 = 0x20_0000;
    let waiting = || {
        let mut found = Vec::new();
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Ok(stat) = std::fs::read_to_string(process.path().join("stat")) else { continue };
            if state(&stat).is_some_and(|(s, flags)| s == 'D' && flags & PF_KTHREAD != 0) {
                found.push(stat.split(')').next().unwrap_or_default().to_owned());
            }
        }
        found
    };
    wait_until(PATIENCE, "no kernel thread is in D", || waiting().is_empty())
        .map_err(|error| format!("{error}: {:?}", waiting()).into())
}
