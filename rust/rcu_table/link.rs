// SPDX-License-Identifier: GPL-2.0

//! What an object in a [`Table`](crate::Table) has inside.

use core::{
    cell::UnsafeCell,
    ptr::{null, null_mut},
    sync::atomic::{AtomicPtr, Ordering},
};

use kernel::sync::Arc;

/// The place of an object in one table: nothing is allocated when it is put there.
///
/// # Memory model
///
/// `next` and `peer` are read with interrupts off, at every exit, where a call of a C function for each
/// access (which the kernel crate's atomics are) would be felt; so they are `core`'s. They are stored with
/// `Release` once what they point to is complete and loaded with `Acquire`: on x86 plain moves, as are
/// `rcu_assign_pointer()` and `rcu_dereference()`, to which they correspond. No access of the kernel's own
/// atomics is to the same words. That nobody reads an object any more is ordered by `synchronize_rcu()`.
///
/// # Invariants
///
/// `table` is null while the object is in no table; then the rest belongs to whoever sets it. It is the
/// table's address while the object is in it; then `next`, `peer` and `place` change under that table's lock
/// only. Otherwise it is [`Link::leaving`]: the link belongs to one thread, and readers may still see it.
/// `key` and `value` change only while no reader can see the link.
pub struct Link<T> {
    /// The first of the next key in the bucket; of meaning in the first of a key only.
    pub(crate) next: AtomicPtr<Link<T>>,
    /// The next of the same key.
    pub(crate) peer: AtomicPtr<Link<T>>,
    key: UnsafeCell<usize>,
    value: UnsafeCell<*const T>,
    pub(crate) place: UnsafeCell<Place<T>>,
    table: AtomicPtr<()>,
}

/// How a link is reached.
pub(crate) struct Place<T> {
    /// The pointer that leads to it: a bucket, a `next` or a `peer`.
    pub(crate) slot: *const AtomicPtr<Link<T>>,
    /// Whether it is the first of its key.
    pub(crate) first: bool,
}

// SAFETY: What is not atomic changes as the type invariant says.
unsafe impl<T: Send + Sync> Send for Link<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Sync> Sync for Link<T> {}

impl<T> Default for Link<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Link<T> {
    /// Of an object that is in no table.
    pub const fn new() -> Self {
        // INVARIANT: In no table.
        Self {
            next: AtomicPtr::new(null_mut()),
            peer: AtomicPtr::new(null_mut()),
            key: UnsafeCell::new(0),
            value: UnsafeCell::new(null()),
            place: UnsafeCell::new(Place { slot: null(), first: false }),
            table: AtomicPtr::new(null_mut()),
        }
    }

    /// What `table` says while the link is on its way in or out.
    fn leaving() -> *mut () {
        core::ptr::dangling_mut()
    }

    #[inline]
    pub(crate) fn key(&self) -> usize {
        // SAFETY: By the type invariant it does not change while the link can be seen.
        unsafe { *self.key.get() }
    }

    /// The object, whose count the table has.
    #[inline]
    pub(crate) fn value(&self) -> *const T {
        // SAFETY: As above.
        unsafe { *self.value.get() }
    }

    /// Makes the link the caller's, to be put into a table as `value` under `key`; false if it is in one.
    pub(crate) fn claim(&self, key: usize, value: &Arc<T>) -> bool {
        // Acquire: pairs with `release()`, of whoever had it last.
        let claimed = self.table.compare_exchange(
            null_mut(),
            Self::leaving(),
            Ordering::Acquire,
            Ordering::Relaxed,
        );
        if claimed.is_err() {
            return false;
        }
        // SAFETY: By the type invariant it is the caller's, and no reader can see it.
        unsafe {
            *self.key.get() = key;
            *self.value.get() = Arc::as_ptr(value);
        }
        true
    }

    /// Whether it is in this table, whose lock is held.
    pub(crate) fn is_in(&self, table: *const ()) -> bool {
        core::ptr::eq(self.table.load(Ordering::Relaxed), table)
    }

    /// It is in this table, whose lock is held, from now on.
    pub(crate) fn enter(&self, table: *const ()) {
        self.table.store(table.cast_mut(), Ordering::Relaxed);
    }

    /// It was taken out of its table, whose lock is held.
    pub(crate) fn leave(&self) {
        self.table.store(Self::leaving(), Ordering::Relaxed);
    }

    /// No reader can see it any more.
    pub(crate) fn release(&self) {
        self.table.store(null_mut(), Ordering::Release);
    }
}

/// An object that can be in tables, in as many at the same time as it has links. `ID` tells them apart.
///
/// # Safety
///
/// [`Linked::link`] returns a field of the object itself, always the same.
pub unsafe trait Linked<const ID: u64 = 0>: Sized {
    /// The link.
    fn link(&self) -> &Link<Self>;
}

/// Implements [`Linked`]: `impl_linked! { impl Linked<BY_VCPU> for Ring { self.by_vcpu } }`. Each number with a
/// field of its own.
#[macro_export]
macro_rules! impl_linked {
    ($(impl Linked<$id:ident> for $object:ty { self.$field:ident })*) => {$(
        // A field of the object itself, not of what it may dereference to.
        const _: usize = ::core::mem::offset_of!($object, $field);
        // SAFETY: It is, by the line above. That a link is in one table at a time is checked at run time.
        unsafe impl $crate::Linked<$id> for $object {
            #[inline]
            fn link(&self) -> &$crate::Link<Self> {
                &self.$field
            }
        }
    )*};
}
