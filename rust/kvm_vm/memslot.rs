// SPDX-License-Identifier: GPL-2.0

//! From guest frames to addresses of the VMM, through the memslots.

use dlh_abi::{Gfn, GfnRange};
use dlh_bindings as bindings;
use kernel::types::NotThreadSafe;

use crate::Vm;

/// An address in the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hva(pub usize);

/// Why guest frames cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotError {
    /// No memslot of address space 0 that the VMM made.
    None,
    /// The slot is read-only.
    ReadOnly,
    /// The slot is backed by guest_memfd.
    Private,
}

/// Guest frames and where they lie in the VMM, within one memslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The frames.
    pub frames: GfnRange,
    /// The address of the first byte.
    pub hva: Hva,
}

/// The memslots of a VM, locked for reading.
///
/// # Invariants
///
/// `index` is what `srcu_read_lock` of this VM's `srcu` returned, and has not been given back.
pub struct Memslots<'a> {
    vm: &'a Vm,
    index: i32,
    _context: NotThreadSafe,
}

impl Vm {
    /// Locks the memslots for reading (`kvm->srcu`). May sleep while it is held; whoever changes a
    /// memslot waits for the guard to be dropped.
    #[inline]
    pub fn memslots(&self) -> Memslots<'_> {
        // SAFETY: The VM is allocated, so its srcu_struct is initialised.
        let index = unsafe { bindings::dlh_kvm_read_lock(self.as_ptr()) };
        // INVARIANT: Just locked.
        Memslots { vm: self, index, _context: NotThreadSafe }
    }
}

impl<'a> Memslots<'a> {
    /// The VM whose memslots these are.
    pub fn vm(&self) -> &'a Vm {
        self.vm
    }

    /// The generation of the memslots, if it is the same throughout `work`.
    pub(crate) fn steady<T>(&self, work: impl FnOnce() -> T) -> (T, Option<u64>) {
        let before = self.vm.generation();
        let result = work();
        (result, (self.vm.generation() == before).then_some(before))
    }

    /// As much of `frames`, from its start, as lies in one usable memslot.
    pub fn translate(&self, frames: GfnRange) -> Result<Span, SlotError> {
        let (hva, pages) = self.lookup(frames.start());
        let hva = hva?;
        let pages = pages.min(frames.pages());
        // The slot has at least the page that was looked up, so this cannot fail.
        let frames = GfnRange::new(frames.start(), pages).map_err(|_| SlotError::None)?;
        Ok(Span { frames, hva })
    }

    /// Like [`Memslots::translate`], but all of `frames` or nothing.
    ///
    /// # Errors
    ///
    /// [`SlotError::None`] also where the slot, of whatever kind, ends before `frames` does.
    pub fn translate_all(&self, frames: GfnRange) -> Result<Span, SlotError> {
        let (hva, pages) = self.lookup(frames.start());
        if pages < frames.pages() {
            return Err(SlotError::None);
        }
        Ok(Span { frames, hva: hva? })
    }

    /// The whole memslot that `gfn` lies in, if it is usable.
    pub fn slot_of(&self, gfn: Gfn) -> Result<Span, SlotError> {
        let (hva, _) = self.lookup(gfn);
        hva?;
        // SAFETY: By the type invariant the srcu read lock is held.
        let start = Gfn(unsafe { bindings::dlh_kvm_slot_start(self.vm.as_ptr(), gfn.0) });
        let (hva, pages) = self.lookup(start);
        let frames = GfnRange::new(start, pages).map_err(|_| SlotError::None)?;
        Ok(Span { frames, hva: hva? })
    }

    /// Whether KVM logs what is written to the frame.
    pub(crate) fn logs_writes(&self, gfn: Gfn) -> bool {
        // SAFETY: By the type invariant the srcu read lock is held.
        unsafe { bindings::dlh_kvm_logs_writes(self.vm.as_ptr(), gfn.0) }
    }

    /// Notes in KVM's dirty bitmap that the frame was written. Does not sleep.
    #[cold]
    pub(crate) fn mark_dirty(&self, gfn: Gfn) {
        // SAFETY: By the type invariant the srcu read lock is held.
        unsafe { bindings::dlh_kvm_mark_dirty(self.vm.as_ptr(), gfn.0) }
    }

    /// Where the frame lies, or why it cannot be used, and how many frames from it on share its slot.
    fn lookup(&self, gfn: Gfn) -> (Result<Hva, SlotError>, u64) {
        let (mut hva, mut pages) = (0, 0);
        // SAFETY: By the type invariant the srcu read lock is held.
        let kind =
            unsafe { bindings::dlh_kvm_translate(self.vm.as_ptr(), gfn.0, &mut hva, &mut pages) };
        let hva = match kind {
            bindings::dlh_slot_DLH_SLOT_USABLE => Ok(Hva(hva)),
            bindings::dlh_slot_DLH_SLOT_READONLY => Err(SlotError::ReadOnly),
            bindings::dlh_slot_DLH_SLOT_PRIVATE => Err(SlotError::Private),
            _ => Err(SlotError::None),
        };
        (hva, pages)
    }
}

impl Drop for Memslots<'_> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: By the type invariant the lock is held with this index.
        unsafe { bindings::dlh_kvm_read_unlock(self.vm.as_ptr(), self.index) }
    }
}
