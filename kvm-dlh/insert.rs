// SPDX-License-Identifier: GPL-2.0

//! Calls inserted by a trap: executed while their vCPU waits, on its thread or wherever their operation
//! works.

use dlh_abi::{Call, Error as CallError, Gpa, RawEntry, Status, MAX_CALLS};
use kernel::{prelude::*, sync::Arc};
use kvm_hooks::{may_go_on, Killed};
use kvm_registry::Outcome;
use kvm_vm::{Absent, GuestWindow, Vcpu};

use crate::{
    caller::{Caller, INSERTED},
    failure::Failure,
    patience::with_window,
    ring::Queue,
    stats::Event,
};

/// Calls of an array that are worked on at a time.
const BATCH: usize = 32;

/// A call that has been handed over.
#[derive(Clone, Copy)]
enum Begun {
    /// Finished.
    Ended(Status),
    /// Noted under this number, until it is answered.
    Pending(u32),
}

impl Queue {
    /// Hands one call over. On the vCPU's thread; may sleep.
    fn begin(self: &Arc<Self>, caller: &Caller<'_>, call: &Call) -> Begun {
        self.stats().submitted(1);
        if let Some(status) = self.execute_builtin(caller, call) {
            return Begun::Ended(status);
        }
        let Ok(number) = self.inserted().note() else {
            return Begun::Ended(CallError::NoMemory.into());
        };
        match self.execute(&mut self.calls(), caller, call, number) {
            Outcome::Pending => Begun::Pending(number),
            Outcome::Finished(status) => {
                self.inserted().forget(number);
                Begun::Ended(status)
            }
        }
    }

    /// Waits for the end of a call. May sleep, and be frozen.
    ///
    /// # Errors
    ///
    /// The task is being killed; nobody waits for the call any more.
    fn end(&self, begun: Begun, call: &Call) -> Result<Status, Killed> {
        let status = match begun {
            Begun::Ended(status) => status,
            Begun::Pending(number) => {
                let answered = self.inserted().wait(number);
                match (self.inserted().forget(number), answered) {
                    (Some(status), _) => status,
                    (None, Ok(())) => CallError::Gone.into(),
                    (None, Err(killed)) => {
                        // Counted as declined: what becomes of it nobody hears.
                        self.stats().ended(call.op, CallError::Gone.into());
                        return Err(killed);
                    }
                }
            }
        };
        self.stats().ended(call.op, status);
        Ok(status)
    }

    /// Executes what the vCPU has in its own ring: it was there first.
    fn after_own_ring(&self, vcpu: &Vcpu) -> Result<(), Killed> {
        self.ring(vcpu.index()).map_or(Ok(()), |ring| ring.come_first(vcpu))
    }

    /// Executes a call to its end. On the vCPU's thread; may sleep.
    pub(crate) fn insert(self: &Arc<Self>, vcpu: &Vcpu, call: &Call) -> Result<Status, Killed> {
        self.after_own_ring(vcpu)?;
        self.stats().count(Event::Inserted);
        let caller = Caller { vcpu, vcpu_id: vcpu.id(), feed: INSERTED, time: None };
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
    ) -> Result<u64, Failure> {
        if count == 0 || count > MAX_CALLS {
            return Err(CallError::Size.into());
        }
        if array.0 % RawEntry::BYTES as u64 != 0 {
            return Err(CallError::Align.into());
        }
        self.after_own_ring(vcpu)?;
        let bytes = count * RawEntry::BYTES as u64;
        // All of it must lie there, or nothing is done.
        with_array(vcpu, array, bytes, |_, _| Ok(()))?;
        let mut clock = self.budget().clock();
        clock.start();
        let mut ended = 0;
        while ended < count as usize && (ended == 0 || !clock.is_over() && may_go_on()) {
            let at = ended * RawEntry::BYTES;
            let some = BATCH.min(count as usize - ended);
            let mut buffer = [RawEntry::default(); BATCH];
            let entries = &mut buffer[..some];
            let read = with_array(vcpu, array, bytes, |window, first| {
                window.copy_entries(first + at, entries)
            });
            match read {
                Ok(()) => {}
                // What has ended has its status; the next call tells of the rest.
                Err(Failure::Call(_)) if ended > 0 => break,
                Err(e) => return Err(e),
            }
            let mut begun = [Begun::Ended(Status::OK); BATCH];
            let mut handed_over = 0;
            for (place, raw) in begun.iter_mut().zip(&*entries) {
                self.stats().count(Event::Inserted);
                let time = Some(raw.time());
                let caller = Caller { vcpu, vcpu_id: vcpu.id(), feed: INSERTED, time };
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
            // All are waited for before any answer is stored, which may fail. The memslots may change.
            let mut statuses = [Status::OK; BATCH];
            let mut all = Ok(());
            for ((status, begun), raw) in
                statuses.iter_mut().zip(begun).zip(&entries[..handed_over])
            {
                match self.end(begun, &raw.named()) {
                    Ok(ended) => *status = ended,
                    // The others are not waited for either, but must be forgotten.
                    Err(killed) => all = Err(killed),
                }
            }
            all?;
            with_array(vcpu, array, bytes, |window, first| {
                for (index, status) in statuses[..handed_over].iter().enumerate() {
                    let entry = first + at + index * RawEntry::BYTES;
                    window.write_u32(entry + RawEntry::STATUS_OFFSET, status.0 as u32)?;
                }
                Ok(())
            })?;
            ended += handed_over;
        }
        Ok(ended as u64)
    }
}

/// Shows `work` the window onto the pages of an array, and where in it the array begins. Context and errors as
/// [`with_window`].
fn with_array<T>(
    vcpu: &Vcpu,
    array: Gpa,
    bytes: u64,
    mut work: impl FnMut(&GuestWindow<'_>, usize) -> Result<T, Absent>,
) -> Result<T, Failure> {
    let page = array.gfn().gpa();
    let first = array.0 - page.0;
    with_window(vcpu, page, first + bytes, |window| work(window, first as usize))
}
