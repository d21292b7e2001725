// SPDX-License-Identifier: GPL-2.0

//! A table from an identity (a vCPU, a task) to a shared object, readable with interrupts off.
//!
//! Readers are covered by RCU; writers take a spin lock. The number of buckets is fixed: what is in it
//! for one VM costs the same whatever the other VMs do, up to the load the table is sized for.
//!
//! The objects of one key, such as all rings of a thread that runs many vCPUs, hang on the first of them: who
//! looks for another key in the same bucket passes one, and none of them has to be searched for to be taken
//! out.

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

use crate::{
    link::{Link, Linked, Place},
    Reader,
};

/// log2 of the number of buckets: one bucket a vCPU up to 4,096 vCPUs; 32 KiB.
const BITS: u32 = 12;

/// The table, of the objects' links number `ID`.
///
/// # Invariants
///
/// There are `1 << BITS` buckets. Each is a list, by `next`, of the first links of its keys; each of these is
/// followed, by `peer`, by the others of the same key. The table has a count of every object in it. Links
/// change only under `writers`; an object is let go of only after an RCU grace period has passed since it was
/// unlinked.
#[pin_data(PinnedDrop)]
pub struct Table<T: Linked<ID>, const ID: u64 = 0> {
    buckets: KVec<AtomicPtr<Link<T>>>,
    #[pin]
    writers: SpinLock<()>,
    _owns: PhantomData<Arc<T>>,
}

// SAFETY: The links are shared by RCU, the objects by `Arc`.
unsafe impl<T: Linked<ID> + Send + Sync, const ID: u64> Send for Table<T, ID> {}
// SAFETY: As above.
unsafe impl<T: Linked<ID> + Send + Sync, const ID: u64> Sync for Table<T, ID> {}

/// An object that has been unlinked and may still be seen by readers.
///
/// # Context
///
/// Dropping it waits for an RCU grace period: some milliseconds, however busy the host is, as long as its CPUs
/// schedule. [`Unlinked::forget`] waits once for several.
///
/// # Invariants
///
/// The link is that of an object of which this has a count. It was in a table, and belongs to this.
pub struct Unlinked<T>(Option<NonNull<Link<T>>>);

// SAFETY: Owns a count of the object.
unsafe impl<T: Send + Sync> Send for Unlinked<T> {}

impl<T> Unlinked<T> {
    /// Drops several for the price of one. May sleep.
    pub fn forget<const N: usize>(all: [Self; N]) {
        if all.iter().any(|unlinked| unlinked.0.is_some()) {
            synchronize_rcu();
        }
        for mut unlinked in all {
            unlinked.let_go();
        }
    }

    /// A grace period has passed.
    fn let_go(&mut self) {
        if let Some(link) = self.0.take() {
            // SAFETY: By the type invariant, and no reader is left.
            unsafe { let_go(link.as_ptr()) }
        }
    }
}

impl<T> Drop for Unlinked<T> {
    fn drop(&mut self) {
        if self.0.is_some() {
            synchronize_rcu();
            self.let_go();
        }
    }
}

/// # Safety
///
/// The link was unlinked from a table and belongs to the caller, as does the table's count of the object.
unsafe fn let_go<T>(link: *const Link<T>) {
    // SAFETY: By the caller's promise; the count keeps it alive until the end.
    let link = unsafe { &*link };
    // SAFETY: As above: the count that `insert` took.
    let object = unsafe { Arc::from_raw(link.value()) };
    // INVARIANT: Nobody has it.
    link.release();
    drop(object);
}

impl<T: Linked<ID>, const ID: u64> Table<T, ID> {
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
    fn bucket(&self, key: usize) -> &AtomicPtr<Link<T>> {
        // Fibonacci hashing: the keys are addresses, whose low bits are alike.
        let hash = (key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS);
        // SAFETY: `BITS` bits are left, and by the type invariant there are as many buckets.
        unsafe { &*self.buckets.as_ptr().add(hash as usize) }
    }

