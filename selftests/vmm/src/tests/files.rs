// SPDX-License-Identifier: GPL-2.0

//! Files of the modules that somebody has open: they hold the module, outlive their VM, and hold nobody up. The
//! subject inserts and removes the modules by itself.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use super::reload::Modules;
use super::reporting::{pattern, Setup, MIB, PLACE};
use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, PAGE};
use crate::ring::NOP;
use crate::stats::{control, directories};
use crate::thread::wait_until;
use crate::vcpu::Exit;
use crate::vm::{Vm, VmConfig};

const MODULES: [&str; 2] = ["kvm_dlh", "ksm_bridge"];
/// The files of a VM, by module.
const FILES: [(&str, &str); 5] = [
    ("kvm_dlh", "stats"),
    ("kvm_dlh", "rings"),
    ("kvm_dlh", "operations"),
    ("ksm_bridge", "stats"),
    ("ksm_bridge", "map"),
];
/// How long what must happen may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a case is made of.
type Entry = (&'static str, fn(&Modules) -> CaseResult);

pub(super) fn cases(modules: PathBuf) -> Vec<Case> {
    const CASES: &[Entry] = &[
        ("an open file holds its module, and outlives its VM", holds),
        ("a reader whose memory nobody serves holds nobody up", stuck_reader),
        ("who lists sysfs for ever holds no VM up", stuck_listing),
        ("readers while VMs come and go", readers),
        ("the free-page map in pieces of any size", pieces),
        ("files that the kernel makes for a module, open while it goes", others_files),
    ];
    let modules = Rc::new(Modules(modules));
    CASES
        .iter()
        .map(|&(name, run)| {
            let modules = modules.clone();
            Case::new(name, move || {
                for module in MODULES {
                    modules.insert(module)?;
                }
                let result = run(&modules);
                // Whatever happened, the next case finds a stock host.
                for module in MODULES.iter().rev() {
                    let _ = modules.remove(module);
                }
                check!(
                    !Path::new("/sys/module/kvm_dlh").exists(),
                    "kvm_dlh is still there: {result:?}"
                );
                result
            })
        })
        .collect()
}

/// The directory that a module has for the only VM of this process.
fn directory(module: &str) -> Result<PathBuf> {
    match &directories(module, std::process::id())?[..] {
        [path] => Ok(path.clone()),
        found => failed(format!("{module} has {found:?} for one VM")),
    }
}

/// Waits until the modules have nothing of this process any more.
fn all_gone() -> Result<()> {
    wait_until(PATIENCE, "the directories of VMs that have gone", || {
        let left = |module| directories(module, std::process::id()).map_or(0, |found| found.len());
        MODULES.into_iter().map(left).sum::<usize>() == 0
    })
}

fn check_in_use(modules: &Modules, module: &str, why: &str) -> Result<()> {
    match modules.remove(module) {
        Err(error) if error.to_string().contains("in use") => Ok(()),
        other => failed(format!("{module} is not in use, with {why}: {other:?}")),
    }
}

fn whole(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 1 << 20];
    let mut len = 0;
    loop {
        match file.read_at(&mut bytes[len..], len as u64)? {
            0 => break,
            more => len += more,
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

fn holds(modules: &Modules) -> CaseResult {
    for (module, name) in FILES {
        let setup = Setup::anonymous(MIB)?;
        let file = File::open(directory(module)?.join(name))?;
        let seen = whole(&file)?;
        check!(!seen.is_empty(), "there is nothing in {name} of {module}");
        check_in_use(modules, module, name)?;
        check!(!whole(&file)?.is_empty(), "it cannot be read twice: {name} of {module}");

        drop(setup);
        all_gone()?;
        let again = file.read_at(&mut [0; 16], 0).map_err(|e| e.raw_os_error());
        check_eq!(again, Err(Some(libc::EIO)), "reading {name} of {module} when the VM has gone");
        let mut rest = vec![0; seen.len()];
        let rest = file.read_at(&mut rest, 1).map_err(|e| e.raw_os_error());
        // A text is kept with the open file; a map is not.
        let expected = if name == "map" { Err(Some(libc::EIO)) } else { Ok(seen.len() - 1) };
        check_eq!(rest, expected, "reading on in {name} of {module} when the VM has gone");
        check_in_use(modules, module, name)?;
        drop(file);
        modules.remove("ksm_bridge")?;
        modules.remove("kvm_dlh")?;
        for module in MODULES {
            modules.insert(module)?;
        }
    }
    Ok(Verdict::Pass)
}

/// Reads a file into memory armed with userfaultfd: the reader waits in the middle of it until that is let go.
fn stuck_reader(modules: &Modules) -> CaseResult {
    for (module, name) in FILES {
        let setup = Setup::anonymous(MIB)?;
        let file = File::open(directory(module)?.join(name))?;
        let memory = Mapping::new(Backing::Anonymous, MIB)?;
        let (to, len) = (memory.address(), memory.len());
        let fd = file.as_raw_fd();
        let read = move || {
            // SAFETY: The mapping and the file are there until this has returned, or the process ends.
            unsafe { libc::read(fd, to as *mut libc::c_void, len) as i64 }
        };
        let done = while_stuck(&memory, read, || {
            // The VM goes, others come and go, their files can be read, and the module says that it is in use.
            drop(setup);
            all_gone()?;
            let setup = Setup::anonymous(MIB)?;
            let other = File::open(directory(module)?.join(name))?;
            check!(!whole(&other)?.is_empty(), "{name} of another VM of {module}");
            drop((other, setup));
            all_gone()?;
            check_in_use(modules, module, name)
        });
        let done = match done? {
            Stuck::Went(done) => done,
            Stuck::Never(why) => return Ok(Verdict::Skip(why)),
        };
        check!(done > 0, "the reader of {name} of {module} got {done}");
    }
    Ok(Verdict::Pass)
}

/// How it went.
enum Stuck {
    /// What came of it when the memory was there.
    Went(i64),
    /// Nobody can be stuck here, and why.
    Never(String),
}

/// Does `act` on a thread, which touches `memory`, armed with userfaultfd, and does `meanwhile` while it waits for that;
/// then lets it go on.
fn while_stuck(
    memory: &Mapping,
    act: impl FnOnce() -> i64 + Send + 'static,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<Stuck> {
    let armed = match memory.arm_userfaultfd() {
        Ok(armed) => armed,
        Err(error) => return Ok(Stuck::Never(format!("no userfaultfd here: {error}"))),
    };
    let (sender, receiver) = std::sync::mpsc::channel();
    let actor = thread::spawn(move || {
        let _ = sender.send(act());
    });
    let result = (|| {
        wait_until(PATIENCE, "the thread faults", || {
            let mut event =
                libc::pollfd { fd: armed.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: `event` is one entry.
            unsafe { libc::poll(&mut event, 1, 0) == 1 }
        })?;
        meanwhile()?;
        check!(receiver.try_recv().is_err(), "the thread was not stuck");
        Ok(())
    })();
    // What waits for the memory goes on now.
    drop(armed);
    let done = receiver.recv_timeout(PATIENCE)?;
    actor.join().map_err(|_| "the thread panicked")?;
    result.map(|()| Stuck::Went(done))
}

/// Lists a directory of sysfs into memory that nobody serves. Whoever wants to add something to sysfs, or to remove it, waits;
/// as soon as there is one who does, so do all that look for anything in `/sys`. Therefore nothing here does meanwhile.
fn stuck_listing(_modules: &Modules) -> CaseResult {
    /// What the first two entries take, which are listed before sysfs is locked.
    const DOTS: usize = 48;
    let memory = Mapping::new(Backing::Anonymous, 2 * PAGE)?;
    memory.fill(0, PAGE, pattern);
    let to = memory.address() as usize + PAGE - DOTS;
    let sysfs = File::open("/sys/kernel")?;
    let fd = sysfs.as_raw_fd();
    let list = move || {
        // SAFETY: The mapping and the directory are there until this has returned, or the process ends.
        unsafe { libc::syscall(libc::SYS_getdents64, fd, to, PAGE) }
    };
    let vms = (0..3)
        .map(|_| {
            let mut vm = Vm::new(VmConfig::default())?;
            let mapping = Mapping::new(Backing::Anonymous, MIB)?;
            let slot = vm.add_memory(PLACE, mapping)?;
            Ok((vm, slot))
        })
        .collect::<Result<Vec<_>>>()?;
    let done = while_stuck(&memory, list, || {
        // They report for the first time, and are served, and go.
        for (vm, slot) in vms {
            let memory = vm.region(slot).mapping.clone();
            let mut setup = Setup::with_slot(vm, memory, slot)?;
            check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status of a report");
        }
        Ok(())
    });
    let done = match done? {
        Stuck::Went(done) => done,
        Stuck::Never(why) => return Ok(Verdict::Skip(why)),
    };
    check!(done > DOTS as i64, "the listing gave {done}");
    all_gone()?;
    let setup = Setup::anonymous(MIB)?;
    control(&directory("ksm_bridge")?)?;
    setup.finish()
}

/// Reads all there is of this process; notes in `seen` what could be read.
fn read_all(seen: &Mutex<BTreeSet<(&'static str, &'static str)>>) -> Result<()> {
    for (module, name) in FILES {
        for directory in directories(module, std::process::id())? {
            let path = directory.join(name);
            let mut bytes = Vec::new();
            let read = File::open(&path).and_then(|mut file| file.read_to_end(&mut bytes));
            match read.map_err(|e| e.raw_os_error()) {
                Ok(_) => (),
                // It has just gone.
                Err(Some(libc::ENOENT | libc::EIO)) => continue,
                Err(error) => return failed(format!("{}: {error:?}", path.display())),
            }
            let whole = if name == "map" { bytes.len() >= 32 } else { bytes.ends_with(b"\n") };
            // A VM that has no rings, or has made no calls, yet.
            if whole {
                seen.lock().map_err(|_| "a reader panicked")?.insert((module, name));
            } else if !bytes.is_empty() {
                return failed(format!(
                    "{}: {:?}",
                    path.display(),
                    String::from_utf8_lossy(&bytes)
                ));
            }
        }
    }
    Ok(())
}

fn readers(_modules: &Modules) -> CaseResult {
    const LEAST: u32 = 24;
    let (seen, over) = (Mutex::new(BTreeSet::new()), AtomicBool::new(false));
    let rounds = thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        read_all(&seen)?;
                    }
                    Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
                })
            })
            .collect();
        let mut rounds = 0;
        let made = (|| {
            while rounds < LEAST || seen.lock().map_err(|_| "panic")?.len() < FILES.len() {
                let mut setup = Setup::anonymous(MIB)?;
                setup.ring.push(&NOP, 100)?;
                setup.vm.vcpus[0].exit(Exit::Pio)?;
                setup.report(PLACE, MIB as u64)?;
                rounds += 1;
                if rounds == 100 * LEAST {
                    return failed(format!("after {rounds} VMs, the only files read: {seen:?}"));
                }
            }
            Ok(())
        })();
        over.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().map_err(|_| "a reader panicked")??;
        }
        made.map(|()| rounds)
    })?;
    println!("# {rounds} VMs");
    all_gone()?;
    Ok(Verdict::Pass)
}

