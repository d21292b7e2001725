// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/kvm_dlh/`: one directory a VM, called as KVM calls its own.

use debugfs::{Dir, File};
use kernel::{current, fmt, prelude::*, str::CString, sync::Arc};

use kvm_vm::Vm;

use crate::ring::Queue;

/// The module's directory.
pub(crate) struct Directory {
    dir: Dir,
}

/// The directory of one VM; gone when this is dropped, which may sleep.
pub(crate) struct VmDirectory {
    _stats: File<Stats>,
    _rings: File<Rings>,
    _operations: File<Operations>,
}

/// `stats`.
struct Stats {
    queue: Arc<Queue>,
    vmm_pid: i32,
}

/// `rings`.
struct Rings(Arc<Queue>);

/// `operations`.
struct Operations(Arc<Queue>);

impl Directory {
    /// Makes it. Without debugfs nothing is shown, and nothing else changes. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { dir: Dir::new(c"kvm_dlh")? })
    }

    /// What the directory of `vm` is to be called: `<tid>-<fd>`, as KVM's own. Where KVM has none, or the
    /// directory of one that has ended is still there, the VM's number makes it unique. May sleep.
    pub(crate) fn name_for(&self, vm: &Vm, serial: u64) -> Result<CString> {
        let Some(name) = vm.name() else {
            return CString::try_from_fmt(fmt!("{}-vm{serial}", vm.creator()));
        };
        if self.dir.has(&name) {
            let name = name.to_str().map_err(|_| EINVAL)?;
            return CString::try_from_fmt(fmt!("{name}.{serial}"));
        }
        Ok(name)
    }

    /// Makes the directory of one VM. On a thread of its VMM; may sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn add(&self, queue: &Arc<Queue>) -> Result<VmDirectory> {
        let dir = self.dir.subdir(queue.name())?;
        let vmm_pid = current!().tgid();
        Ok(VmDirectory {
            _stats: dir.text(c"stats", Stats { queue: queue.clone(), vmm_pid })?,
            _rings: dir.text(c"rings", Rings(queue.clone()))?,
            _operations: dir.text(c"operations", Operations(queue.clone()))?,
        })
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "vmm_pid {}", self.vmm_pid)?;
        fmt::Display::fmt(self.queue.stats(), f)
    }
}

impl fmt::Display for Rings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.show_rings(f)
    }
}

impl fmt::Display for Operations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.stats().show_operations(f)
    }
}
