// SPDX-License-Identifier: GPL-2.0

//! Guest driver for deferrable hypercalls: tells a KVM host with kvm_dlh.ko and ksm_bridge.ko of free
//! memory, without exits.
//!
//! One way through, one file a step:
//!
//! page allocator -> report ([`report`]), at a [`pace`] -> the ring of this CPU ([`rings`]) -> host, with
//! statistics ([`stats`]) beside it, shown by [`debug`]; [`bench`] measures what a call costs.
//!
//! # Locking
//!
//! `Rings::control` is the only lock. Hypercalls are made while it is held, but what waits for the host
//! to finish a report does not hold it.

use dlh_abi::{RingSize, ABI_VERSION, FEATURE_FREE_PAGES, FEATURE_RING};
use kernel::prelude::*;
use kvm_guest::{
    hypercall, platform, CpuHotplug, PageReporting, RebootNotifier, FAULT_REPORT_EARLY,
};

mod bench;
mod debug;
mod pace;
mod report;
mod rings;
mod stats;

use pace::Pace;
use report::FreePages;
use rings::Rings;

module! {
    type: DlhGuest,
    name: "dlh_guest",
    authors: ["The kvm-dlh developers"],
    description: "Deferrable low-overhead hypercalls: guest driver",
    license: "GPL",
    params: {
        ring_entries: u32 {
            default: 256,
            description: "Entries of each CPU's ring (power of two, 64 to 65536)",
        },
        order: i32 {
            default: -1,
            description: "Report free blocks of 2^order pages and more (0 to 10; -1: page_reporting.page_reporting_order, or else 9)",
        },
        batch: u32 {
            default: 32,
            description: "Blocks that are taken from the allocator, handed to the host and waited for at a time (1 to 32)",
        },
        pace_mib: u32 {
            default: 0,
            description: "MiB that are reported in a second at most (up to 1048576; 0: no limit)",
        },
        timeout_ms: u32 {
            default: 1000,
            description: "Milliseconds to wait for the host to come by before calling it (1 to 60000)",
        },
    },
}

/// Largest order of a free block.
const MAX_ORDER: u32 = 10;
/// The page allocator lends no more blocks than this at a time.
const MAX_BATCH: u32 = 32;
/// 1 TiB.
const MAX_PACE_MIB: u32 = 1 << 20;

struct Parameters {
    size: RingSize,
    order: Option<u32>,
    batch: u32,
    pace_mib: u32,
    timeout_ms: u32,
}

impl Parameters {
    /// The parameters as they were given.
    ///
    /// # Errors
    ///
    /// `EINVAL`; the log says which.
    fn read() -> Result<Self> {
        let entries = module_parameters::ring_entries.value();
        let size = RingSize::try_from(u64::from(entries)).map_err(|_| {
            pr_err!("ring_entries={} is no power of two from 64 to 65536\n", entries);
            EINVAL
        })?;
        let order = match module_parameters::order.value() {
            -1 => None,
            order => match u32::try_from(order) {
                Ok(order) if order <= MAX_ORDER => Some(order),
                _ => {
                    pr_err!("order={} is not between 0 and {} (or -1)\n", order, MAX_ORDER);
                    return Err(EINVAL);
                }
            },
        };
        let batch = module_parameters::batch.value();
        if !(1..=MAX_BATCH).contains(&batch) {
            pr_err!("batch={} is not between 1 and {}\n", batch, MAX_BATCH);
            return Err(EINVAL);
        }
        let pace_mib = module_parameters::pace_mib.value();
        if pace_mib > MAX_PACE_MIB {
            pr_err!("pace_mib={} is not between 0 and {}\n", pace_mib, MAX_PACE_MIB);
            return Err(EINVAL);
        }
        let timeout_ms = module_parameters::timeout_ms.value();
        if !(1..=60000).contains(&timeout_ms) {
            pr_err!("timeout_ms={} is not between 1 and 60000\n", timeout_ms);
            return Err(EINVAL);
        }
        Ok(Self { size, order, batch, pace_mib, timeout_ms })
    }
}

/// The driver at work. The fields are dropped from the first to the last.
struct DlhGuest {
    _debug: debug::Directory,
    _reporting: Pin<KBox<PageReporting<FreePages>>>,
    _reboot: Pin<KBox<RebootNotifier<Rings>>>,
    _cpus: Pin<KBox<CpuHotplug<Rings>>>,
}

impl kernel::Module for DlhGuest {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let parameters = Parameters::read()?;
        discover()?;
        if FAULT_REPORT_EARLY {
            pr_warn!("TEST BUILD: pages are given back too early, this machine WILL LOSE DATA\n");
        }

        let rings = Rings::new(parameters.size)?;
        let cpus = CpuHotplug::new(c"dlh_guest:online", rings.clone())?;
        let reboot = RebootNotifier::new(rings.clone())?;
        let pace = Pace::new(parameters.pace_mib);
        let free_pages = FreePages::new(rings.clone(), pace, parameters.timeout_ms)?;
        let reporting = PageReporting::new(parameters.order, parameters.batch, free_pages)
            .inspect_err(|&e| match e {
                EBUSY => {
                    pr_info!("free page reporting belongs to another driver, standing back\n")
                }
                _ => pr_err!("cannot report free pages: {:?}\n", e),
            })?;
        pr_info!(
            "reporting free blocks of order {}, {} at a time, through {} rings of {} entries\n",
            reporting.order(),
            parameters.batch,
            rings.live(),
            parameters.size.get()
        );
        if parameters.pace_mib > 0 {
            pr_info!("reporting at most {} MiB in a second\n", parameters.pace_mib);
        }
        Ok(Self {
            _debug: debug::Directory::new(&rings)?,
            _reporting: reporting,
            _reboot: reboot,
            _cpus: cpus,
        })
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
