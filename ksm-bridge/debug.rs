// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/ksm_bridge/`: one directory a VM, called as KVM calls its own, and as that in sysfs: `stats`, and
//! `map`, the free-page map for tools.

use debugfs::{Dir, File};
use kernel::{
    current, fmt,
    prelude::*,
    str::{CStr, CString},
    sync::{
        atomic::{ordering::Relaxed, Atomic},
        Arc,
    },
};
use kvm_vm::Vm;

use crate::{dump::Dump, merger::Merger};

/// The module's directory.
pub(crate) struct Directory {
    dir: Dir,
    serial: Atomic<u32>,
}

/// The directory of one VM; gone when this is dropped, which may sleep.
pub(crate) struct VmDirectory {
    _stats: File<Stats>,
    _map: File<Dump>,
}

/// `stats`.
struct Stats {
    merger: Arc<Merger>,
    vmm_pid: i32,
}

impl Directory {
    /// Makes it. Without debugfs nothing is shown, and nothing else changes. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { dir: Dir::new(c"ksm_bridge")?, serial: Atomic::new(0) })
    }

    /// `<tid>-<fd>`. Where KVM has no such directory, or that of a VM that has ended is still there, a number
    /// makes it unique. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn name_for(&self, vm: &Vm) -> Result<CString> {
        let serial = self.serial.fetch_add(1, Relaxed);
        let Some(name) = vm.name() else {
            return CString::try_from_fmt(fmt!("{}-vm{serial}", vm.creator()));
        };
        if self.dir.has(&name) {
            let name = name.to_str().map_err(|_| EINVAL)?;
            return CString::try_from_fmt(fmt!("{name}.{serial}"));
        }
        Ok(name)
    }

    /// Makes the directory of one VM, of this name. On a thread of its VMM; may sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn add(&self, name: &CStr, merger: &Arc<Merger>) -> Result<VmDirectory> {
        let dir = self.dir.subdir(name)?;
        let vmm_pid = current!().tgid();
        Ok(VmDirectory {
            _stats: dir.text(c"stats", Stats { merger: merger.clone(), vmm_pid })?,
            _map: dir.binary(c"map", Dump(merger.clone()))?,
        })
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "vmm_pid {}", self.vmm_pid)?;
        self.merger.show(f)
    }
}
