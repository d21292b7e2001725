// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/dlh_guest/`: `stats`; `bench`, which measures when it is read; and `trace`: what is
//! written there, up to 16 bytes at a time, appears in the host's trace.

use debugfs::{Dir, File, Sink};
use kernel::{fmt, prelude::*, sync::Arc};
use kvm_guest::hypercall;

use crate::{bench, rings::Rings};

/// The driver's directory; gone when this is dropped.
pub(crate) struct Directory {
    _stats: File<Stats>,
    _bench: File<Bench>,
    _trace: File<Trace>,
}

/// `stats`.
struct Stats(Arc<Rings>);

/// `bench`.
struct Bench(Arc<Rings>);

/// `trace`.
struct Trace(Arc<Rings>);

impl Directory {
    /// Makes it. Without debugfs nothing is shown, and nothing else changes. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(rings: &Arc<Rings>) -> Result<Self> {
        let dir = Dir::new(c"dlh_guest")?;
        Ok(Self {
            _stats: dir.text(c"stats", Stats(rings.clone()))?,
            _bench: dir.text(c"bench", Bench(rings.clone()))?,
            _trace: dir.sink(c"trace", Trace(rings.clone()))?,
        })
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.0.stats(), f)?;
        writeln!(f, "hypercalls {}", hypercall::made())?;
        writeln!(f, "rings {}", self.0.live())
    }
}

impl fmt::Display for Bench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        bench::run(&self.0, f)
    }
}

impl Sink for Trace {
    fn write(&self, bytes: &[u8]) -> Result {
        let mut payload = [0; 16];
        payload.get_mut(..bytes.len()).ok_or(E2BIG)?.copy_from_slice(bytes);
        let (low, high) = payload.split_at(8);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b));
        self.0.trace([word(low), word(high)])
    }
}
