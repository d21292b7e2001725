// SPDX-License-Identifier: GPL-2.0

//! The rings of all CPUs, found by whoever stays on one.
//!
//! Users are covered by RCU, since having preemption off is a read-side critical section.

use core::{
    ptr::null_mut,
    sync::atomic::{AtomicPtr, Ordering},
};

use kernel::{
    cpu::nr_cpu_ids,
    prelude::*,
    sync::{rcu::synchronize_rcu, Arc, ArcBorrow},
};

use crate::{CpuGuard, LocalRing, Ring};

/// One place for a ring for each CPU.
///
/// # Invariants
///
/// Each place is null or comes from `Arc::into_raw()`. What is taken out of a place is released only
/// after an RCU grace period.
pub struct RingTable {
    places: KVec<AtomicPtr<Ring>>,
}

impl RingTable {
    /// Without rings, for all CPUs there may ever be. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new() -> Result<Self> {
        let count = nr_cpu_ids() as usize;
        let mut places = KVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            places.push(AtomicPtr::new(null_mut()), GFP_KERNEL)?;
        }
        Ok(Self { places })
    }

    /// The ring of this CPU, to place calls in; `None` where there is none, or it is in use by what
    /// this has interrupted.
    #[inline]
    pub fn local<'a>(&self, here: &'a CpuGuard) -> Option<LocalRing<'a>> {
        let raw = self.places.get(here.cpu() as usize)?.load(Ordering::Acquire);
        if raw.is_null() {
            return None;
        }
        // SAFETY: By the type invariant it comes from an `Arc`, which is not released while the
        // guard, which began before it was loaded, keeps preemption off.
        let ring = unsafe { ArcBorrow::from_raw(raw) };
        LocalRing::begin(ring, here)
    }

    /// The ring of a CPU. Any context.
    pub fn get(&self, cpu: u32) -> Option<Arc<Ring>> {
        let _here = CpuGuard::new();
        let raw = self.places.get(cpu as usize)?.load(Ordering::Acquire);
        if raw.is_null() {
            return None;
        }
        // SAFETY: As in `local()`, for the guard's life.
        Some(unsafe { ArcBorrow::from_raw(raw) }.into())
    }

    /// Puts a ring in its place. Any context.
    ///
    /// # Errors
    ///
    /// Gives it back if there is one already.
    pub fn insert(&self, ring: Arc<Ring>) -> Result<(), Arc<Ring>> {
        let Some(place) = self.places.get(ring.cpu() as usize) else { return Err(ring) };
        let raw = Arc::into_raw(ring).cast_mut();
        // INVARIANT: `raw` comes from `Arc::into_raw()`.
        match place.compare_exchange(null_mut(), raw, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => Ok(()),
            // SAFETY: `raw` has not been put anywhere.
            Err(_) => Err(unsafe { Arc::from_raw(raw) }),
        }
    }

    /// Takes the ring of a CPU out; on return nobody places calls in it. May sleep.
    pub fn remove(&self, cpu: u32) -> Option<Arc<Ring>> {
        let raw = self.places.get(cpu as usize)?.swap(null_mut(), Ordering::AcqRel);
        if raw.is_null() {
            return None;
        }
        synchronize_rcu();
        // SAFETY: By the type invariant it comes from an `Arc`, and it was taken out once.
        Some(unsafe { Arc::from_raw(raw) })
    }

    /// Number of places that have a ring the host knows.
    pub fn live(&self) -> usize {
        // SAFETY: As in `local()`, for the guard's life.
        let is_live = |raw: *mut Ring| !raw.is_null() && unsafe { &*raw }.is_live();
        let _here = CpuGuard::new();
        self.places.iter().filter(|place| is_live(place.load(Ordering::Acquire))).count()
    }
}

impl Drop for RingTable {
    fn drop(&mut self) {
        for cpu in 0..nr_cpu_ids() {
            drop(self.remove(cpu));
        }
    }
}
