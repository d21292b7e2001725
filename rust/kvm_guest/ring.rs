// SPDX-License-Identifier: GPL-2.0

//! One ring: set up, filled by its CPU, waited for by anybody, torn down.

use core::{cell::UnsafeCell, mem::ManuallyDrop, mem::MaybeUninit};

use dlh_abi::{
    has_passed, Call, Cookie, Operation, Producer, RingSize, Status, ABI_VERSION, RING_ACTIVE,
};
use kernel::{
    fmt, pr_warn_once,
    prelude::*,
    sync::{
        atomic::{
            ordering::{Acquire, Full, Release},
            Atomic,
        },
        Arc, ArcBorrow, UniqueArc,
    },
    types::NotThreadSafe,
};

use crate::{
    hypercall::{self, HostError},
    memory::{RingMemory, Words},
    tsc, CpuGuard,
};

/// The host has the ring.
const LIVE: u32 = 0;
/// Somebody is asking the host to let go of it.
const CLOSING: u32 = 1;
/// The host has let go of it: nothing of it is, or will be, worked on.
const DEAD: u32 = 2;

/// A ring that the host has been told of.
///
/// # Invariants
///
/// - The memory stays until `state` is `DEAD`, which it becomes only when the host has let go of it.
/// - `filling` is accessed only by the [`LocalRing`] that has set `busy`.
pub struct Ring {
    memory: ManuallyDrop<RingMemory>,
    id: u32,
    cpu: u32,
    state: Atomic<u32>,
    busy: Atomic<bool>,
    filling: UnsafeCell<Filling>,
}

// SAFETY: Nothing in it belongs to a thread.
unsafe impl Send for Ring {}
// SAFETY: By the type invariant `filling` has one user at a time; the rest may be shared.
unsafe impl Sync for Ring {}

/// What is needed to fill slots.
///
/// # Invariants
///
/// `producer` is of the size of the ring's memory.
struct Filling {
    producer: Producer,
    dropped: u64,
}

/// Everything that a ring needs of this kernel, before the host is told of it.
pub struct NewRing {
    memory: RingMemory,
    place: UniqueArc<MaybeUninit<Ring>>,
}

/// Why there is no ring.
#[derive(Clone, Copy, Debug)]
pub enum SetupError {
    /// The host would not.
    Host(HostError),
    /// What the host wrote into the ring is not what the ABI says.
    Header,
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(e) => {
                f.write_str("the host answers ")?;
                fmt::Display::fmt(e, f)
            }
            Self::Header => f.write_str("the host speaks another version"),
        }
    }
}

impl NewRing {
    /// Allocates for a ring of `size`, near the current CPU. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new(size: RingSize) -> Result<Self> {
        Ok(Self { memory: RingMemory::new(size)?, place: UniqueArc::new_uninit(GFP_KERNEL)? })
    }

    /// Tells the host: from here on it is the ring of this CPU. Does not sleep, but the host may.
    ///
    /// # Errors
    ///
    /// The host has no ring of this CPU then.
    pub fn set_up(self, here: &CpuGuard) -> Result<Arc<Ring>, SetupError> {
        let Self { memory, place } = self;
        let memory = ManuallyDrop::new(memory);
        let size = memory.size();
        // SAFETY: The memory is zeroed and nobody else's; it is freed by `Ring` only, which waits for
        // the host, or just below if the host has not taken it.
        let id = match unsafe { hypercall::ring_setup(memory.gpa(), size, here) } {
            Ok(id) => id,
            Err(e) => {
                drop(ManuallyDrop::into_inner(memory));
                return Err(SetupError::Host(e));
            }
        };
        let (cookie, entries, version, flags) = memory.words().introduction();
        let ring = Arc::from(place.write(Ring {
            // INVARIANT: The host has it, and `state` says so.
            memory,
            id,
            cpu: here.cpu(),
            state: Atomic::new(LIVE),
            busy: Atomic::new(false),
            // INVARIANT: The size is that of `memory`.
            filling: UnsafeCell::new(Filling {
                producer: Producer::new(size, Cookie(cookie), 0),
                dropped: 0,
            }),
        }));
        let as_agreed = cookie != 0
            && entries == size.get()
            && version == ABI_VERSION
            && flags & RING_ACTIVE != 0;
        if as_agreed {
            Ok(ring)
        } else {
            // Dropping it tears it down.
            Err(SetupError::Header)
        }
    }
}

impl Ring {
    /// The CPU it belongs to.
    pub fn cpu(&self) -> u32 {
        self.cpu
    }

    /// Whether calls placed in it may still be executed.
    pub fn is_live(&self) -> bool {
        self.state.load(Acquire) == LIVE
    }

    /// Whether the host has let go of it.
    pub(crate) fn is_dead(&self) -> bool {
        self.state.load(Acquire) == DEAD
    }

    /// Whether the host says that it takes nothing from it any more, which is a hint.
    pub(crate) fn is_detached(&self) -> bool {
        let (_, _, _, flags) = self.memory.words().introduction();
        flags & RING_ACTIVE == 0
    }

    /// Whether the host is done with the entry at `position`.
    pub(crate) fn has_passed(&self, position: u32) -> bool {
        has_passed(self.memory.words().done(), position)
    }

    /// The outcome of the entry at `position`, which the host is done with.
    pub(crate) fn status(&self, position: u32) -> Status {
        self.memory.words().status(self.memory.size().slot(position))
    }

