// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/ksm_bridge/`: one directory a VM, `<pid of its VMM>-<serial>`.

use kernel::{
    debugfs::{Dir, File},
    fmt,
    prelude::*,
    str::CString,
    sync::{
        atomic::{ordering::Relaxed, Atomic},
        Arc,
    },
};

use crate::merger::Merger;

/// The module's directory.
pub(crate) struct Directory {
    dir: Dir,
    serial: Atomic<u32>,
}

/// The directory of one VM; gone when this is dropped.
pub(crate) struct VmDirectory {
    _stats: Pin<KBox<File<Arc<Merger>>>>,
}

impl Directory {
    /// Makes it. Without debugfs nothing is shown, and nothing else changes.
    pub(crate) fn new() -> Self {
        Self { dir: Dir::new(c"ksm_bridge"), serial: Atomic::new(0) }
    }

    /// Makes the directory of one VM: `<pid>-<serial>`. May sleep.
    pub(crate) fn add(&self, merger: &Arc<Merger>) -> Result<VmDirectory> {
        let serial = self.serial.fetch_add(1, Relaxed);
        let name = CString::try_from_fmt(fmt!("{}-{}", merger.pid(), serial))?;
        let dir = self.dir.subdir(&name);
        let stats: &'static _ = &|merger: &Arc<Merger>, f: &mut fmt::Formatter<'_>| merger.show(f);
        Ok(VmDirectory {
            _stats: KBox::pin_init(
                dir.read_callback_file(c"stats", merger.clone(), stats),
                GFP_KERNEL,
            )?,
        })
    }
}
