// SPDX-License-Identifier: GPL-2.0

//! The hypercall exit, and the beginning and the end of a VM, by ftrace.
//!
//! ftrace sends our hypercalls, and only ours, from `____kvm_emulate_hypercall` to [`hypercall_entry`];
//! `kvm_arch_create_vm_debugfs` and `kvm_arch_destroy_vm` merely report to the other two entries.

use core::{
    ffi::c_void,
    marker::PhantomData,
    ptr::{null_mut, NonNull},
};

use dlh_bindings as bindings;
use kernel::{
    error::to_result,
    prelude::*,
    str::CStr,
    sync::{
        atomic::{
            ordering::{Acquire, Full, Release},
            Atomic,
        },
        Arc, Srcu,
    },
};
use kvm_vm::{Vcpu, Vm};

use crate::events::{Events, HypercallArgs, Missing};

/// What the entries below find when KVM calls them.
struct Target<E> {
    events: Arc<E>,
    in_flight: Pin<KBox<Srcu>>,
}

/// The target of the one registration there can be; null while there is none.
static TARGET: Atomic<*mut c_void> = Atomic::new(null_mut());

/// The hooks, attached.
///
/// # Invariants
///
/// While the hooks are attached `TARGET` points to `target`, whose events are of type `E`, and the
/// entries registered are those for `E`. The hooks on hypercalls and on the beginning of VMs are attached
/// exactly while `admits`.
pub struct Hooks<E: Events> {
    target: NonNull<Target<E>>,
    admits: bool,
    _owns: PhantomData<Target<E>>,
}

// SAFETY: The target is shared between threads already; unhooking may be done by any of them.
unsafe impl<E: Events> Send for Hooks<E> {}
// SAFETY: There are no methods on a shared reference.
unsafe impl<E: Events> Sync for Hooks<E> {}

impl<E: Events> Hooks<E> {
    /// Attaches all hooks. May sleep.
    ///
    /// # Errors
    ///
    /// Names the hook that could not be made; the others are gone again then.
    pub fn attach(events: Arc<E>) -> Result<Self, Missing> {
        let hypercall = |error| Missing { name: symbol(bindings::dlh_hypercall_symbol), error };
        let destroy = |error| Missing { name: symbol(bindings::dlh_destroy_symbol), error };
        let create = |error| Missing { name: symbol(bindings::dlh_create_symbol), error };

        let in_flight = KBox::pin_init(
            Srcu::new(c"kvm_dlh_hypercall", kernel::static_lock_class!()),
            GFP_KERNEL,
        )
        .map_err(hypercall)?;
        let target =
            KBox::new(Target { events, in_flight }, GFP_KERNEL).map_err(|e| hypercall(e.into()))?;
        let target = KBox::into_raw(target);
        // Two registrations at once would mix up their types.
        if TARGET.cmpxchg(null_mut(), target.cast(), Full).is_err() {
            // SAFETY: Just made from a box and not published.
            drop(unsafe { KBox::from_raw(target) });
            return Err(hypercall(EBUSY));
        }
        let forget = || {
            TARGET.store(null_mut(), Release);
            // SAFETY: Made from a box above; no hook is attached that could use it.
            drop(unsafe { KBox::from_raw(target) });
        };

        // SAFETY: The entry is for `E`, as is `TARGET`, which stays until the hook is gone.
        if let Err(e) = to_result(unsafe { bindings::dlh_destroy_hook(Some(destroy_entry::<E>)) }) {
            forget();
            return Err(destroy(e));
        }
        // SAFETY: As above.
        if let Err(e) = to_result(unsafe { bindings::dlh_create_hook(Some(create_entry::<E>)) }) {
            // SAFETY: The hook is attached. When this returns no CPU is inside it: ftrace waits.
            unsafe { bindings::dlh_destroy_unhook() };
            forget();
            return Err(create(e));
        }
        // SAFETY: As above.
        let hooked = unsafe { bindings::dlh_hypercall_hook(Some(hypercall_entry::<E>)) };
        if let Err(e) = to_result(hooked) {
            // SAFETY: As above. Work that the first may have queued keeps what it needs.
            unsafe {
                bindings::dlh_create_unhook();
                bindings::dlh_destroy_unhook();
            }
            forget();
            return Err(hypercall(e));
        }
        // INVARIANT: All are attached; `TARGET` was set above. A box is never null.
        // SAFETY: From a box.
        let target = unsafe { NonNull::new_unchecked(target) };
        Ok(Self { target, admits: true, _owns: PhantomData })
    }

