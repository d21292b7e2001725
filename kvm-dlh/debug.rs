// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/kvm_dlh/`: one directory a VM, `<pid of its VMM>-<serial>`.

use kernel::{
    debugfs::{Dir, File},
    fmt,
    prelude::*,
    str::CString,
    sync::Arc,
};

use crate::queue::VmQueue;

/// The module's directory.
pub(crate) struct Directory {
    dir: Dir,
}

/// The directory of one VM; gone when this is dropped.
pub(crate) struct VmDirectory {
    _stats: Pin<KBox<File<Arc<VmQueue>>>>,
    _rings: Pin<KBox<File<Arc<VmQueue>>>>,
}

impl Directory {
    /// Makes it. Without debugfs nothing is shown, and nothing else changes.
    pub(crate) fn new() -> Self {
        Self { dir: Dir::new(c"kvm_dlh") }
    }

    /// Makes the directory of one VM: `<pid>-<serial>`. May sleep.
    pub(crate) fn add(&self, queue: &Arc<VmQueue>) -> Result<VmDirectory> {
        let name = CString::try_from_fmt(fmt!("{}-{}", queue.pid(), queue.serial()))?;
        let dir = self.dir.subdir(&name);
        let stats: &'static _ =
            &|queue: &Arc<VmQueue>, f: &mut fmt::Formatter<'_>| fmt::Display::fmt(queue.stats(), f);
        let rings: &'static _ =
            &|queue: &Arc<VmQueue>, f: &mut fmt::Formatter<'_>| queue.show_rings(f);
        Ok(VmDirectory {
            _stats: KBox::pin_init(
                dir.read_callback_file(c"stats", queue.clone(), stats),
                GFP_KERNEL,
            )?,
            _rings: KBox::pin_init(
                dir.read_callback_file(c"rings", queue.clone(), rings),
                GFP_KERNEL,
            )?,
        })
    }
}
