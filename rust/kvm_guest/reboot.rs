// SPDX-License-Identifier: GPL-2.0

//! Being told that this kernel ends: reboot, power off, kexec.
//!
//! C header: `include/linux/reboot.h`.

use dlh_bindings as bindings;
use kernel::{
    bindings::notifier_block,
    container_of,
    error::to_result,
    ffi::{c_int, c_ulong, c_void},
    prelude::*,
    sync::Arc,
    types::Opaque,
};

/// Who is told.
pub trait RebootEvents: Send + Sync + 'static {
    /// This kernel is about to end. May sleep.
    fn ending(&self);
}

/// Has `T` be told until this is dropped.
///
/// # Invariants
///
/// `block` is registered.
#[pin_data(PinnedDrop)]
pub struct RebootNotifier<T: RebootEvents> {
    #[pin]
    block: Opaque<notifier_block>,
    events: Arc<T>,
}

// SAFETY: The notifier belongs to no thread.
unsafe impl<T: RebootEvents> Send for RebootNotifier<T> {}
// SAFETY: There are no methods on a shared reference.
unsafe impl<T: RebootEvents> Sync for RebootNotifier<T> {}

impl<T: RebootEvents> RebootNotifier<T> {
    /// Registers it. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new(events: Arc<T>) -> Result<Pin<KBox<Self>>> {
        let block = notifier_block { notifier_call: Some(ending::<T>), ..Default::default() };
        KBox::try_pin_init(
            try_pin_init!(Self {
                events,
                block <- Opaque::try_ffi_init(move |place: *mut notifier_block| {
                    // SAFETY: The place is ours to fill.
                    unsafe { place.write(block) };
                    // INVARIANT: Registered, or there is no `Self`.
                    // SAFETY: The block is pinned, within a `Self`, and stays until `drop`
                    // unregisters it; `events`, which the callback uses, is there already.
                    to_result(unsafe { bindings::dlh_guest_reboot_register(place.cast()) })
                }),
            }? Error),
            GFP_KERNEL,
        )
    }
}

#[pinned_drop]
impl<T: RebootEvents> PinnedDrop for RebootNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant; may sleep here. The callback does not run afterwards.
        unsafe { bindings::dlh_guest_reboot_unregister(self.block.get().cast()) }
    }
}

/// # Safety
///
/// For the notifier chain, with the block of a [`RebootNotifier<T>`].
unsafe extern "C" fn ending<T: RebootEvents>(
    block: *mut notifier_block,
    _action: c_ulong,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: Only blocks of a `RebootNotifier<T>` are registered with this function.
    let this = unsafe { &*container_of!(Opaque::cast_from(block), RebootNotifier<T>, block) };
    this.events.ending();
    // NOTIFY_DONE
    0
}