fn pieces(_modules: &Modules) -> CaseResult {
    const LEN: usize = 96 * MIB;
    let mut setup = Setup::unfilled(Mapping::new(Backing::Anonymous, LEN)?)?;
    for at in (0..LEN).step_by(LEN / 8) {
        check_eq!(setup.report(PLACE + at as u64, (LEN / 16) as u64)?, 0, "status");
    }
    let file = File::open(directory("ksm_bridge")?.join("map"))?;
    let map = whole(&file)?;
    // Two memslots: the report that a set-up makes is of another one. One word for 32 pages.
    let words = [4u64 << 20, LEN as u64].map(|bytes| bytes / 4096 / 32);
    check_eq!(map.len() as u64, 8 * (4 + 2 * 3 + words.iter().sum::<u64>()), "bytes of the map");
    check!(map.starts_with(b"DLHMAP\0\x01"), "the beginning of the map");
    for size in [1, 7, 8, 31, 4095, 4096, 5000, map.len()] {
        let mut at = 0;
        while at < map.len() {
            let mut piece = vec![0xee; size.min(map.len() - at)];
            let len = file.read_at(&mut piece, at as u64)?;
            check!(len > 0 && piece[..len] == map[at..at + len], "{size} bytes from {at} on");
            at += len;
        }
        check_eq!(file.read_at(&mut vec![0; size], at as u64)?, 0, "bytes after the end");
    }
    Ok(Verdict::Pass)
}

/// Events and parameters: the kernel's own files about a module, which do not hold it and know when it has gone.
fn others_files(modules: &Modules) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let event = Path::new("/sys/kernel/tracing/events/kvm_dlh/kvm_dlh_guest_event");
    fs::write(event.join("enable"), "1")?;
    let mut open = Vec::new();
    for directory in [event, Path::new("/sys/module/kvm_dlh/parameters")] {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            // Some can only be written to.
            if let Ok(file) = File::open(&path) {
                open.push((path, file));
            }
        }
    }
    let names = |part: &str| open.iter().filter(|(path, _)| path.ends_with(part)).count();
    for part in ["format", "enable", "filter", "parameters/budget_us"] {
        check_eq!(names(part), 1, "files called {part} of {open:?}");
    }
    vm.vcpus[0].exit(Exit::Pio)?;
    modules.remove("ksm_bridge")?;
    modules.remove("kvm_dlh")?;
    let mut refused = 0;
    for (_, file) in &mut open {
        refused += u32::from(file.read(&mut [0; 4096]).is_err());
    }
    println!("# {} files, {refused} of them cannot be read any more", open.len());
    check!(refused >= 4, "files of a module that has gone");
    drop(open);
    Ok(Verdict::Pass)
}