    /// Detaches the hooks on hypercalls and on the beginning of VMs: on return neither is in the module's
    /// hands, nor will be. The end of VMs goes on being reported. May sleep.
    pub fn admit_none(&mut self) {
        if !core::mem::take(&mut self.admits) {
            return;
        }
        // SAFETY: By the type invariant the hooks are attached; ftrace waits until no task is about to
        // call an entry (synchronize_rcu_tasks), unless it sleeps inside it.
        unsafe {
            bindings::dlh_create_unhook();
            bindings::dlh_hypercall_unhook();
        }
        // Those that sleep inside it hold this.
        // SAFETY: By the type invariant the target is valid.
        unsafe { self.target.as_ref() }.in_flight.synchronize();
        // Those that have let go of it may still be at the entry's last instructions.
        crate::synchronize_tasks();
    }
}

impl<E: Events> Drop for Hooks<E> {
    /// Detaches all hooks. May sleep.
    fn drop(&mut self) {
        self.admit_none();
        // SAFETY: By the type invariant the hook is attached; ftrace waits for those inside it.
        unsafe { bindings::dlh_destroy_unhook() };
        TARGET.store(null_mut(), Release);
        // SAFETY: Made from a box in `attach`; no entry can be running or start.
        drop(unsafe { KBox::from_raw(self.target.as_ptr()) });
    }
}

fn symbol(name: unsafe extern "C" fn() -> *const kernel::ffi::c_char) -> &'static CStr {
    // SAFETY: The helpers return string literals.
    unsafe { CStr::from_char_ptr(name()) }
}

/// Stands in for `____kvm_emulate_hypercall(vcpu, cpl, complete)`: 1 tells KVM to pass on the result, an error to
/// return from KVM_RUN with that, and to leave the guest where it is.
///
/// # Safety
///
/// Called in place of that function, by its caller.
unsafe extern "C" fn hypercall_entry<E: Events>(
    vcpu: *mut bindings::kvm_vcpu,
    _cpl: i32,
    _complete: *mut c_void,
) -> i32 {
    // SAFETY: Set to a `Target<E>` before this entry was hooked, and valid until it is unhooked and no
    // task is inside it: unhooking waits for tasks before, within and after the section below.
    let target = unsafe { &*TARGET.load(Acquire).cast::<Target<E>>() };
    let _in_flight = target.in_flight.read_lock();
    // SAFETY: KVM calls on the thread that runs this vCPU.
    let handle = unsafe { Vcpu::from_raw(vcpu) };
    let mut call = bindings::dlh_hypercall::default();
    // SAFETY: The vCPU is loaded on this thread, so its registers are current.
    unsafe { bindings::dlh_hypercall_read(vcpu, &mut call) };
    let args = HypercallArgs { function: call.function, arg: call.arg };
    // A call may wait for as long as an operation takes; nobody shall wait for that to change memslots.
    // SAFETY: KVM holds it here, on this thread, and its callers use no memslot that they found before.
    unsafe { bindings::dlh_vcpu_srcu_unlock(vcpu) };
    let result = E::hypercall(target.events.as_arc_borrow(), handle, args);
    // SAFETY: As KVM left it.
    unsafe { bindings::dlh_vcpu_srcu_lock(vcpu) };
    let Ok(rax) = result else { return EINTR.to_errno() };
    // SAFETY: `vcpu->run` belongs to this thread while it is in KVM_RUN.
    unsafe { bindings::dlh_hypercall_return(vcpu, rax) };
    1
}

/// Called when `kvm_arch_create_vm_debugfs(kvm)` is.
///
/// # Safety
///
/// `kvm` is allocated and counted.
unsafe extern "C" fn create_entry<E: Events>(kvm: *mut bindings::kvm) {
    // SAFETY: As in `hypercall_entry`; ftrace waits for callbacks to return before unhooking ends.
    let target = unsafe { &*TARGET.load(Acquire).cast::<Target<E>>() };
    // SAFETY: KVM is just making it.
    E::created(target.events.as_arc_borrow(), unsafe { Vm::from_raw(kvm) });
}

/// Called when `kvm_arch_destroy_vm(kvm)` is.
///
/// # Safety
///
/// `kvm` is still allocated.
unsafe extern "C" fn destroy_entry<E: Events>(kvm: *mut bindings::kvm) {
    // SAFETY: As in `hypercall_entry`; ftrace waits for callbacks to return before unhooking ends.
    let target = unsafe { &*TARGET.load(Acquire).cast::<Target<E>>() };
    // SAFETY: KVM frees it only after the function that was hooked.
    target.events.destroyed(unsafe { Vm::from_raw(kvm) }.key());
}