    fn address(&self) -> *const () {
        core::ptr::from_ref(self).cast()
    }

    /// Whether there is certainly nothing under `key`. Any context; a few instructions.
    #[inline]
    pub fn is_vacant(&self, key: usize) -> bool {
        // Relaxed: nothing is read through it. What is inserted meanwhile is seen at the next look.
        self.bucket(key).load(Ordering::Relaxed).is_null()
    }

    /// The first link of `key`.
    #[inline]
    fn first<'a>(&'a self, key: usize, _reader: Reader<'a>) -> Option<&'a Link<T>> {
        let mut next = self.bucket(key).load(Ordering::Acquire);
        loop {
            // SAFETY: Linked when it was loaded, so its object is kept while the section lasts.
            let link = unsafe { next.as_ref() }?;
            if link.key() == key {
                return Some(link);
            }
            next = link.next.load(Ordering::Acquire);
        }
    }

    /// Shows `visit` the objects of a key, from `first` on.
    #[inline]
    fn visit_key<'a>(first: &'a Link<T>, mut visit: impl FnMut(ArcBorrow<'a, T>)) {
        let mut link = first;
        loop {
            // SAFETY: Reached in a read section that lasts for `'a`: the table, or `Unlinked`, keeps it.
            visit(unsafe { ArcBorrow::from_raw(link.value()) });
            // SAFETY: As in `first`.
            match unsafe { link.peer.load(Ordering::Acquire).as_ref() } {
                Some(peer) => link = peer,
                None => return,
            }
        }
    }

    /// Finds the object under `key`, the newest if there are several. Any context.
    #[inline]
    pub fn find<'a>(&'a self, key: usize, reader: Reader<'a>) -> Option<ArcBorrow<'a, T>> {
        let link = self.first(key, reader)?;
        // SAFETY: Reached in a read section that lasts for `'a`: the table, or `Unlinked`, keeps it.
        Some(unsafe { ArcBorrow::from_raw(link.value()) })
    }

    /// Shows `visit` every object under `key`, the newest first. Any context.
    #[inline]
    pub fn find_all<'a>(
        &'a self,
        key: usize,
        reader: Reader<'a>,
        visit: impl Fn(ArcBorrow<'a, T>),
    ) {
        if let Some(first) = self.first(key, reader) {
            Self::visit_key(first, visit);
        }
    }

