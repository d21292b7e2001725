// SPDX-License-Identifier: GPL-2.0

//! The 32 bytes of an entry, and the tag that says they are one.

use crate::{Call, Error, Operation, Status};

/// The secret of one ring registration.
///
/// Memory that held a ring and now holds something else does not contain it, so nothing there is
/// taken for an entry (DESIGN.md rule 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cookie(pub u64);

impl Cookie {
    /// The tag of the entry at `position`: a stale entry of an earlier lap has another one.
    #[inline]
    pub const fn tag(self, position: u32) -> u64 {
        self.0.wrapping_add(position as u64)
    }
}

/// An entry as it lies in guest memory (`struct kvm_dlh_entry`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RawEntry {
    /// [`Cookie::tag`] of the entry's position.
    pub tag: u64,
    /// Operation number.
    pub op: u16,
    /// Must be 0.
    pub flags: u16,
    /// Written by the host where it is not 0; see also [`RawEntry::time`].
    pub status: i32,
    /// Arguments.
    pub arg: [u64; 2],
}

const _: () = assert!(size_of::<RawEntry>() == RawEntry::BYTES && align_of::<RawEntry>() == 8);

impl RawEntry {
    /// Size of an entry in bytes.
    pub const BYTES: usize = 32;
    /// Offset of [`RawEntry::status`] in bytes.
    pub const STATUS_OFFSET: usize = core::mem::offset_of!(RawEntry, status);

    /// The entry that carries `call` at `position`.
    #[inline]
    pub const fn new(cookie: Cookie, position: u32, call: &Call) -> Self {
        Self { tag: cookie.tag(position), op: call.op.0, flags: 0, status: 0, arg: call.arg }
    }

    /// The same entry, of an event at `time`; see [`RawEntry::time`].
    #[inline]
    pub const fn at(self, time: u32) -> Self {
        Self { status: time as i32, ..self }
    }

    /// Whether this is nothing but a NOP, whatever its arguments.
    #[inline]
    pub const fn is_plain_nop(&self) -> bool {
        // Compiled into one comparison of both.
        ((self.flags as u32) << 16) | (self.op ^ Operation::NOP.0) as u32 == 0
    }

    /// Whether `status` has to be stored in the entry: a guest finds 0 where it has cleared the word.
    #[inline]
    pub const fn wants_status(&self, status: Status) -> bool {
        !status.is_ok() || self.op == Operation::TRACE.0
    }

    /// What the guest stored in the status word: for [`Operation::TRACE`], the lower half of its
    /// time-stamp counter.
    #[inline]
    pub const fn time(&self) -> u32 {
        self.status as u32
    }

    /// The operation and arguments that stand here, whatever the flags say.
    #[inline]
    pub const fn named(&self) -> Call {
        Call { op: Operation(self.op), arg: self.arg }
    }

    /// The call in this copy of an entry, whose tag has been checked.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if reserved flags are set.
    #[inline]
    pub const fn call(&self) -> Result<Call, Error> {
        if self.flags != 0 {
            return Err(Error::Argument);
        }
        Ok(self.named())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_round_trips() {
        let call = Call { op: Operation::FREE_PAGES, arg: [0x1000, 0x2000] };
        let raw = RawEntry::new(Cookie(7), u32::MAX, &call);
        assert_eq!(raw.tag, 7 + u64::from(u32::MAX));
        assert_eq!(raw.call(), Ok(call));
        assert_eq!(RawEntry { flags: 1, ..raw }.call(), Err(Error::Argument));
    }

    #[test]
    fn layout_is_the_header_s() {
        assert_eq!(RawEntry::STATUS_OFFSET, 12);
        assert_eq!(core::mem::offset_of!(RawEntry, arg), 16);
    }
}
