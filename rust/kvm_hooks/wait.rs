// SPDX-License-Identifier: GPL-2.0

//! Waiting for what another thread of a VMM does. The kernel crate's condition variables do not let a
//! task be frozen that waits without heeding signals.
//!
//! C header: `include/linux/wait_bit.h`

use core::ffi::c_void;

use dlh_bindings as bindings;

/// Waits until `done`, which is asked again after each [`wake`] of the same object. Signals do not end
/// the wait; the task may be frozen (suspend, cgroup) meanwhile, as the one it waits for may be.
///
/// # Context
///
/// May sleep. `done` is called on this thread, and must not sleep.
pub fn wait_until<T, F: Fn() -> bool>(object: &T, done: F) {
    let object = core::ptr::from_ref(object).cast_mut().cast::<c_void>();
    let data = core::ptr::from_ref(&done).cast_mut().cast::<c_void>();
    // SAFETY: The address of the object is only compared; `data` is what `call` takes, until this returns.
    unsafe { bindings::dlh_wait_until(object, Some(call::<F>), data) }
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
