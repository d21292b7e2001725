// SPDX-License-Identifier: GPL-2.0

//! A table from an identity (a vCPU, a task) to a shared object, readable with interrupts off.
//!
//! Readers are covered by RCU; writers take a spin lock. The number of buckets is fixed: what is in it
//! for one VM costs the same whatever the other VMs do, up to the load the table is sized for.

use core::{
    marker::PhantomData,
    ptr::{null_mut, NonNull},
    sync::atomic::{AtomicPtr, Ordering},
};

use kernel::{
    new_spinlock,
    prelude::*,
    sync::{rcu::synchronize_rcu, Arc, ArcBorrow, SpinLock},
};

use crate::Reader;

/// log2 of the number of buckets: one bucket a vCPU up to 4,096 vCPUs; 32 KiB.
const BITS: u32 = 12;

struct Node<T> {
    next: AtomicPtr<Node<T>>,
    key: usize,
    value: Arc<T>,
}

/// The table.
///
/// # Invariants
///
/// There are `1 << BITS` buckets. Each is a list of nodes from boxes. A node is changed, linked and unlinked only under
/// `writers`, and freed only after an RCU grace period has passed since it was unlinked.
#[pin_data(PinnedDrop)]
pub struct Table<T> {
    buckets: KVec<AtomicPtr<Node<T>>>,
    #[pin]
    writers: SpinLock<()>,
    _owns: PhantomData<Node<T>>,
}

// SAFETY: The nodes are shared by RCU, their values by `Arc`.
unsafe impl<T: Send + Sync> Send for Table<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Sync> Sync for Table<T> {}

/// An entry that has been unlinked and may still be seen by readers.
///
/// # Context
///
/// Dropping it waits for an RCU grace period.
pub struct Unlinked<T>(Option<NonNull<Node<T>>>);

// SAFETY: Owns the node, but for readers that RCU covers.
unsafe impl<T: Send + Sync> Send for Unlinked<T> {}

impl<T> Drop for Unlinked<T> {
    fn drop(&mut self) {
        if let Some(node) = self.0 {
            synchronize_rcu();
            // SAFETY: Unlinked from a table whose nodes come from boxes, and the readers are gone.
            drop(unsafe { KBox::from_raw(node.as_ptr()) });
        }
    }
}

impl<T> Table<T> {
    /// An empty table.
    pub fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            buckets: {
                let mut buckets = KVec::with_capacity(1 << BITS, GFP_KERNEL)?;
                for _ in 0..1 << BITS {
                    buckets.push(AtomicPtr::new(null_mut()), GFP_KERNEL)?;
                }
                buckets
            },
            writers <- new_spinlock!(()),
            _owns: PhantomData,
        })
    }

    #[inline]
    fn bucket(&self, key: usize) -> &AtomicPtr<Node<T>> {
        // Fibonacci hashing: the keys are addresses, whose low bits are alike.
        let hash = (key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS);
        // SAFETY: `BITS` bits are left, and by the type invariant there are as many buckets.
        unsafe { &*self.buckets.as_ptr().add(hash as usize) }
    }

    /// Whether there is certainly nothing under `key`. Any context; a few instructions.
    #[inline]
    pub fn is_vacant(&self, key: usize) -> bool {
        self.bucket(key).load(Ordering::Relaxed).is_null()
    }

    /// Finds the object under `key`, the newest if there are several. Any context.
    #[inline]
    pub fn find<'a>(&'a self, key: usize, _reader: Reader<'a>) -> Option<ArcBorrow<'a, T>> {
        let mut next = self.bucket(key).load(Ordering::Acquire);
        loop {
            // SAFETY: Linked when it was loaded, so it is not freed while the section lasts.
            let node = unsafe { next.as_ref() }?;
            if node.key == key {
                return Some(node.value.as_arc_borrow());
            }
            next = node.next.load(Ordering::Acquire);
        }
    }

    /// Shows `visit` every object under `key`, the newest first. Any context.
    #[inline]
    pub fn find_all<'a>(
        &'a self,
        key: usize,
        _reader: Reader<'a>,
        visit: impl Fn(ArcBorrow<'a, T>),
    ) {
        let mut next = self.bucket(key).load(Ordering::Acquire);
        // SAFETY: Linked when it was loaded, so it is not freed while the section lasts.
        while let Some(node) = unsafe { next.as_ref() } {
            if node.key == key {
                visit(node.value.as_arc_borrow());
            }
            next = node.next.load(Ordering::Acquire);
        }
    }

    /// Shows `visit` every object. Any context.
    pub fn for_each<'a>(&'a self, _reader: Reader<'a>, mut visit: impl FnMut(ArcBorrow<'a, T>)) {
        for bucket in &self.buckets {
            let mut next = bucket.load(Ordering::Acquire);
            // SAFETY: Linked when it was loaded, so it is not freed while the section lasts.
            while let Some(node) = unsafe { next.as_ref() } {
                visit(node.value.as_arc_borrow());
                next = node.next.load(Ordering::Acquire);
            }
        }
    }

    /// Puts `value` under `key`, in front of what is there already. May sleep.
    pub fn insert(&self, key: usize, value: Arc<T>) -> Result {
        let node = KBox::new(Node { next: AtomicPtr::new(null_mut()), key, value }, GFP_KERNEL)?;
        let node = KBox::into_raw(node);
        let bucket = self.bucket(key);
        let _writers = self.writers.lock();
        // SAFETY: Not published yet, so nobody else sees it.
        unsafe { &*node }.next.store(bucket.load(Ordering::Relaxed), Ordering::Relaxed);
        bucket.store(node, Ordering::Release);
        Ok(())
    }

    /// Takes what is under `key` out, if `choose` says it is the one meant. The spin lock is taken.
    pub fn unlink(&self, key: usize, choose: impl Fn(&Arc<T>) -> bool) -> Unlinked<T> {
        let _writers = self.writers.lock();
        let mut link = self.bucket(key);
        loop {
            let raw = link.load(Ordering::Relaxed);
            // SAFETY: Linked, and only unlinked under the lock that is held.
            let Some(node) = (unsafe { raw.as_ref() }) else {
                return Unlinked(None);
            };
            if node.key == key && choose(&node.value) {
                link.store(node.next.load(Ordering::Relaxed), Ordering::Release);
                return Unlinked(NonNull::new(raw));
            }
            link = &node.next;
        }
    }
}

#[pinned_drop]
impl<T> PinnedDrop for Table<T> {
    fn drop(self: Pin<&mut Self>) {
        // A value may have been found and let go of by a reader a moment ago.
        synchronize_rcu();
        for bucket in &self.buckets {
            let mut raw = bucket.load(Ordering::Relaxed);
            while !raw.is_null() {
                // SAFETY: From a box; nobody else has the table any more.
                let node = unsafe { KBox::from_raw(raw) };
                raw = node.next.load(Ordering::Relaxed);
            }
        }
    }
}
