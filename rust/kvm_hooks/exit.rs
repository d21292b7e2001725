// SPDX-License-Identifier: GPL-2.0

//! The exit path, by tracepoint probes: every VM exit, and every return from KVM_RUN to the VMM.

use core::{ffi::c_void, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::{error::to_result, prelude::*, sync::Arc};
use kvm_vm::Vcpu;
use own_work::{Linger, OwnQueue};
use rcu_table::Reader;

use crate::events::{Exits, Missing};

/// The two probes, for one kind of receiver; attached while somebody listens and a minute longer, so that
/// they cost nothing where nobody does.
#[pin_data]
pub struct ExitProbes<E: Exits> {
    left: Tracepoint,
    #[pin]
    attached: Linger<Attached<E>>,
}

/// A tracepoint of kvm.ko, which our symbols keep loaded.
#[derive(Clone, Copy)]
struct Tracepoint(NonNull<bindings::tracepoint>);

// SAFETY: Static data of kvm.ko.
unsafe impl Send for Tracepoint {}
// SAFETY: As above.
unsafe impl Sync for Tracepoint {}

/// The probes, attached until this is dropped, which may sleep.
///
/// # Invariants
///
/// Both probes are attached with `events` as their data.
struct Attached<E: Exits> {
    left: Tracepoint,
    events: Arc<E>,
}

impl<E: Exits> Attached<E> {
    fn new(left: Tracepoint, events: Arc<E>) -> Result<Self> {
        let data = Arc::as_ptr(&events).cast_mut().cast::<c_void>();
        // SAFETY: The probe takes what `data` is, and the `Arc` stored below keeps it alive.
        to_result(unsafe { bindings::dlh_tracepoint_attach_exit(Some(exit_probe::<E>), data) })?;
        // SAFETY: As above.
        let attached = to_result(unsafe {
            bindings::dlh_tracepoint_attach_left(left.0.as_ptr(), Some(left_probe::<E>), data)
        });
        if let Err(e) = attached {
            // SAFETY: Attached just above; may sleep here.
            unsafe {
                bindings::dlh_tracepoint_detach_exit(Some(exit_probe::<E>), data);
                bindings::dlh_tracepoint_synchronize();
            }
            return Err(e);
        }
        // INVARIANT: Both were attached above.
        Ok(Self { left, events })
    }
}

impl<E: Exits> Drop for Attached<E> {
    fn drop(&mut self) {
        let data = Arc::as_ptr(&self.events).cast_mut().cast::<c_void>();
        // SAFETY: By the type invariant both are attached with this data; may sleep here. When this
        // returns neither probe runs.
        unsafe {
            bindings::dlh_tracepoint_detach_exit(Some(exit_probe::<E>), data);
            bindings::dlh_tracepoint_detach_left(self.left.0.as_ptr(), Some(left_probe::<E>), data);
            bindings::dlh_tracepoint_synchronize();
        }
    }
}

impl<E: Exits> ExitProbes<E> {
    /// Finds the tracepoints. The probes are detached on `works`. May sleep.
    ///
    /// # Errors
    ///
    /// Names the one this kernel lacks.
    pub fn find(works: Arc<OwnQueue>) -> Result<Arc<Self>, Missing> {
        let missing = |error| Missing { name: c"kvm_userspace_exit (tracepoint)", error };
        // SAFETY: May sleep here.
        let found = unsafe { bindings::dlh_tracepoint_left() };
        let left = Tracepoint(NonNull::new(found).ok_or(missing(ENOENT))?);
        let probes = try_pin_init!(Self { left, attached <- Linger::new(works) }? Error);
        Arc::pin_init(probes, GFP_KERNEL).map_err(missing)
    }

    /// Has `events` hear of every exit until the result is dropped, and perhaps a minute longer. All who
    /// listen must name the same receiver. May sleep.
    pub fn listen(self: &Arc<Self>, events: &Arc<E>) -> Result<Listening<E>> {
        self.attached.enter(|| Attached::new(self.left, events.clone()))?;
        // INVARIANT: Just counted.
        Ok(Listening { probes: self.clone() })
    }

    /// Detaches the probes for good, and lets go of the receiver. On return neither runs. May sleep.
    pub fn close(&self) {
        self.attached.close();
    }
}

/// Somebody listens to exits until this is dropped, which may sleep.
///
/// # Invariants
///
/// Counted among the users of `probes`.
pub struct Listening<E: Exits> {
    probes: Arc<ExitProbes<E>>,
}

impl<E: Exits> Drop for Listening<E> {
    fn drop(&mut self) {
        self.probes.attached.leave();
    }
}

/// Probe of `kvm_exit`.
///
/// # Safety
///
/// `data` is what it was attached with; `vcpu` has just exited on this thread.
unsafe extern "C" fn exit_probe<E: Exits>(
    data: *mut c_void,
    vcpu: *mut bindings::kvm_vcpu,
    _isa: u32,
) {
    // SAFETY: `data` is the `events` in `Attached`, kept until the probes are detached and waited for.
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
unsafe extern "C" fn left_probe<E: Exits>(data: *mut c_void, _reason: u32, _error: i32) {
    // SAFETY: As in `exit_probe`.
    unsafe { &*data.cast::<E>() }.left();
}
