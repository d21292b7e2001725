// SPDX-License-Identifier: GPL-2.0

//! The tracepoint `kvm_dlh:kvm_dlh_guest_event`.
//!
//! C header: `include/trace/events/kvm_dlh.h`

use dlh_bindings as bindings;

/// An event that a guest reports.
pub struct GuestEvent {
    /// The number of the VM, as in the module's directory names.
    pub vm: u64,
    /// The pid of its VMM.
    pub pid: i32,
    /// The number that the VMM gave the vCPU.
    pub vcpu: u32,
    /// The vCPU's time-stamp counter at the event.
    pub tsc: u64,
    /// What the guest says.
    pub payload: [u64; 2],
}

impl GuestEvent {
    /// Whether anybody looks at them. Any context.
    #[inline]
    pub fn is_enabled() -> bool {
        // SAFETY: May be called anywhere.
        unsafe { bindings::dlh_trace_guest_event_enabled() }
    }

    /// Puts it into the trace. Any context.
    pub fn emit(&self) {
        let Self { vm, pid, vcpu, tsc, payload } = *self;
        // SAFETY: May be called anywhere; the payload is copied.
        unsafe { bindings::dlh_trace_guest_event(vm, pid, vcpu, tsc, payload.as_ptr()) }
    }
}
