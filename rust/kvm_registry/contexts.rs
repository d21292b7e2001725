// SPDX-License-Identifier: GPL-2.0

//! What each operation keeps for one VM.

use core::{ffi::c_void, ptr::null_mut};

use dlh_bindings as bindings;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            ordering::{Acquire, Full, Relaxed, Release},
            Atomic,
        },
        Mutex,
    },
};
use kvm_vm::Vm;

use crate::MAX_OPERATIONS;

type Ops = bindings::kvm_dlh_ops;

/// The contexts of the operations in one VM, made at the first call of each.
///
/// # Invariants
///
/// A context in `made` came from `attach` of the table in `tables` at the same place, and has not been
/// detached. It changes only under `tables`, from null while the registry's read lock is held, and back
/// to null by whoever detaches it.
#[pin_data]
pub struct Contexts {
    made: [Atomic<*mut c_void>; MAX_OPERATIONS],
    #[pin]
    tables: Mutex<Tables>,
}

struct Tables([*const Ops; MAX_OPERATIONS]);

// SAFETY: Tables are immutable while they are registered, and may be used by any thread.
unsafe impl Send for Tables {}

impl Contexts {
    /// No contexts yet.
    pub fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            made: [const { Atomic::new(null_mut()) }; MAX_OPERATIONS],
            tables <- new_mutex!(Tables([core::ptr::null(); MAX_OPERATIONS])),
        })
    }

    /// The context of `ops`, made if need be; `None` if it could not be made. The caller holds the
    /// registry's read lock and has read `ops` from its slot; on a thread of the VMM; may sleep.
    #[inline]
    pub(crate) fn get(&self, ops: &Ops, vm: &Vm) -> Option<*mut c_void> {
        let made = self.made.get(usize::from(ops.number))?;
        let context = made.load(Acquire);
        if !context.is_null() {
            return Some(context);
        }
        self.attach(ops, vm)
    }

    /// The lock is held over the operation's `attach`, which allocates: those who wait for it are vCPUs of the
    /// same VM that make their first call of an operation, the end of this VM, and whoever unloads an operation.
    #[cold]
    fn attach(&self, ops: &Ops, vm: &Vm) -> Option<*mut c_void> {
        let number = usize::from(ops.number);
        let mut tables = self.tables.lock();
        let present = self.made[number].load(Relaxed);
        if !present.is_null() {
            return Some(present);
        }
        let mut context = null_mut();
        // SAFETY: The VM is alive, and there is a place for the result.
        if unsafe { ops.attach?(ops, vm.as_ptr(), &mut context) } != 0 || context.is_null() {
            return None;
        }
        // INVARIANT: From this very table, under both locks.
        tables.0[number] = ops;
        self.made[number].store(context, Release);
        Some(context)
    }

    /// Detaches operation `number`, if it is attached. No call of it may be running for this VM. The
    /// caller holds the registry's read lock, or has cleared the slot and waited.
    pub(crate) fn detach(&self, number: usize) {
        let (context, ops) = {
            let tables = self.tables.lock();
            (self.made[number].xchg(null_mut(), Full), tables.0[number])
        };
        if context.is_null() {
            return;
        }
        // SAFETY: By the type invariant the table is the one that made the context; it stays valid until
        // unregistering returns, which waits for this.
        if let Some(detach) = unsafe { (*ops).detach } {
            // SAFETY: Taken out above, so this is the only time.
            unsafe { detach(context) };
        }
    }
}
