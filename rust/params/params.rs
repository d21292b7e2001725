// SPDX-License-Identifier: GPL-2.0

//! The parameters of each module, as they were given: set and checked before its `init` runs, and the same
//! ever after. A module can read its own only; any context.
//!
//! C header: `rust/dlh_bindings/helpers/param.h`; ranges and defaults are in `rust/dlh_bindings/helpers/params/`

use dlh_bindings as bindings;
use kernel::str::CStr;

/// The version of all modules.
pub const VERSION: &str = match CStr::from_bytes_with_nul(bindings::DLH_VERSION) {
    Ok(version) => match version.to_str() {
        Ok(version) => version,
        Err(_) => panic!("the version is no text"),
    },
    Err(_) => panic!("the version does not end"),
};

/// Functions that are compiled into who uses them: none of them refers to another module's parameters.
macro_rules! params {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $helper:ident;)*) => {
        $(
            $(#[$doc])*
            #[inline(always)]
            pub fn $name() -> $type {
                // SAFETY: Reads a number that nobody writes any more.
                unsafe { dlh_bindings::$helper() }
            }
        )*
    };
}

/// Of `kvm_dlh.ko`.
pub mod kvm_dlh {
    params! {
        /// Entries executed at most before a vCPU may go on.
        budget_entries: u32 = dlh_param_budget_entries;
        /// Microseconds spent on them at most.
        budget_us: u32 = dlh_param_budget_us;
        /// Microseconds that an entry waits at most for its vCPU to exit by itself; 0: for ever.
        max_defer_us: u32 = dlh_param_max_defer_us;
    }
}

/// Of `ksm_bridge.ko`.
pub mod ksm_bridge {
    params! {
        /// Share of one CPU that the worker of a VM may use.
        worker_cpu_percent: u32 = dlh_param_worker_cpu_percent;
        /// Whether the zero page is mapped at once.
        merge_share: bool = dlh_param_merge_share;
    }
}

/// Of `dlh_guest.ko`.
pub mod dlh_guest {
    params! {
        /// Entries of each CPU's ring: a power of two.
        ring_entries: u32 = dlh_param_ring_entries;
        /// The order of the smallest blocks that are reported; -1: as the kernel says.
        order: i32 = dlh_param_order;
        /// Blocks that are handed to the host at a time.
        batch: u32 = dlh_param_batch;
        /// MiB that are reported in a second at most; 0: no limit.
        pace_mib: u32 = dlh_param_pace_mib;
        /// Milliseconds to wait for the host to come by before calling it.
        timeout_ms: u32 = dlh_param_timeout_ms;
    }
}
