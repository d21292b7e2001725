// SPDX-License-Identifier: GPL-2.0

//! The writes of guests to pages that are not mapped, as KVM's tracepoint `kvm_page_fault` tells of them.
//!
//! The probe is attached only while some VM is watched, and what it costs does not grow with their number.
//!
//! C header: `arch/x86/kvm/trace.h`

use core::ffi::c_void;

use dlh_abi::{Gfn, Gpa};
use dlh_bindings as bindings;
use kernel::{
    error::to_result,
    new_mutex,
    prelude::*,
    sync::{rcu, Arc, Mutex},
};
use kvm_vm::{Vcpu, Vm, VmKey};
use rcu_table::{Reader, Table};

/// Who watches a VM.
pub trait FaultEvents: Send + Sync + 'static {
    /// The guest has written to `gfn`, which was not mapped, or not for writing. More than that page may
    /// be mapped in consequence. `generation` is that of the memslots.
    ///
    /// # Context
    ///
    /// On the vCPU's thread, in a tracepoint: must not sleep; spin locks may be taken.
    fn written(&self, gfn: Gfn, generation: u64);
}

/// The VMs that are watched.
#[pin_data]
pub struct Faults<T: FaultEvents> {
    #[pin]
    watched: Table<T>,
    /// How many there are. The probe is attached while it is not 0.
    #[pin]
    count: Mutex<usize>,
}

impl<T: FaultEvents> Faults<T> {
    /// Nothing is watched. May sleep.
    pub fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self { watched <- Table::new(), count <- new_mutex!(0) }? Error),
            GFP_KERNEL,
        )
    }

    /// Has `events` hear of the guest's writes until the result is dropped. May sleep.
    pub fn watch(self: &Arc<Self>, vm: &Vm, events: Arc<T>) -> Result<Watching<T>> {
        {
            let mut count = self.count.lock();
            if *count == 0 {
                // SAFETY: The probe takes what the data is, which whoever watches keeps.
                to_result(unsafe {
                    bindings::dlh_tracepoint_attach_fault(Some(fault_probe::<T>), self.data())
                })?;
            }
            *count += 1;
        }
        // INVARIANT: Just counted.
        let watching = Watching { faults: self.clone(), vm: vm.key(), events: events.clone() };
        self.watched.insert(vm.key().as_usize(), events)?;
        Ok(watching)
    }

    fn data(self: &Arc<Self>) -> *mut c_void {
        Arc::as_ptr(self).cast_mut().cast()
    }
}

/// Somebody watches a VM until this is dropped, which may sleep.
///
/// # Invariants
///
/// Counted in `faults`.
pub struct Watching<T: FaultEvents> {
    faults: Arc<Faults<T>>,
    vm: VmKey,
    events: Arc<T>,
}

impl<T: FaultEvents> Drop for Watching<T> {
    fn drop(&mut self) {
        let ours = |events: &Arc<T>| Arc::ptr_eq(events, &self.events);
        drop(self.faults.watched.unlink(self.vm.as_usize(), ours));
        let mut count = self.faults.count.lock();
        *count -= 1;
        if *count == 0 {
            // SAFETY: Attached with this data when the count was first raised; may sleep here.
            unsafe {
                bindings::dlh_tracepoint_detach_fault(Some(fault_probe::<T>), self.faults.data())
            }
        }
    }
}

/// Probe of `kvm_page_fault`.
///
/// # Safety
///
/// `data` is what it was attached with; `vcpu` has just exited on this thread.
unsafe extern "C" fn fault_probe<T: FaultEvents>(
    data: *mut c_void,
    vcpu: *mut bindings::kvm_vcpu,
    address: u64,
    error: u64,
) {
    // SAFETY: `data` is the `Faults<T>` that was attached, kept until the probe is detached and waited for.
    let faults = unsafe { &*data.cast::<Faults<T>>() };
    // SAFETY: The tracepoint fires on the thread that runs this vCPU.
    let vm = unsafe { Vcpu::from_raw(vcpu) }.vm();
    let key = vm.key().as_usize();
    // SAFETY: As above.
    if faults.watched.is_vacant(key) || !unsafe { bindings::dlh_fault_writes_gpa(vcpu, error) } {
        return;
    }
    let guard = rcu::read_lock();
    if let Some(events) = faults.watched.find(key, Reader::of(&guard)) {
        events.written(Gpa(address).gfn(), vm.generation());
    }
}
