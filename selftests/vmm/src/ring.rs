// SPDX-License-Identifier: GPL-2.0

//! The producer of a ring, played by the VMM or, with [`crate::vcpu::Vcpu::publish`], by the guest.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use dlh_abi::{
    header, Call, Cookie, Function, Operation, Producer, RawEntry, RingSize, HEADER_BYTES,
    RING_ACTIVE,
};

use crate::boot::STAGING;
use crate::ktap::{check, check_eq, failed, Result};
use crate::memory::Mapping;
use crate::vm::Vm;

/// A call that does nothing.
pub(crate) const NOP: Call = Call { op: Operation::NOP, arg: [0, 0] };
/// A call that no host knows.
pub(crate) const UNKNOWN: Call = Call { op: Operation(0xfffe), arg: [0, 0] };

/// Entries that wait for the guest to copy them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Staged {
    pub(crate) count: u32,
    pub(crate) position: u32,
}

/// A ring the host has accepted.
#[derive(Debug)]
pub(crate) struct Ring {
    memory: Arc<Mapping>,
    low_memory: Arc<Mapping>,
    offset: usize,
    gpa: u64,
    size: RingSize,
    cookie: Cookie,
    producer: Producer,
    staged: Staged,
    id: u64,
}

impl Ring {
    /// Sets up the ring of a vCPU at `gpa`, its first position `start`, and checks what the host
    /// wrote there.
    pub(crate) fn set_up(
        vm: &mut Vm,
        vcpu: usize,
        gpa: u64,
        entries: u32,
        start: u32,
    ) -> Result<Self> {
        let (memory, offset) = vm.memory_at(gpa)?;
        memory.fill(offset, HEADER_BYTES, |_| 0);
        memory.word32(offset + header::TAIL).store(start, Ordering::SeqCst);
        let id = vm.hypercall(vcpu, Function::RingSetup as u64, gpa, entries.into(), 0)?;
        let Ok(id) = u64::try_from(id) else {
            return failed(format!("setting up {entries} entries at {gpa:#x} gave {id}"));
        };
        let Ok(size) = RingSize::try_from(u64::from(entries)) else {
            return failed(format!("the host accepted a ring of {entries} entries"));
        };
        let cookie = Cookie(memory.word(offset + header::COOKIE).load(Ordering::SeqCst));
        let ring = Self { id, ..Self::unregistered(vm, gpa, size, cookie, start)? };
        check!(cookie.0 != 0, "the cookie of a new ring is 0");
        check_eq!(ring.done(), start, "done of a new ring");
        check_eq!(ring.flags(), RING_ACTIVE, "flags of a new ring");
        check_eq!(ring.declined(), 0, "declined of a new ring");
        check_eq!(ring.host_word(header::ENTRIES), entries, "entries of a new ring");
        check_eq!(ring.host_word(header::VERSION), dlh_abi::ABI_VERSION, "version of a new ring");
        check_eq!(ring.guest_tail(), start, "the guest's tail after set-up");
        Ok(ring)
    }

    /// A producer for a ring the host knows nothing of, so that nothing consumes its entries.
    pub(crate) fn unregistered(
        vm: &Vm,
        gpa: u64,
        size: RingSize,
        cookie: Cookie,
        start: u32,
    ) -> Result<Self> {
        let (memory, offset) = vm.memory_at(gpa)?;
        Ok(Self {
            low_memory: vm.low_memory().clone(),
            memory,
            offset,
            gpa,
            size,
            cookie,
            producer: Producer::new(size, cookie, start),
            staged: Staged::default(),
            id: 0,
        })
    }

    /// The id the host gave it.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Its guest-physical address.
    pub(crate) fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Its number of entries.
    pub(crate) fn entries(&self) -> u32 {
        self.size.get()
    }

    /// Its secret.
    pub(crate) fn cookie(&self) -> Cookie {
        self.cookie
    }

    /// Position of the next entry to place.
    pub(crate) fn tail(&self) -> u32 {
        self.producer.tail()
    }

    /// `done` in the header.
    pub(crate) fn done(&self) -> u32 {
        self.host_word(header::DONE)
    }

    /// `flags` in the header.
    pub(crate) fn flags(&self) -> u32 {
        self.host_word(header::FLAGS)
    }

    /// `declined` in the header.
    pub(crate) fn declined(&self) -> u64 {
        self.memory.word(self.offset + header::DECLINED).load(Ordering::SeqCst)
    }

