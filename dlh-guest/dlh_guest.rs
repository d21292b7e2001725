// SPDX-License-Identifier: GPL-2.0

//! Guest driver for deferrable hypercalls: tells a KVM host with kvm_dlh.ko and ksm_bridge.ko of free
//! memory, without exits.
//!
//! One way through, one file a step:
//!
//! page allocator -> report ([`report`]), at a [`pace`] -> the ring of this CPU ([`rings`]) -> host, with
//! statistics ([`stats`]) beside it, shown by [`debug`]; [`bench`] measures what a call costs. Once more where the
//! host has forgotten it ([`again`]).
//!
//! # Locking
//!
//! Outermost first: `Again::sweep`, `FreePages::turn`, `Rings::control`. Hypercalls are made while the last is
//! held, but what waits for the host to finish a report holds the others only.

use dlh_abi::{RingSize, ABI_VERSION, FEATURE_FREE_PAGES, FEATURE_RING};
use kernel::{fmt, prelude::*, sync::Arc};
use kvm_guest::{
    hypercall, platform, CpuHotplug, PageReporting, RebootNotifier, Rounds, FAULT_REPORT_EARLY,
};

mod again;
mod bench;
mod debug;
mod pace;
mod report;
mod rings;
mod stats;

use again::Again;
use pace::Pace;
use params::{dlh_guest, VERSION};
use report::FreePages;
use rings::Rings;

module! {
    type: DlhGuest,
    name: "dlh_guest",
    authors: ["The kvm-dlh developers"],
    description: "Deferrable low-overhead hypercalls: guest driver",
    license: "GPL",
}

/// The driver at work. The fields are dropped from the first to the last.
struct DlhGuest {
    _debug: Option<debug::Directory>,
    /// Has a count of what it is about: it goes first.
    _again: Rounds<Again>,
    _reporting: Arc<PageReporting<FreePages>>,
    _reboot: Pin<KBox<RebootNotifier<Rings>>>,
    _cpus: Pin<KBox<CpuHotplug<Rings>>>,
}

impl kernel::Module for DlhGuest {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let size = RingSize::try_from(u64::from(dlh_guest::ring_entries())).map_err(|_| EINVAL)?;
        // -1, and nothing else below 0, leaves it to the kernel.
        let order = u32::try_from(dlh_guest::order()).ok();
        let (batch, pace_mib) = (dlh_guest::batch(), dlh_guest::pace_mib());
        discover()?;
        if FAULT_REPORT_EARLY {
            pr_warn!("TEST BUILD: pages are given back too early, this machine WILL LOSE DATA\n");
        }

        let rings = Rings::new(size).inspect_err(without("memory for rings"))?;
        let cpus = CpuHotplug::new(c"dlh_guest:online", rings.clone())
            .inspect_err(without("word of CPUs that come and go"))?;
        let reboot =
            RebootNotifier::new(rings.clone()).inspect_err(without("word of this kernel's end"))?;
        let free_pages =
            FreePages::new(rings.clone(), Pace::new(pace_mib), dlh_guest::timeout_ms())
                .inspect_err(without("memory for reports"))?;
        let marks = again::begin(&rings, &free_pages)
            .inspect_err(without("memory for reporting once more"))?;
        let reporting =
            PageReporting::new(order, batch, free_pages.clone()).inspect_err(|&e| match e {
                EBUSY => {
                    pr_info!("free page reporting belongs to another driver, standing back\n")
                }
                _ => pr_err!("cannot start, no reporting of free pages: {:?}\n", e),
            })?;
        let again = Again::new(rings.clone(), free_pages, reporting.clone(), marks)
            .and_then(|again| Rounds::start(again, again::PERIOD_MS))
            .inspect_err(without("memory for reporting once more"))?;
        pr_info!(
            "version {}: reporting free blocks of order {}, {} at a time, through {} ring(s) of {} entries{}\n",
            VERSION,
            reporting.order(),
            batch,
            rings.live(),
            size.get(),
            AtMost(pace_mib)
        );
        // A module that fails to load is freed although files of it are open, so nothing may fail any more.
        let debug = debug::Directory::new(&rings).ok();
        Ok(Self {
            _debug: debug,
            _again: again,
            _reporting: reporting,
            _reboot: reboot,
            _cpus: cpus,
        })
    }
}

/// Says what there is none of, in the log.
fn without(what: &'static str) -> impl Fn(&Error) {
    move |e| pr_err!("cannot start, no {}: {:?}\n", what, e)
}

/// The pace in MiB a second, in words, if there is one.
struct AtMost(u32);

impl fmt::Display for AtMost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            pace => write!(f, ", at most {pace} MiB in a second"),
        }
    }
}

/// Whether there is anything to do here.
///
/// # Errors
///
/// `ENODEV` where there is not; the log says why.
fn discover() -> Result {
    if !platform::on_kvm() {
        pr_info!("not a guest of KVM, nothing to do\n");
        return Err(ENODEV);
    }
    if platform::memory_encrypted() {
        pr_info!("this guest's memory is encrypted, the host cannot share it\n");
        return Err(ENODEV);
    }
    if platform::free_pages_poisoned() {
        pr_info!("this kernel poisons free pages, which the host would not keep\n");
        return Err(ENODEV);
    }
    let features = hypercall::features().map_err(|e| {
        if e.is_absent() {
            pr_info!("the host has no deferrable hypercalls\n");
        } else {
            pr_info!("the host refuses deferrable hypercalls: {}\n", e);
        }
        ENODEV
    })?;
    if features.version != ABI_VERSION {
        pr_info!("the host speaks version {}, not {}\n", features.version, ABI_VERSION);
        return Err(ENODEV);
    }
    let needed = FEATURE_RING | FEATURE_FREE_PAGES;
    if features.bits & needed != needed {
        pr_info!("the host does not take free pages (features {:#x})\n", features.bits);
        return Err(ENODEV);
    }
    Ok(())
}
