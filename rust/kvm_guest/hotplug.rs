// SPDX-License-Identifier: GPL-2.0

//! CPUs that come and go.
//!
//! C header: `include/linux/cpuhotplug.h`.

use dlh_bindings as bindings;
use kernel::{container_of, error::to_result, prelude::*, str::CStr, sync::Arc, types::Opaque};

/// Who hears of CPUs.
pub trait CpuEvents: Send + Sync + 'static {
    /// The CPU is there. On a thread of that CPU, which cannot leave it; may sleep.
    fn online(&self, cpu: u32);

    /// The CPU is about to go. On a thread of that CPU, which cannot leave it; may sleep.
    fn offline(&self, cpu: u32);
}

/// Has `T` hear of the CPUs that are there, and of all that come and go, until this is dropped. Then
/// it hears that all go.
///
/// # Invariants
///
/// `state` was created for `T`, and `node` is an instance of it.
#[pin_data(PinnedDrop)]
pub struct CpuHotplug<T: CpuEvents> {
    #[pin]
    node: Opaque<bindings::hlist_node>,
    state: i32,
    events: Arc<T>,
}

// SAFETY: The instance belongs to no thread.
unsafe impl<T: CpuEvents> Send for CpuHotplug<T> {}
// SAFETY: There are no methods on a shared reference.
unsafe impl<T: CpuEvents> Sync for CpuHotplug<T> {}

impl<T: CpuEvents> CpuHotplug<T> {
    /// `events` has heard of every CPU when this returns. `name` shows in
    /// `/sys/devices/system/cpu/hotplug/states`. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `ENOSPC` if the kernel has no state left.
    pub fn new(name: &'static CStr, events: Arc<T>) -> Result<Pin<KBox<Self>>> {
        // SAFETY: `name` lives as long as the module, and the callbacks take what `node` is.
        let state = unsafe {
            bindings::dlh_guest_cpuhp_create(
                name.as_char_ptr(),
                Some(online::<T>),
                Some(offline::<T>),
            )
        };
        let state = to_result(state).map(|()| state)?;
        let this = KBox::pin(Self { node: Opaque::zeroed(), state, events }, GFP_KERNEL);
        let added = match &this {
            // SAFETY: `node` is pinned, within a `Self`, and stays until `drop` removes it.
            Ok(this) => to_result(unsafe { bindings::dlh_guest_cpuhp_add(state, this.node.get()) }),
            Err(_) => Err(ENOMEM),
        };
        match (this, added) {
            // INVARIANT: Just created and added.
            (Ok(this), Ok(())) => Ok(this),
            (this, added) => {
                // `drop` would remove an instance that is none.
                core::mem::forget(this);
                // SAFETY: Created above, and has no instances.
                unsafe { bindings::dlh_guest_cpuhp_destroy(state) };
                added?;
                Err(ENOMEM)
            }
        }
    }
}

#[pinned_drop]
impl<T: CpuEvents> PinnedDrop for CpuHotplug<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant; may sleep here. No callback runs afterwards.
        unsafe {
            bindings::dlh_guest_cpuhp_remove(self.state, self.node.get());
            bindings::dlh_guest_cpuhp_destroy(self.state);
        }
    }
}

/// # Safety
///
/// `node` must be that of a live `CpuHotplug<T>`.
unsafe fn events<'a, T: CpuEvents>(node: *mut bindings::hlist_node) -> &'a T {
    // SAFETY: By the safety requirements.
    let this = unsafe { &*container_of!(Opaque::cast_from(node), CpuHotplug<T>, node) };
    &this.events
}

/// # Safety
///
/// For the hotplug state that [`CpuHotplug::new`] creates.
unsafe extern "C" fn online<T: CpuEvents>(cpu: u32, node: *mut bindings::hlist_node) -> i32 {
    // SAFETY: Only instances of a `CpuHotplug<T>` are added to the state.
    unsafe { events::<T>(node) }.online(cpu);
    0
}

/// # Safety
///
/// As for [`online`].
unsafe extern "C" fn offline<T: CpuEvents>(cpu: u32, node: *mut bindings::hlist_node) -> i32 {
    // SAFETY: As in `online()`.
    unsafe { events::<T>(node) }.offline(cpu);
    0
}
