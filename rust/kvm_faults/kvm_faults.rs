// SPDX-License-Identifier: GPL-2.0

//! The writes of guests to pages that are not mapped, as KVM's tracepoint `kvm_page_fault` tells of them.
//!
//! The probe is attached while some VM is watched and a minute longer, and what it costs does not grow with
//! their number.
//!
//! C header: `arch/x86/kvm/trace.h`

use core::ffi::c_void;

use dlh_abi::{Gfn, Gpa};
use dlh_bindings as bindings;
use kernel::{
    error::to_result,
    prelude::*,
    sync::{rcu, Arc},
};
use kvm_vm::{Vcpu, Vm};
use own_work::{Linger, OwnQueue};
use rcu_table::{Link, Linked, Reader, Table};

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
    watched: Arc<Table<Watched<T>>>,
    #[pin]
    attached: Linger<Attached<T>>,
}

struct Watched<T: FaultEvents> {
    events: Arc<T>,
    link: Link<Self>,
}

// SAFETY: A field of the object, always the same.
unsafe impl<T: FaultEvents> Linked for Watched<T> {
    fn link(&self) -> &Link<Self> {
        &self.link
    }
}

/// The probe, attached until this is dropped, which may sleep.
///
/// # Invariants
///
/// It is attached, with the table as its data.
struct Attached<T: FaultEvents>(Arc<Table<Watched<T>>>);

impl<T: FaultEvents> Attached<T> {
    fn new(watched: Arc<Table<Watched<T>>>) -> Result<Self> {
        // SAFETY: The probe takes what the data is, and the `Arc` keeps it alive.
        to_result(unsafe {
            bindings::dlh_tracepoint_attach_fault(Some(fault_probe::<T>), data(&watched))
        })?;
        // INVARIANT: Just attached.
        Ok(Self(watched))
    }
}

impl<T: FaultEvents> Drop for Attached<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; may sleep here. When this returns the probe does not run.
        unsafe { bindings::dlh_tracepoint_detach_fault(Some(fault_probe::<T>), data(&self.0)) }
    }
}

fn data<T: FaultEvents>(watched: &Arc<Table<Watched<T>>>) -> *mut c_void {
    Arc::as_ptr(watched).cast_mut().cast()
}

impl<T: FaultEvents> Faults<T> {
    /// Nothing is watched. May sleep.
    pub fn new() -> Result<Arc<Self>> {
        let works = Arc::new(OwnQueue::new()?, GFP_KERNEL)?;
        let watched = Arc::pin_init(Table::new(), GFP_KERNEL)?;
        let faults = try_pin_init!(Self { watched, attached <- Linger::new(works) }? Error);
        Arc::pin_init(faults, GFP_KERNEL)
    }

    /// Has `events` hear of the guest's writes until the result is dropped. On a thread of the VMM, which
    /// the memory for it is charged to; may sleep.
    pub fn watch(self: &Arc<Self>, vm: &Vm, events: Arc<T>) -> Result<Watching<T>> {
        let watched = Arc::new(Watched { events, link: Link::new() }, GFP_KERNEL_ACCOUNT)?;
        self.attached.enter(|| Attached::new(self.watched.clone()))?;
        // INVARIANT: Just counted.
        let watching = Watching { faults: self.clone(), watched: watched.clone() };
        self.watched.insert(vm.key().as_usize(), watched)?;
        Ok(watching)
    }
}

/// Somebody watches a VM until this is dropped, which may sleep.
///
/// # Invariants
///
/// Counted in `faults`.
pub struct Watching<T: FaultEvents> {
    faults: Arc<Faults<T>>,
    watched: Arc<Watched<T>>,
}

impl<T: FaultEvents> Drop for Watching<T> {
    fn drop(&mut self) {
        drop(self.faults.watched.unlink(&self.watched));
        self.faults.attached.leave();
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
    // SAFETY: `data` is the table in `Attached`, kept until the probe is detached and waited for.
    let watched = unsafe { &*data.cast::<Table<Watched<T>>>() };
    // SAFETY: The tracepoint fires on the thread that runs this vCPU.
    let vm = unsafe { Vcpu::from_raw(vcpu) }.vm();
    let key = vm.key().as_usize();
    // SAFETY: As above.
    if watched.is_vacant(key) || !unsafe { bindings::dlh_fault_writes_gpa(vcpu, error) } {
        return;
    }
    let guard = rcu::read_lock();
    if let Some(found) = watched.find(key, Reader::of(&guard)) {
        found.events.written(Gpa(address).gfn(), vm.generation());
    }
}
