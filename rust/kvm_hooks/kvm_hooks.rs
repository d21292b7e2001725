// SPDX-License-Identifier: GPL-2.0

//! Where the host module meets KVM: the hypercall exit, the exit path, the beginning and the end of a VM;
//! and what runs there: work on the vCPU thread, and a doorbell that may be read with interrupts off.
//!
//! Nothing of KVM is patched: the hooks are ftrace's and the tracepoints' own.

mod doorbell;
mod events;
mod exit;
mod guest_event;
mod hooks;
pub mod inline_atomic;
mod task_work;
mod ticker;
mod wait;
mod watch;

pub use doorbell::{barrier as doorbell_barrier, Doorbell};
pub use events::{Events, Exits, HypercallArgs, Missing};
pub use exit::{ExitProbes, Listening};
pub use guest_event::GuestEvent;
pub use hooks::Hooks;
pub use task_work::{wait_for_task_works, Deferred, TaskWork};
pub use ticker::{kick, timer_tick, Tick, Ticker};
pub use wait::{sleep_a_moment, wait_killable, wait_until, wake, Killed};
pub use watch::Watch;

use dlh_abi::Cookie;
use dlh_bindings as bindings;

/// A fresh secret for a ring; never 0, which is what cleared memory holds. Any context.
pub fn random_cookie() -> Cookie {
    // SAFETY: May be called anywhere.
    Cookie(unsafe { bindings::dlh_random_u64() } | 1)
}

/// Lets others run; returns whether the current task is to go on, that is, whether nobody kills it. May
/// sleep.
pub fn may_go_on() -> bool {
    // SAFETY: May sleep here.
    unsafe { bindings::dlh_may_go_on() }
}

/// Waits until no task is at the last instructions of a function of this module that has slept: task
/// work, works, hypercalls. May sleep.
pub fn synchronize_tasks() {
    // SAFETY: May sleep here.
    unsafe { bindings::dlh_synchronize_rcu_tasks() }
}
