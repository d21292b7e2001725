// SPDX-License-Identifier: GPL-2.0

//! Staying on one CPU, its time stamp counter, and sleeping.
//!
//! C headers: `include/linux/smp.h`, `arch/x86/include/asm/msr.h`, `include/linux/sched.h`.

use dlh_bindings as bindings;
use kernel::types::NotThreadSafe;

/// Keeps the current thread on its CPU.
///
/// # Invariants
///
/// Preemption is off while this exists, and `cpu` is the CPU that it is on.
pub struct CpuGuard {
    cpu: u32,
    _thread: NotThreadSafe,
}

impl CpuGuard {
    /// Turns preemption off: until this is dropped the caller must not sleep. Any context.
    #[inline]
    pub fn new() -> Self {
        // SAFETY: May be called anywhere.
        let cpu = unsafe { bindings::dlh_guest_cpu_get() };
        // INVARIANT: `get_cpu()` has turned preemption off and said where.
        Self { cpu, _thread: NotThreadSafe }
    }

    /// Number of the CPU.
    #[inline]
    pub fn cpu(&self) -> u32 {
        self.cpu
    }
}

impl Default for CpuGuard {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for CpuGuard {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: By the type invariant, this ends what `new()` began.
        unsafe { bindings::dlh_guest_cpu_put() }
    }
}

/// The time stamp counter, read after everything before it has been executed. Any context.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: May be called anywhere.
    unsafe { bindings::dlh_guest_tsc() }
}

/// The rate of [`tsc`] in kHz, as the kernel believes it to be. Any context.
pub fn tsc_khz() -> u32 {
    // SAFETY: May be called anywhere.
    unsafe { bindings::dlh_guest_tsc_khz() }
}

/// Sleeps `us` microseconds, and up to an eighth more, without counting as load.
pub fn sleep_us(us: u32) {
    // SAFETY: The worst that can come of sleeping where one must not is the scheduler's complaint,
    // as with the kernel crate's `fsleep()`.
    unsafe { bindings::dlh_guest_sleep(us, false) }
}

/// Sleeps `us` microseconds and at most a timer tick more, without counting as load: as a rule on to the CPU's next
/// tick, without an interrupt of its own.
pub fn sleep_to_tick(us: u32) {
    // SAFETY: As above.
    unsafe { bindings::dlh_guest_sleep(us, true) }
}

/// Whether the current CPU has nothing else to run: to sleep is to idle then. Any context; a hint.
pub fn cpu_is_ours() -> bool {
    // SAFETY: May be called anywhere.
    unsafe { bindings::dlh_guest_cpu_is_ours() }
}
