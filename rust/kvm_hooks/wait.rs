// SPDX-License-Identifier: GPL-2.0

//! Waiting for what another thread of a VMM does. The kernel crate's condition variables do not let a
//! task be frozen that waits without heeding signals.
//!
//! C header: `include/linux/wait_bit.h`

use core::ffi::c_void;

use dlh_bindings as bindings;

/// The current task is being killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Killed;

/// Waits until `done`, which is asked again after each [`wake`] of the same object, or somebody kills the task. Other
/// signals do not end the wait; the task may be frozen (suspend) meanwhile.
///
/// # Context
///
/// May sleep. `done` is called on this thread, and must not sleep.
pub fn wait_killable<T, F: Fn() -> bool>(object: &T, done: F) -> Result<(), Killed> {
    if wait(object, &done, true) {
        Ok(())
    } else {
        Err(Killed)
    }
}

/// As [`wait_killable`], but nothing else ends it: for who must not go on before. It does not count as hung.
pub fn wait_until<T, F: Fn() -> bool>(object: &T, done: F) {
    wait(object, &done, false);
}

fn wait<T, F: Fn() -> bool>(object: &T, done: &F, killable: bool) -> bool {
    let object = core::ptr::from_ref(object).cast_mut().cast::<c_void>();
    let data = core::ptr::from_ref(done).cast_mut().cast::<c_void>();
    // SAFETY: The address of the object is only compared; `data` is what `call` takes, until this returns.
    unsafe { bindings::dlh_wait_until(object, Some(call::<F>), data, killable) }
}

/// Sleeps for a millisecond. On a user thread; may sleep; no locks.
pub fn sleep_a_moment() -> Result<(), Killed> {
    // SAFETY: May sleep here.
    if unsafe { bindings::dlh_sleep_killable(1_000) } {
        Ok(())
    } else {
        Err(Killed)
    }
}

/// Has those who wait for `object` ask again. Any context.
pub fn wake<T>(object: &T) {
    // SAFETY: The address is only compared.
    unsafe { bindings::dlh_wake(core::ptr::from_ref(object).cast_mut().cast()) }
}

/// # Safety
///
/// `done` points to an `F`.
unsafe extern "C" fn call<F: Fn() -> bool>(done: *mut c_void) -> bool {
    // SAFETY: By the caller's promise.
    let done = unsafe { &*done.cast::<F>() };
    done()
}