    /// Shows `visit` every object. Any context.
    pub fn for_each<'a>(&'a self, _reader: Reader<'a>, mut visit: impl FnMut(ArcBorrow<'a, T>)) {
        for bucket in &self.buckets {
            let mut next = bucket.load(Ordering::Acquire);
            // SAFETY: Linked when it was loaded, so its object is kept while the section lasts.
            while let Some(first) = unsafe { next.as_ref() } {
                Self::visit_key(first, &mut visit);
                next = first.next.load(Ordering::Acquire);
            }
        }
    }

    /// Puts `value` under `key`, in front of what is there already. The spin lock is taken, for as long as it
    /// takes to pass the other keys of the bucket.
    ///
    /// # Errors
    ///
    /// `EBUSY` if it is in a table by this link, or its [`Unlinked`] has not been dropped.
    pub fn insert(&self, key: usize, value: Arc<T>) -> Result {
        if !value.link().claim(key, &value) {
            return Err(EBUSY);
        }
        // The count is the table's from here on.
        let value = Arc::into_raw(value);
        // SAFETY: The count keeps it alive.
        let link = unsafe { &*value }.link();
        let raw = core::ptr::from_ref(link).cast_mut();
        let _writers = self.writers.lock();
        // Where the first of this key is reached from, or the bucket.
        let bucket = self.bucket(key);
        let mut slot = bucket;
        let former = loop {
            // SAFETY: Linked, and links change only under the lock that is held.
            match unsafe { slot.load(Ordering::Relaxed).as_ref() } {
                Some(first) if first.key() == key => break Some(first),
                Some(first) => slot = &first.next,
                None => break None,
            }
        };
        let next = match former {
            Some(former) => {
                link.peer.store(core::ptr::from_ref(former).cast_mut(), Ordering::Relaxed);
                // SAFETY: Linked, and the lock is held.
                unsafe { *former.place.get() = Place { slot: &link.peer, first: false } };
                former.next.load(Ordering::Relaxed)
            }
            None => {
                slot = bucket;
                link.peer.store(null_mut(), Ordering::Relaxed);
                bucket.load(Ordering::Relaxed)
            }
        };
        link.next.store(next, Ordering::Relaxed);
        // SAFETY: Linked, or null; the lock is held.
        unsafe { Self::reached_from(next, &link.next) };
        // SAFETY: Ours, as claimed.
        unsafe { *link.place.get() = Place { slot, first: true } };
        link.enter(self.address());
        // Release: pairs with the loads of readers, who find it complete.
        slot.store(raw, Ordering::Release);
        Ok(())
    }

    /// Notes that `link`, if there is one, is reached from `slot` now.
    ///
    /// # Safety
    ///
    /// It is in a table whose lock is held, or null.
    unsafe fn reached_from(link: *mut Link<T>, slot: *const AtomicPtr<Link<T>>) {
        // SAFETY: By the caller's promise.
        if let Some(link) = unsafe { link.as_ref() } {
            // SAFETY: As above.
            unsafe { (*link.place.get()).slot = slot };
        }
    }

    /// Takes `value` out, if it is there. The spin lock is taken, for a few instructions.
    pub fn unlink(&self, value: &T) -> Unlinked<T> {
        let link = value.link();
        let _writers = self.writers.lock();
        if !link.is_in(self.address()) {
            return Unlinked(None);
        }
        // SAFETY: In this table, whose lock is held.
        let &Place { slot, first } = unsafe { &*link.place.get() };
        let (peer, next) = (link.peer.load(Ordering::Relaxed), link.next.load(Ordering::Relaxed));
        // What takes its place. Its own pointers stay as they are, for readers that are at it.
        let heir = if first && peer.is_null() { next } else { peer };
        // SAFETY: Linked, or null; the lock is held.
        if let (true, Some(peer)) = (first, unsafe { peer.as_ref() }) {
            peer.next.store(next, Ordering::Relaxed);
            // SAFETY: As above.
            unsafe {
                Self::reached_from(next, &peer.next);
                (*peer.place.get()).first = true;
            }
        }
        // SAFETY: As above.
        unsafe { Self::reached_from(heir, slot) };
        // SAFETY: A bucket, or a field of an object in this table: what leads to a link is kept up to date.
        // Release: pairs with the loads of readers, who find `next` of a new first one set.
        unsafe { &*slot }.store(heir, Ordering::Release);
        link.leave();
        // INVARIANT: The table's count is handed on.
        Unlinked(Some(NonNull::from(link)))
    }
}

#[pinned_drop]
impl<T: Linked<ID>, const ID: u64> PinnedDrop for Table<T, ID> {
    fn drop(self: Pin<&mut Self>) {
        // An object may have been found and let go of by a reader a moment ago.
        synchronize_rcu();
        for bucket in &self.buckets {
            let mut first = bucket.load(Ordering::Relaxed);
            while !first.is_null() {
                // SAFETY: In this table, which nobody else has any more.
                let next = unsafe { &*first }.next.load(Ordering::Relaxed);
                let mut link = first;
                while !link.is_null() {
                    // SAFETY: As above.
                    let peer = unsafe { &*link }.peer.load(Ordering::Relaxed);
                    // SAFETY: As above; the table's count is handed on.
                    unsafe { let_go(link) };
                    link = peer;
                }
                first = next;
            }
        }
    }
}
