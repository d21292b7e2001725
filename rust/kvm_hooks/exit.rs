// SPDX-License-Identifier: GPL-2.0

//! The exit path, by tracepoint probes: every VM exit, and every return from KVM_RUN to the VMM.

use core::{ffi::c_void, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::{
    error::to_result,
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};
use kvm_vm::Vcpu;
use rcu_table::Reader;

use crate::{Events, Missing};

/// The two probes, for one kind of receiver; attached only while somebody listens, so that they cost
/// nothing otherwise.
#[pin_data]
pub struct ExitProbes<E: Events> {
    left: NonNull<bindings::tracepoint>,
    #[pin]
    listeners: Mutex<Listeners<E>>,
}

/// # Invariants
///
/// The probes are attached with `events` as their data exactly while it is `Some`, which is exactly
/// while `count` is not 0.
struct Listeners<E> {
    count: usize,
    events: Option<Arc<E>>,
}

// SAFETY: The tracepoint is static data of kvm.ko; `E` is `Send` and `Sync`.
unsafe impl<E: Events> Send for ExitProbes<E> {}
// SAFETY: All that changes is behind a mutex.
unsafe impl<E: Events> Sync for ExitProbes<E> {}

impl<E: Events> ExitProbes<E> {
    /// Finds the tracepoints. May sleep.
    ///
    /// # Errors
    ///
    /// Names the one this kernel lacks.
    pub fn find() -> Result<Arc<Self>, Missing> {
        let missing = |error| Missing { name: c"kvm_userspace_exit (tracepoint)", error };
        // SAFETY: May sleep here.
        let found = unsafe { bindings::dlh_tracepoint_left() };
        let left = NonNull::new(found).ok_or(missing(ENOENT))?;
        Arc::pin_init(
            // INVARIANT: Nothing is attached, nobody listens.
            pin_init!(Self { left, listeners <- new_mutex!(Listeners { count: 0, events: None }) }),
            GFP_KERNEL,
        )
        .map_err(missing)
    }

    /// Has `events` hear of every exit until the result is dropped. All who listen at the same time
    /// must name the same receiver; the first one's is used. May sleep.
    pub fn listen(self: &Arc<Self>, events: &Arc<E>) -> Result<Listening<E>> {
        let mut listeners = self.listeners.lock();
        if listeners.count == 0 {
            let data = Arc::as_ptr(events).cast_mut().cast::<c_void>();
            // SAFETY: The probe takes what `data` is, and the `Arc` stored below keeps it alive.
            to_result(unsafe {
                bindings::dlh_tracepoint_attach_exit(Some(exit_probe::<E>), data)
            })?;
            // SAFETY: As above; the tracepoint is in kvm.ko, which our symbols keep loaded.
            let left = to_result(unsafe {
                bindings::dlh_tracepoint_attach_left(
                    self.left.as_ptr(),
                    Some(left_probe::<E>),
                    data,
                )
            });
            if let Err(e) = left {
                // SAFETY: Attached just above; may sleep here.
                unsafe {
                    bindings::dlh_tracepoint_detach_exit(Some(exit_probe::<E>), data);
                    bindings::dlh_tracepoint_synchronize();
                }
                return Err(e);
            }
            // INVARIANT: Attached, and counted below.
            listeners.events = Some(events.clone());
        }
        listeners.count += 1;
        Ok(Listening { probes: self.clone() })
    }

    fn leave(&self) {
        let mut listeners = self.listeners.lock();
        listeners.count -= 1;
        if listeners.count > 0 {
            return;
        }
        let events = listeners.events.take();
        if let Some(events) = &events {
            let data = Arc::as_ptr(events).cast_mut().cast::<c_void>();
            // SAFETY: By the type invariant both are attached with this data; may sleep here. When
            // this returns neither probe runs.
            unsafe {
                bindings::dlh_tracepoint_detach_exit(Some(exit_probe::<E>), data);
                bindings::dlh_tracepoint_detach_left(
                    self.left.as_ptr(),
                    Some(left_probe::<E>),
                    data,
                );
                bindings::dlh_tracepoint_synchronize();
            }
        }
        drop(listeners);
        drop(events);
    }
}

/// Somebody listens to exits until this is dropped, which may sleep.
///
/// # Invariants
///
/// Counted among the listeners of `probes`.
pub struct Listening<E: Events> {
    probes: Arc<ExitProbes<E>>,
}

impl<E: Events> Drop for Listening<E> {
    fn drop(&mut self) {
        self.probes.leave();
    }
}

/// Probe of `kvm_exit`.
///
/// # Safety
///
/// `data` is what it was attached with; `vcpu` has just exited on this thread.
unsafe extern "C" fn exit_probe<E: Events>(
    data: *mut c_void,
    vcpu: *mut bindings::kvm_vcpu,
    _isa: u32,
) {
    // SAFETY: `data` is the `events` in `Listeners`, kept until the probes are detached and waited for.
    let events = unsafe { &*data.cast::<E>() };
    // SAFETY: The tracepoint fires with interrupts off, once RCU watches again, and this returns first.
    let reader = unsafe { Reader::interrupts_off() };
    // SAFETY: The tracepoint fires on the thread that runs this vCPU.
    events.exited(unsafe { Vcpu::from_raw(vcpu) }, reader);
}

/// Probe of `kvm_userspace_exit`.
///
/// # Safety
///
/// `data` is what it was attached with.
unsafe extern "C" fn left_probe<E: Events>(data: *mut c_void, _reason: u32, _error: i32) {
    // SAFETY: As in `exit_probe`.
    unsafe { &*data.cast::<E>() }.left();
}
