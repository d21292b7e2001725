// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/<module>/`: a directory for each VM, for root and for tools.
//!
//! Whoever lists a directory of sysfs, which everybody may, keeps all others from adding and removing one for as long as
//! it takes to store the names in its memory; which may be that of a file that it serves itself. So a VM's directory is made
//! by a work of the module's own, and no vCPU waits for that; it is removed where the VM's context is given up, which holds up
//! nobody but whoever removes the module.
//!
//! C header: `include/linux/kobject.h`

use core::{ffi::c_void, ptr::NonNull};

use dlh_bindings as bindings;
use kernel::{
    current,
    error::from_err_ptr,
    impl_has_work, new_mutex, new_work,
    prelude::*,
    str::{CStr, CString},
    sync::{Arc, Mutex},
    workqueue::{Work, WorkItem},
};
use own_work::OwnQueue;

use crate::Allow;

/// What root may ask for of a VM.
pub trait Asked: Send + Sync + 'static {
    /// The guest is to report all that is free once more. Must not wait for anything.
    fn again(&self);
}

/// The module's directory; gone with the last of this and of what was made in it. Dropping it may sleep, for long.
pub struct Directory(Arc<Root>);

/// It stands until this is dropped, which must not be done by a work of the queue.
///
/// # Invariants
///
/// Owns `kobject`, and outlives all works of `queue`.
struct Root {
    kobject: NonNull<bindings::kobject>,
    queue: OwnQueue,
}

// SAFETY: A kobject belongs to no thread, and is removed once.
unsafe impl Send for Root {}
// SAFETY: What stands in it is added and removed under the kernel's own locks.
unsafe impl Sync for Root {}

impl Directory {
    /// Makes it. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new() -> Result<Self> {
        let queue = OwnQueue::new()?;
        // SAFETY: May sleep here.
        let kobject = NonNull::new(unsafe { bindings::dlh_control_root_create() }).ok_or(ENOMEM)?;
        // INVARIANT: Just made; works are queued by `VmDirectory` only, which keeps this.
        Ok(Self(Arc::new(Root { kobject, queue }, GFP_KERNEL)?))
    }

    /// What stands for a VM of the current process. [`VmDirectory::show`] makes the directory, called `name`, unless
    /// another one has that name. May sleep, but waits for nobody.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn add<T: Asked>(
        &self,
        name: &CStr,
        allow: Arc<Allow>,
        asked: Arc<T>,
    ) -> Result<VmDirectory<T>> {
        let name = CString::try_from(name)?;
        let entry = pin_init!(Entry {
            root: self.0.kobject,
            name,
            pid: current!().tgid(),
            allow,
            asked,
            state <- new_mutex!(State::Wanted),
            work <- new_work!("kvm_control::Entry::work"),
        });
        let entry = Arc::pin_init(entry, GFP_KERNEL_ACCOUNT)?;
        Ok(VmDirectory { entry, root: self.0.clone() })
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.queue.flush();
        // SAFETY: By the type invariant. What was in it has been removed: whoever wanted that has gone.
        unsafe { bindings::dlh_control_root_remove(self.kobject.as_ptr()) }
    }
}

/// The directory of one VM; gone, and nobody inside its files, when this is dropped, which may sleep, for long if it has
/// been shown.
pub struct VmDirectory<T: Asked> {
    entry: Arc<Entry<T>>,
    root: Arc<Root>,
}

impl<T: Asked> VmDirectory<T> {
    /// Has it made, soon. Without memory for it, or where the name is taken, there is none. Waits for nobody.
    pub fn show(&self) {
        // Not where it is queued already: then it has not looked yet.
        let _ = self.root.queue.enqueue(self.entry.clone());
    }
}

impl<T: Asked> Drop for VmDirectory<T> {
    fn drop(&mut self) {
        let state = core::mem::replace(&mut *self.entry.state.lock(), State::Unwanted);
        drop(state);
    }
}

/// What a work makes a directory of.
///
/// # Invariants
///
/// `root` outlives the work: [`Root`] waits for it.
#[pin_data]
struct Entry<T: Asked> {
    root: NonNull<bindings::kobject>,
    name: CString,
    pid: i32,
    allow: Arc<Allow>,
    asked: Arc<T>,
    /// Locked while the directory is made: whoever removes it waits for that.
    #[pin]
    state: Mutex<State<T>>,
    #[pin]
    work: Work<Entry<T>>,
}

enum State<T: Asked> {
    Wanted,
    Made { _control: Control<T> },
    Unwanted,
}

// SAFETY: `root` may be used by any thread.
unsafe impl<T: Asked> Send for Entry<T> {}
// SAFETY: As above; the rest may be shared.
unsafe impl<T: Asked> Sync for Entry<T> {}

impl_has_work! {
    impl{T: Asked} HasWork<Self> for Entry<T> { self.work }
}

impl<T: Asked> WorkItem for Entry<T> {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let mut state = this.state.lock();
        if matches!(*state, State::Wanted) {
            if let Ok(control) = Control::new(&this) {
                *state = State::Made { _control: control };
            }
        }
    }
}

/// A directory that is there; gone, and nobody inside its files, when this is dropped, which may sleep, for long.
///
/// # Invariants
///
/// Owns `raw`; what root says in it goes to `allow` and to `asked`.
struct Control<T: Asked> {
    raw: NonNull<bindings::dlh_control>,
    _allow: Arc<Allow>,
    _asked: Arc<T>,
}

// SAFETY: A directory may be removed on any thread.
unsafe impl<T: Asked> Send for Control<T> {}

impl<T: Asked> Control<T> {
    /// Makes it, on the work; may sleep, for long.
    fn new(entry: &Entry<T>) -> Result<Self> {
        let (root, allow, asked) = (entry.root.as_ptr(), entry.allow.clone(), entry.asked.clone());
        let said = bindings::dlh_said {
            choice: allow.choice(),
            again: Some(again::<T>),
            data: Arc::as_ptr(&asked).cast(),
        };
        // SAFETY: By the invariant of `Entry` the root is there. The name ends with a zero. What root says goes to
        // what is kept for longer than the directory; `again` takes what the data is.
        let raw = from_err_ptr(unsafe {
            bindings::dlh_control_add(root, entry.name.as_char_ptr(), entry.pid, &said)
        })?;
        // INVARIANT: Just made, for these two.
        Ok(Self { raw: NonNull::new(raw).ok_or(ENOMEM)?, _allow: allow, _asked: asked })
    }
}

impl<T: Asked> Drop for Control<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is ours, and removed once. May sleep.
        unsafe { bindings::dlh_control_remove(self.raw.as_ptr()) }
    }
}

/// # Safety
///
/// `data` points to a `T`, which stays while this runs.
unsafe extern "C" fn again<T: Asked>(data: *const c_void) {
    // SAFETY: By the caller's promise.
    unsafe { &*data.cast::<T>() }.again();
}
