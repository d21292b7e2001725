// SPDX-License-Identifier: GPL-2.0

//! The statistics that the modules, and KVM, keep of each VM in debugfs; and what root says of it in sysfs.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::ktap::{failed, Result};
use crate::thread::{wait_until, PATIENCE};

const DEBUGFS: &str = "/sys/kernel/debug";
/// Where ksm_bridge has a directory for each VM that has reported something.
const CONTROL: &str = "/sys/kernel/ksm_bridge";

/// There are no statistics on this host. A case that needs them is skipped; one that can do without should.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoDebugfs;

impl std::error::Error for NoDebugfs {}

impl fmt::Display for NoDebugfs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the host has no debugfs")
    }
}

/// Whether there are statistics on this host: KVM has some of its own wherever it is.
pub(crate) fn are_there() -> bool {
    Path::new(DEBUGFS).join("kvm").exists()
}

/// A file of `name value` lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stats(BTreeMap<String, u64>);

impl Stats {
    /// Reads one.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut values = BTreeMap::new();
        for line in text.lines() {
            match line.split_once(' ').map(|(name, value)| (name, value.trim().parse())) {
                Some((name, Ok(value))) => values.insert(name.to_owned(), value),
                _ => return failed(format!("{}: not `name value`: {line:?}", path.display())),
            };
        }
        Ok(Self(values))
    }

    /// A value that must be there.
    pub(crate) fn get(&self, name: &str) -> Result<u64> {
        match self.0.get(name) {
            Some(value) => Ok(*value),
            None => failed(format!("there is no {name} in the statistics {self:?}")),
        }
    }

    /// How far each value has grown since `before`; it must not have shrunk, `pending` excepted.
    pub(crate) fn since(&self, before: &Stats, name: &str) -> Result<u64> {
        let (now, then) = (self.get(name)?, before.get(name)?);
        match now.checked_sub(then) {
            Some(growth) => Ok(growth),
            None => failed(format!("{name} fell from {then} to {now}")),
        }
    }

    /// submitted = executed + declined + dropped + pending.
    pub(crate) fn check_law(&self) -> Result<()> {
        let mut accounted = 0;
        for name in ["executed", "declined", "dropped", "pending"] {
            accounted += self.get(name)?;
        }
        let submitted = self.get("submitted")?;
        if submitted != accounted {
            return failed(format!("{submitted} submitted, {accounted} accounted for: {self:?}"));
        }
        Ok(())
    }
}

/// The directories that modules had for this process before a VM was made: the new one is the VM's. It is
/// known by its name: one of a VM that has just ended may be there, and go meanwhile.
#[derive(Debug)]
pub(crate) struct Known {
    before: Vec<PathBuf>,
    maker: i32,
    descriptor: i32,
}

impl Known {
    /// To be called before the VM is made, by the thread that makes it.
    pub(crate) fn now() -> Self {
        let list = |module| all(module).unwrap_or_default();
        let before = ["kvm_dlh", "ksm_bridge"].into_iter().flat_map(list).collect();
        // SAFETY: Has no preconditions.
        Self { before, maker: unsafe { libc::gettid() }, descriptor: -1 }
    }

    /// The VM that has been made since has this descriptor.
    pub(crate) fn vm_is(&mut self, descriptor: i32) {
        self.descriptor = descriptor;
    }

    /// As KVM calls its own, by the thread that made the VM and its descriptor.
    fn name(&self) -> String {
        format!("{}-{}", self.maker, self.descriptor)
    }

    /// As KVM calls its own; with the module's number of the VM where that was taken. Of several, the one that was
    /// not there before; the name itself may have been, and be free again since.
    fn directory_by_name(&self, module: &str) -> Result<Option<PathBuf>> {
        let name = self.name();
        let numbered = format!("{name}.");
        let is_ours = |path: &PathBuf| {
            let file = path.file_name().map(|file| file.to_string_lossy().into_owned());
            file.is_some_and(|file| file == name || file.starts_with(&numbered))
        };
        let mut found = all(module)?;
        found.retain(is_ours);
        let new = found.iter().find(|path| !self.before.contains(path));
        let same = || found.iter().find(|path| path.ends_with(&name));
        Ok(new.or_else(same).cloned())
    }

