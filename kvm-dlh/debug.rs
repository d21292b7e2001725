// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/kvm_dlh/`: one directory a VM, called as KVM calls its own.

use kernel::{
    debugfs::{Dir, File},
    fmt,
    prelude::*,
    str::{CStr, CString},
    sync::Arc,
};

use kvm_vm::{debugfs_has, Vm};

use crate::queue::VmQueue;

const NAME: &CStr = c"kvm_dlh";

/// The module's directory.
pub(crate) struct Directory {
    dir: Dir,
}

/// The directory of one VM; gone when this is dropped.
pub(crate) struct VmDirectory {
    _stats: Pin<KBox<File<Arc<VmQueue>>>>,
    _rings: Pin<KBox<File<Arc<VmQueue>>>>,
    _operations: Pin<KBox<File<Arc<VmQueue>>>>,
}

impl Directory {
    /// Makes it. Without debugfs nothing is shown, and nothing else changes.
    pub(crate) fn new() -> Self {
        Self { dir: Dir::new(NAME) }
    }

    /// What the directory of `vm` is to be called: `<pid>-<fd>`, as KVM's own. Where KVM has none, or the
    /// directory of one that has ended is still there, the VM's number makes it unique. May sleep.
    pub(crate) fn name_for(vm: &Vm, serial: u64) -> Result<CString> {
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
    pub(crate) fn add(&self, queue: &Arc<VmQueue>) -> Result<VmDirectory> {
        let dir = self.dir.subdir(queue.name());
        let stats: &'static _ =
            &|queue: &Arc<VmQueue>, f: &mut fmt::Formatter<'_>| fmt::Display::fmt(queue.stats(), f);
        let rings: &'static _ =
            &|queue: &Arc<VmQueue>, f: &mut fmt::Formatter<'_>| queue.show_rings(f);
        let operations: &'static _ =
            &|queue: &Arc<VmQueue>, f: &mut fmt::Formatter<'_>| queue.stats().show_operations(f);
        Ok(VmDirectory {
            _stats: KBox::pin_init(
                dir.read_callback_file(c"stats", queue.clone(), stats),
                GFP_KERNEL,
            )?,
            _rings: KBox::pin_init(
                dir.read_callback_file(c"rings", queue.clone(), rings),
                GFP_KERNEL,
            )?,
            _operations: KBox::pin_init(
                dir.read_callback_file(c"operations", queue.clone(), operations),
                GFP_KERNEL,
            )?,
        })
    }
}
