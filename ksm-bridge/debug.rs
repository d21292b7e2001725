// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/ksm_bridge/`: one directory a VM, called as KVM calls its own: `stats`, and `map`, the
//! free-page map for tools.

use kernel::{
    debugfs::{Dir, File},
    fmt,
    prelude::*,
    str::{CStr, CString},
    sync::{
        atomic::{ordering::Relaxed, Atomic},
        Arc,
    },
};
use kvm_vm::{debugfs_has, Vm};

use crate::{dump::Dump, merger::Merger};

const NAME: &CStr = c"ksm_bridge";

/// The module's directory.
pub(crate) struct Directory {
    dir: Dir,
    serial: Atomic<u32>,
}

/// The directory of one VM; gone when this is dropped.
pub(crate) struct VmDirectory {
    _stats: Pin<KBox<File<Arc<Merger>>>>,
    _map: Pin<KBox<File<Dump>>>,
}

impl Directory {
    /// Makes it. Without debugfs nothing is shown, and nothing else changes.
    pub(crate) fn new() -> Self {
        Self { dir: Dir::new(NAME), serial: Atomic::new(0) }
    }

    /// `<pid>-<fd>`. Where KVM has no such directory, or that of a VM that has ended is still there, a number
    /// makes it unique.
    fn name_for(&self, vm: &Vm) -> Result<CString> {
        let serial = self.serial.fetch_add(1, Relaxed);
        let Some(name) = vm.name() else {
            return CString::try_from_fmt(fmt!("{}-vm{serial}", vm.pid()));
        };
        if debugfs_has(NAME, &name) {
            let name = name.to_str().map_err(|_| EINVAL)?;
            return CString::try_from_fmt(fmt!("{name}.{serial}"));
        }
        Ok(name)
    }

    /// Makes the directory of one VM. May sleep.
    pub(crate) fn add(&self, vm: &Vm, merger: &Arc<Merger>) -> Result<VmDirectory> {
        let dir = self.dir.subdir(&self.name_for(vm)?);
        let stats: &'static _ = &|merger: &Arc<Merger>, f: &mut fmt::Formatter<'_>| merger.show(f);
        Ok(VmDirectory {
            _stats: KBox::pin_init(
                dir.read_callback_file(c"stats", merger.clone(), stats),
                GFP_KERNEL,
            )?,
            _map: KBox::pin_init(dir.read_binary_file(c"map", Dump(merger.clone())), GFP_KERNEL)?,
        })
    }
}