    /// What KVM itself counts of the VM, all its vCPUs together.
    pub(crate) fn kvm_count(&self, name: &str) -> Result<u64> {
        if !are_there() {
            return Err(NoDebugfs.into());
        }
        let path = Path::new(DEBUGFS).join("kvm").join(self.name()).join(name);
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(text.trim().parse()?)
    }

    /// What kvm_dlh says of the VM's rings.
    pub(crate) fn rings(&self) -> Result<String> {
        Ok(fs::read_to_string(self.directory("kvm_dlh")?.join("rings"))?)
    }

    /// What kvm_dlh has counted for each operation.
    pub(crate) fn operations(&self) -> Result<String> {
        Ok(fs::read_to_string(self.directory("kvm_dlh")?.join("operations"))?)
    }

    /// What a module has counted for the VM.
    pub(crate) fn stats(&self, module: &str) -> Result<Stats> {
        Stats::read(&self.directory(module)?.join("stats"))
    }

    /// Has ksm_bridge tell the guest to report all that is free once more.
    pub(crate) fn again(&self) -> Result<()> {
        Ok(fs::write(control(&self.directory("ksm_bridge")?)?.join("again"), "1")?)
    }

    /// The free-page map of ksm_bridge, as its words.
    pub(crate) fn free_page_map(&self) -> Result<Vec<u64>> {
        let bytes = fs::read(self.directory("ksm_bridge")?.join("map"))?;
        if bytes.len() % 8 != 0 {
            return failed(format!("{} bytes in the free-page map", bytes.len()));
        }
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, &b| (word << 8) | u64::from(b));
        Ok(bytes.chunks(8).map(word).collect())
    }

    fn directory(&self, module: &str) -> Result<PathBuf> {
        if let Some(path) = self.directory_by_name(module)? {
            return Ok(path);
        }
        let mut found = directories(module, std::process::id())?;
        found.retain(|path| !self.before.contains(path));
        match &found[..] {
            [path] => Ok(path.clone()),
            _ => failed(format!("{module} has {found:?} for one VM of this process")),
        }
    }
}

/// The directory in sysfs beside that of ksm_bridge in debugfs: it comes a moment later.
pub(crate) fn control(debugfs: &Path) -> Result<PathBuf> {
    let Some(name) = debugfs.file_name() else { return failed(format!("{debugfs:?} has no name")) };
    let path = Path::new(CONTROL).join(name);
    wait_until(PATIENCE, "the VM's directory in sysfs", || path.exists())?;
    Ok(path)
}

/// What a module has counted for the only VM of a process.
pub(crate) fn of_process(module: &str, pid: u32) -> Result<Stats> {
    match &directories(module, pid)?[..] {
        [path] => Stats::read(&path.join("stats")),
        found => failed(format!("{module} has {found:?} for the one VM of process {pid}")),
    }
}

/// How many VMs a module has a directory for, of all processes.
pub(crate) fn vms(module: &str) -> Result<usize> {
    if !are_there() {
        return Err(NoDebugfs.into());
    }
    Ok(fs::read_dir(Path::new(DEBUGFS).join(module))?.count())
}

/// All directories that a module has for VMs.
fn all(module: &str) -> Result<Vec<PathBuf>> {
    if !are_there() {
        return Err(NoDebugfs.into());
    }
    let parent = Path::new(DEBUGFS).join(module);
    let entries = fs::read_dir(&parent).map_err(|e| format!("{}: {e}", parent.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// The directories that a module has for VMs of a process. They are named by the thread that made the VM, and say
/// whose it is, as that thread may have ended.
pub(crate) fn directories(module: &str, pid: u32) -> Result<Vec<PathBuf>> {
    let threads: Vec<_> = fs::read_dir(format!("/proc/{pid}/task"))
        .map(|tasks| tasks.flatten().map(|task| task.file_name()).collect())
        .unwrap_or_default();
    let mut found = all(module)?;
    found.retain(|path| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let maker =
            name.as_deref().and_then(|name| name.split_once('-')).map_or("", |(maker, _)| maker);
        // The first is enough for most, and costs no look into the files of other VMs.
        maker == pid.to_string()
            || threads.iter().any(|thread| thread == maker)
            || owner(path) == Some(pid.into())
    });
    Ok(found)
}

/// The process that a module says a VM belongs to.
fn owner(directory: &Path) -> Option<u64> {
    Stats::read(&directory.join("stats")).ok()?.get("vmm_pid").ok()
}