    /// `tail` in the header.
    pub(crate) fn guest_tail(&self) -> u32 {
        self.host_word(header::TAIL)
    }

    /// The whole ring as it lies in memory.
    pub(crate) fn snapshot(&self) -> Vec<u64> {
        self.memory.snapshot(self.offset, self.bytes())
    }

    /// Bytes of memory the ring takes.
    pub(crate) fn bytes(&self) -> usize {
        self.size.bytes() as usize
    }

    /// Overwrites the whole ring, word by word.
    pub(crate) fn overwrite(&self, word_at: impl Fn(usize) -> u64) {
        self.memory.fill(self.offset, self.bytes(), |at| word_at(at - self.offset));
    }

    /// The status word of the entry at a position.
    pub(crate) fn status(&self, position: u32) -> i32 {
        let status = self.slot_offset(position) + RawEntry::STATUS_OFFSET;
        self.memory.word32(status).load(Ordering::SeqCst) as i32
    }

    /// Sets the status word of the entry at a position.
    pub(crate) fn set_status(&self, position: u32, status: i32) {
        let at = self.slot_offset(position) + RawEntry::STATUS_OFFSET;
        self.memory.word32(at).store(status as u32, Ordering::SeqCst);
    }

    /// The next entry, for a test to spoil; `None` when the ring is full.
    pub(crate) fn prepare(&mut self, call: &Call) -> Option<RawEntry> {
        self.producer.place(self.done(), call).map(|(_, raw)| raw)
    }

    /// Places a call, unpublished; returns its position.
    pub(crate) fn place(&mut self, call: &Call) -> Result<u32> {
        let position = self.tail();
        match self.prepare(call) {
            Some(raw) => self.write_entry(position, &raw),
            None => return failed("the ring is full"),
        }
        Ok(position)
    }

    /// Places a call where [`crate::vcpu::Vcpu::publish`] has the guest copy it from.
    pub(crate) fn stage(&mut self, call: &Call) -> Result<u32> {
        let position = self.tail();
        let Some(raw) = self.prepare(call) else { return failed("the ring is full") };
        if self.staged.count == 0 {
            self.staged.position = position;
        }
        let at = STAGING + self.staged.count as usize * RawEntry::BYTES;
        write_words(&self.low_memory, at, &raw);
        self.staged.count += 1;
        Ok(position)
    }

    /// What has been staged since the last call.
    pub(crate) fn take_staged(&mut self) -> Staged {
        let staged = std::mem::take(&mut self.staged);
        if staged.count == 0 {
            Staged { count: 0, position: self.tail() }
        } else {
            staged
        }
    }

    /// Writes an entry, any entry, into the slot of a position.
    pub(crate) fn write_entry(&self, position: u32, raw: &RawEntry) {
        write_words(&self.memory, self.slot_offset(position), raw);
    }

    /// Publishes what has been placed.
    pub(crate) fn publish(&self) {
        self.publish_tail(self.tail());
    }

    /// Stores any tail.
    pub(crate) fn publish_tail(&self, tail: u32) {
        self.memory.word32(self.offset + header::TAIL).store(tail, Ordering::SeqCst);
    }

    /// Places and publishes `count` times the same call.
    pub(crate) fn push(&mut self, call: &Call, count: u32) -> Result<()> {
        for _ in 0..count {
            self.place(call)?;
        }
        self.publish();
        Ok(())
    }

    /// Tells the producer where the guest got to by itself.
    pub(crate) fn set_producer_tail(&mut self, tail: u32) {
        self.producer = Producer::new(self.size, self.cookie, tail);
    }

    fn host_word(&self, offset: usize) -> u32 {
        self.memory.word32(self.offset + offset).load(Ordering::SeqCst)
    }

    fn slot_offset(&self, position: u32) -> usize {
        self.offset + self.size.slot_offset(self.size.slot(position)) as usize
    }
}

fn write_words(memory: &Mapping, at: usize, raw: &RawEntry) {
    let middle =
        u64::from(raw.op) | (u64::from(raw.flags) << 16) | (u64::from(raw.status as u32) << 32);
    for (index, word) in [raw.tag, middle, raw.arg[0], raw.arg[1]].into_iter().enumerate() {
        memory.word(at + index * 8).store(word, Ordering::SeqCst);
    }
}
