// SPDX-License-Identifier: GPL-2.0

//! TRACE: an event of the guest in the host's trace.

use kernel::current;
use kvm_hooks::GuestEvent;

use crate::caller::Caller;

/// Emits what a TRACE call of VM number `serial` says. Does not sleep.
pub(crate) fn emit(serial: u64, caller: &Caller<'_>, payload: [u64; 2]) {
    if !GuestEvent::is_enabled() {
        return;
    }
    let now = caller.vcpu.guest_tsc();
    // The entry has only the lower half: the event was less than 2^31 ticks ago, or a few ahead, as CPUs
    // may be. What the guest says may lie before its counter's beginning.
    let ago = |then| i64::from((now as u32).wrapping_sub(then) as i32);
    let tsc = caller.time.map_or(now, |then| now.wrapping_add_signed(-ago(then)));
    GuestEvent { vm: serial, pid: current!().tgid(), vcpu: caller.vcpu_id, tsc, payload }.emit();
}
