// SPDX-License-Identifier: GPL-2.0

//! Counters that are named where their events are: [`counters!`] makes an enum of both, and [`Counters`] has one for
//! each.
//!
//! Counting takes no lock and orders nothing: one instruction, in any context. What is read is of about this moment.

#![cfg_attr(not(any(CONFIG_RUST, test)), no_std)]
#![forbid(unsafe_code)]

#[doc(hidden)]
pub use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

/// What can be counted. Implemented by [`counters!`].
pub trait Event: Copy {
    /// Their names, in order.
    const NAMES: &'static [&'static str];
    /// One counter for each.
    type Counts: AsRef<[AtomicU64]> + Default;
    /// The place of this one.
    fn place(self) -> usize;
}

/// Makes an enum of events, each with the name that it is shown under.
#[macro_export]
macro_rules! counters {
    ($(#[$meta:meta])* $vis:vis enum $event:ident { $($(#[$doc:meta])* $variant:ident = $name:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $vis enum $event { $($(#[$doc])* $variant,)+ }

        impl $crate::Event for $event {
            const NAMES: &'static [&'static str] = &[$($name),+];
            type Counts = [$crate::AtomicU64; [$($name),+].len()];

            #[inline]
            fn place(self) -> usize {
                self as usize
            }
        }
    };
}

/// A counter for each event of `E`, which wraps.
pub struct Counters<E: Event>(E::Counts);

impl<E: Event> Default for Counters<E> {
    fn default() -> Self {
        Self::new()
    }
}

impl<E: Event> Counters<E> {
    /// All at 0.
    pub fn new() -> Self {
        Self(E::Counts::default())
    }

    #[inline]
    fn counter(&self, event: E) -> Option<&AtomicU64> {
        // Always there: both are of one list.
        self.0.as_ref().get(event.place())
    }

    /// It happened once.
    #[inline]
    pub fn count(&self, event: E) {
        self.add(event, 1);
    }

    /// It happened `n` times.
    #[inline]
    pub fn add(&self, event: E, n: u64) {
        if let Some(counter) = self.counter(event) {
            counter.fetch_add(n, Relaxed);
        }
    }

    /// How often it happened.
    #[inline]
    pub fn get(&self, event: E) -> u64 {
        self.counter(event).map_or(0, |counter| counter.load(Relaxed))
    }

    /// All of them: names and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        E::NAMES.iter().zip(self.0.as_ref()).map(|(name, counter)| (*name, counter.load(Relaxed)))
    }
}
