// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/dlh_guest/`: `stats`; `bench`, which measures when it is read; and `trace`: what is
//! written there, up to 16 bytes at a time, appears in the host's trace.

use kernel::{
    debugfs::{Dir, File},
    fmt,
    prelude::*,
    sync::Arc,
    uaccess::UserSliceReader,
};
use kvm_guest::hypercall;

use crate::{bench, rings::Rings};

/// The driver's directory; gone when this is dropped.
pub(crate) struct Directory {
    _stats: Pin<KBox<File<Arc<Rings>>>>,
    _bench: Pin<KBox<File<Arc<Rings>>>>,
    _trace: Pin<KBox<File<Arc<Rings>>>>,
    _dir: Dir,
}

impl Directory {
    /// Makes it. Without debugfs nothing is shown, and nothing else changes. May sleep.
    pub(crate) fn new(rings: &Arc<Rings>) -> Result<Self> {
        let dir = Dir::new(c"dlh_guest");
        let stats: &'static _ = &|rings: &Arc<Rings>, f: &mut fmt::Formatter<'_>| {
            fmt::Display::fmt(rings.stats(), f)?;
            writeln!(f, "hypercalls {}", hypercall::made())?;
            writeln!(f, "rings {}", rings.live())
        };
        let bench: &'static _ =
            &|rings: &Arc<Rings>, f: &mut fmt::Formatter<'_>| bench::run(rings, f);
        let trace: &'static _ = &|rings: &Arc<Rings>, text: &mut UserSliceReader| {
            let mut payload = [0; 16];
            let len = text.len();
            text.read_slice(payload.get_mut(..len).ok_or(E2BIG)?)?;
            let (low, high) = payload.split_at(8);
            let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b));
            rings.trace([word(low), word(high)])
        };
        Ok(Self {
            _stats: KBox::pin_init(
                dir.read_callback_file(c"stats", rings.clone(), stats),
                GFP_KERNEL,
            )?,
            _bench: KBox::pin_init(
                dir.read_callback_file(c"bench", rings.clone(), bench),
                GFP_KERNEL,
            )?,
            _trace: KBox::pin_init(
                dir.write_callback_file(c"trace", rings.clone(), trace),
                GFP_KERNEL,
            )?,
            _dir: dir,
        })
    }
}