    /// Has the host execute everything in it now. The host may take its time.
    ///
    /// Afterwards every entry that was placed before has been passed, or the ring is not live; or the
    /// host has answered something the ABI does not say, and another try is due.
    pub(crate) fn kick(&self) {
        if !self.is_live() {
            return;
        }
        match hypercall::kick(self.id) {
            Ok(()) => {}
            Err(e) if e.is_absent() || e.is_no_ring() => {
                // Where somebody is closing it, the host's answer may be about what comes after:
                // only that one's word counts then.
                let _ = self.state.cmpxchg(LIVE, DEAD, Full);
            }
            Err(_) => self.close(),
        }
    }

    /// Whether the host still knows it; asks the host, which may take its time.
    pub fn is_known(&self) -> bool {
        self.kick();
        self.is_live()
    }

    /// Has the host let go of it: when this has been called, and the ring is dead, nothing of it is
    /// worked on any more. The host may take its time.
    pub fn close(&self) {
        if self.state.cmpxchg(LIVE, CLOSING, Full).is_err() {
            return;
        }
        let state = match hypercall::ring_teardown(self.id) {
            Ok(()) => DEAD,
            Err(e) if e.is_absent() || e.is_no_ring() => DEAD,
            Err(e) => {
                pr_warn_once!("the host does not let go of a ring: {}\n", e);
                LIVE
            }
        };
        self.state.store(state, Release);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.close();
        if self.is_dead() {
            // SAFETY: Not used again. By the type invariant the host has let go of it.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
        // Otherwise the memory is lost: the host may write there at any time.
    }
}

/// The ring of the current CPU, to place calls in. There is one at a time of a ring.
///
/// # Invariants
///
/// `busy` of the ring was set for this, and preemption is off. `producer` stands for the one in
/// `filling` and goes back there in the end; `words` are those of the ring.
pub struct LocalRing<'a> {
    ring: ArcBorrow<'a, Ring>,
    words: Words<'a>,
    producer: Producer,
    filling: &'a mut Filling,
    _thread: NotThreadSafe,
}

impl<'a> LocalRing<'a> {
    /// Begins to place calls in `ring`, which must be the ring of this CPU.
    ///
    /// `None` if it is not live, or if this has interrupted somebody who is placing calls.
    #[inline]
    pub(crate) fn begin(ring: ArcBorrow<'a, Ring>, here: &'a CpuGuard) -> Option<Self> {
        if ring.cpu != here.cpu() || !ring.is_live() || ring.busy.xchg(true, Acquire) {
            return None;
        }
        // SAFETY: By the type invariant nobody else accesses it: `busy` was not set.
        let filling = unsafe { &mut *ring.filling.get() };
        // SAFETY: `ArcBorrow` keeps the ring for `'a`.
        let words = unsafe { &*core::ptr::from_ref(&*ring) }.memory.words();
        // INVARIANT: Set just above; the guard lives as long as this.
        Some(Self { ring, words, producer: filling.producer, filling, _thread: NotThreadSafe })
    }

    /// Position of the next call.
    #[inline]
    pub(crate) fn tail(&self) -> u32 {
        self.producer.tail()
    }

    /// The ring.
    pub(crate) fn ring(&self) -> Arc<Ring> {
        self.ring.into()
    }

    /// Whether the host is done with everything that was placed.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.words.done() == self.tail()
    }

    /// Places a call that does nothing. Returns whether there was room; if not, it is counted.
    #[inline]
    pub fn nop(&mut self) -> bool {
        // SAFETY: Names no memory.
        unsafe { self.place(&Call { op: Operation::NOP, arg: [0; 2] }) }
    }

    /// Places an event for the host's trace, which happens now. Returns whether there was room; if not, it
    /// is counted.
    #[inline]
    pub fn trace(&mut self, payload: [u64; 2]) -> bool {
        let call = Call { op: Operation::TRACE, arg: payload };
        // SAFETY: Names no memory.
        unsafe { self.place_at(&call, tsc() as u32) }
    }

    /// Places a call. Returns whether there was room; if not, it is counted.
    ///
    /// # Safety
    ///
    /// The host may discard the memory that the call names until it has passed the call, or the ring
    /// is dead.
    #[inline]
    pub(crate) unsafe fn place(&mut self, call: &Call) -> bool {
        // SAFETY: The same requirements. 0: the status as the host has it.
        unsafe { self.place_at(call, 0) }
    }

    /// Places a call with something in place of the status.
    ///
    /// # Safety
    ///
    /// As [`LocalRing::place`].
    #[inline(always)]
    unsafe fn place_at(&mut self, call: &Call, time: u32) -> bool {
        let words = self.words;
        let Some((slot, entry)) = self.producer.place(words.done(), call) else {
            Self::drop_call(words, self.filling);
            return false;
        };
        // SAFETY: By the invariant of `Filling`, the producer's slots are the memory's.
        unsafe { words.write_entry(slot, &entry.at(time)) };
        words.publish_tail(self.producer.tail());
        true
    }

    /// Counts a call that found the ring full.
    #[cold]
    fn drop_call(words: Words<'_>, filling: &mut Filling) {
        filling.dropped = filling.dropped.wrapping_add(1);
        words.publish_dropped(filling.dropped);
    }
}

impl Drop for LocalRing<'_> {
    #[inline]
    fn drop(&mut self) {
        self.filling.producer = self.producer;
        self.ring.busy.store(false, Release);
    }
}
