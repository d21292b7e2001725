// SPDX-License-Identifier: GPL-2.0

//! Calls inserted by a trap: executed while their vCPU waits, on its thread or wherever their operation
//! works.

use core::mem::MaybeUninit;

use dlh_abi::{Call, Error as CallError, Gpa, RawEntry, Status, MAX_CALLS};
use kernel::{
    prelude::*,
    rbtree::{RBTree, RBTreeNode},
    sync::Arc,
};
use kvm_hooks::{may_go_on, wait_until, wake};
use kvm_registry::Outcome;
use kvm_vm::{GuestWindow, Vcpu};

use crate::{
    queue::{Caller, VmQueue, INSERTED},
    stats::Event,
};

/// Calls of an array that are worked on at a time.
const BATCH: usize = 32;

/// The calls that wait, by number, with their answers.
pub(crate) struct Inserted(RBTree<u32, Option<Status>>);

/// A call that has been handed over.
#[derive(Clone, Copy)]
enum Begun {
    /// Finished.
    Ended(Status),
    /// Noted under this number, until it is answered.
    Pending(u32),
}

impl Inserted {
    pub(crate) fn new() -> Self {
        Self(RBTree::new())
    }

    fn is_answered(&self, number: u32) -> bool {
        self.0.get(&number).is_none_or(Option::is_some)
    }
}

impl VmQueue {
    /// A pending call is finished. Any context in which a spin lock may be taken.
    pub(crate) fn answer(&self, number: u32, status: Status) {
        if let Some(answer) = self.inserted().lock().0.get_mut(&number) {
            *answer = Some(status);
        }
        wake(self);
    }

    /// Hands one call over. On the vCPU's thread; may sleep.
    fn begin(self: &Arc<Self>, caller: &Caller<'_>, call: &Call) -> Begun {
        self.stats().submitted(1);
        if let Some(status) = self.execute_builtin(caller, call) {
            return Begun::Ended(status);
        }
        let number = self.next_call();
        let Ok(node) = RBTreeNode::new(number, None, GFP_KERNEL_ACCOUNT) else {
            return Begun::Ended(CallError::NoMemory.into());
        };
        drop(self.inserted().lock().0.insert(node));
        match self.execute(caller, call, number) {
            Outcome::Pending => Begun::Pending(number),
            Outcome::Finished(status) => {
                let noted = self.inserted().lock().0.remove_node(&number);
                drop(noted);
                Begun::Ended(status)
            }
        }
    }

    /// Waits for the end of a call. May sleep, and be frozen.
    fn end(&self, begun: Begun, call: &Call) -> Status {
        let status = match begun {
            Begun::Ended(status) => status,
            Begun::Pending(number) => {
                wait_until(self, || self.inserted().lock().is_answered(number));
                let noted = self.inserted().lock().0.remove_node(&number);
                noted.and_then(|node| node.to_key_value().1).unwrap_or(CallError::Gone.into())
            }
        };
        self.stats().ended(call.op, status);
        status
    }

    /// Executes what the vCPU has in its own ring: it was there first.
    fn after_own_ring(&self, vcpu: &Vcpu) {
        if let Some(ring) = self.ring(vcpu.index()) {
            ring.come_first(vcpu);
        }
    }

    /// Executes a call to its end. On the vCPU's thread; may sleep.
    pub(crate) fn insert(self: &Arc<Self>, vcpu: &Vcpu, call: &Call) -> Status {
        self.after_own_ring(vcpu);
        self.stats().count(Event::Inserted);
        let caller = Caller { vcpu, feed: INSERTED, time: None };
        let begun = self.begin(&caller, call);
        self.end(begun, call)
    }

    /// Executes calls of an array to their ends, until all are or time is up; returns how many. On the
    /// vCPU's thread; may sleep.
    ///
    /// # Errors
    ///
    /// Nothing of the array has been executed then, or its statuses cannot be stored.
    pub(crate) fn insert_all(
        self: &Arc<Self>,
        vcpu: &Vcpu,
        array: Gpa,
        count: u64,
    ) -> Result<u64, CallError> {
        if count == 0 || count > MAX_CALLS {
            return Err(CallError::Size);
        }
        if array.0 % RawEntry::BYTES as u64 != 0 {
            return Err(CallError::Align);
        }
        self.after_own_ring(vcpu);
        let unreachable = |_: Error| CallError::Memory;
        let slots = vcpu.vm().memslots();
        let page = array.gfn().gpa();
        let first = (array.0 - page.0) as usize;
        let bytes = count * RawEntry::BYTES as u64 + first as u64;
        let window = GuestWindow::open(&slots, page, bytes).map_err(|_| CallError::Memory)?;
        let mut clock = self.host().budget().clock();
        clock.start();
        let mut ended = 0;
        while ended < count as usize && (ended == 0 || !clock.is_over() && may_go_on()) {
            let offset = first + ended * RawEntry::BYTES;
            let some = BATCH.min(count as usize - ended);
            let mut buffer = [const { MaybeUninit::<RawEntry>::uninit() }; BATCH];
            let entries = window.read_entries(offset, &mut buffer[..some]).map_err(unreachable)?;
            let mut begun = [Begun::Ended(Status::OK); BATCH];
            let mut handed_over = 0;
            for (place, raw) in begun.iter_mut().zip(entries) {
                self.stats().count(Event::Inserted);
                let caller = Caller { vcpu, feed: INSERTED, time: Some(raw.time()) };
                *place = match raw.call() {
                    Ok(call) => self.begin(&caller, &call),
                    Err(e) => {
                        self.stats().submitted(1);
                        Begun::Ended(e.into())
                    }
                };
                handed_over += 1;
                // Telling the time costs more than what is built in.
                if matches!(place, Begun::Pending(_)) && clock.is_over() {
                    break;
                }
            }
            // All are waited for before any answer is stored, which may fail.
            let mut stored = Ok(());
            for (index, raw) in entries[..handed_over].iter().enumerate() {
                let status = self.end(begun[index], &raw.named());
                let at = offset + index * RawEntry::BYTES + RawEntry::STATUS_OFFSET;
                stored = stored.and(window.write_u32(at, status.0 as u32));
            }
            stored.map_err(unreachable)?;
            ended += handed_over;
        }
        Ok(ended as u64)
    }
}
