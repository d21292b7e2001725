// SPDX-License-Identifier: GPL-2.0

//! What kind of machine and kernel this is.
//!
//! C headers: `include/linux/kvm_para.h`, `include/linux/cc_platform.h`, `include/linux/mm.h`.

use dlh_bindings as bindings;

/// Whether this kernel runs as a guest of KVM. Any context.
pub fn on_kvm() -> bool {
    // SAFETY: May be called anywhere.
    unsafe { bindings::dlh_guest_on_kvm() }
}

/// Whether the host cannot read this guest's memory. Any context.
pub fn memory_encrypted() -> bool {
    // SAFETY: May be called anywhere.
    unsafe { bindings::dlh_guest_memory_encrypted() }
}

/// Whether free pages must keep the pattern that they were filled with. Any context.
pub fn free_pages_poisoned() -> bool {
    // SAFETY: May be called anywhere.
    unsafe { bindings::dlh_guest_free_pages_poisoned() }
}

/// Whether this kernel relies on finding zeroes in free pages. Any context.
pub fn free_pages_zeroed() -> bool {
    // SAFETY: May be called anywhere.
    unsafe { bindings::dlh_guest_free_pages_zeroed() }
}
