// SPDX-License-Identifier: GPL-2.0

//! What a KVM guest needs to make deferred calls: the hypercall, a ring for each CPU, and free page
//! reporting that keeps pages isolated for as long as the host may touch them.
//!
//! The host writes into a ring and discards the pages that a call names. Both are memory of this
//! kernel, so both must be out of the reach of safe code that errs:
//!
//! - A [`Ring`] owns its memory and frees it only after the host has said that it is done with it.
//! - Only [`Report`] places calls that name pages, and only pages that the page allocator has handed
//!   to it; it does not give them back before the host is done with them, whatever its user does.
//! - Only one user at a time places calls in a ring: [`LocalRing`].
//!
//! C headers: `include/uapi/linux/kvm_dlh.h`, `rust/dlh_bindings/helpers.h` (`helpers/guest.c`, `helpers/guest_marks.c`).

mod cpu;
mod hotplug;
pub mod hypercall;
mod marks;
mod memory;
pub mod platform;
mod reboot;
mod reporting;
mod ring;
mod ring_table;
mod rounds;

pub use cpu::{cpu_is_ours, sleep_to_tick, sleep_us, tsc, tsc_khz, CpuGuard};
pub use hotplug::{CpuEvents, CpuHotplug};
pub use marks::{Marks, Sweep, Swept};
pub use reboot::{RebootEvents, RebootNotifier};
pub use reporting::{PageReporting, Placed, Progress, Report, Reporter, Tally, Unreported};
pub use ring::{LocalRing, NewRing, Ring, SetupError};
pub use ring_table::RingTable;
pub use rounds::{Round, Rounds};

/// Whether this is a test build that gives reported pages back before the host is done with them.
pub const FAULT_REPORT_EARLY: bool = cfg!(dlh_fault_report_early);

/// What the print macros put before a message: the name of the driver's module.
const __LOG_PREFIX: &[u8] = b"dlh_guest\0";
