// SPDX-License-Identifier: GPL-2.0

//! Errors a guest can be told of, and the status word of an entry.

/// Why a function or an entry was not carried out.
///
/// The discriminants are the `KVM_DLH_E*` numbers of the C header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Error {
    /// The caller is in SMM, a nested guest, or an encrypted VM.
    Refused = 1101,
    /// Unknown function.
    Function = 1102,
    /// The ring's address is not page aligned.
    Align = 1103,
    /// The ring's size is no power of two, or out of range.
    Size = 1104,
    /// The range is not inside one usable memslot.
    Memory = 1105,
    /// No such ring.
    NoRing = 1106,
    /// Unknown operation.
    Operation = 1107,
    /// Reserved bits set, or an argument out of range.
    Argument = 1108,
    /// Declined: no room at the moment.
    Busy = 1109,
    /// The host could not allocate memory.
    NoMemory = 1110,
    /// Declined: the operation or the ring went away meanwhile.
    Gone = 1111,
    /// The answer to [`FreePages::Question`](crate::FreePages::Question): report all that is free once more.
    Again = 1112,
}

impl Error {
    /// The value a hypercall returns in RAX.
    #[inline]
    pub const fn to_rax(self) -> i64 {
        -(self as u16 as i64)
    }

    /// Why the host declines what it may execute at another time.
    const TRANSIENT: [Self; 4] = [Self::Busy, Self::NoMemory, Self::Operation, Self::Gone];

    /// Whether what a hypercall returned in RAX says that the host may do it at another time.
    #[inline]
    pub fn is_transient(rax: i64) -> bool {
        Self::TRANSIENT.iter().any(|error| error.to_rax() == rax)
    }
}

/// The outcome of an executed entry, as it stands in the entry's status word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub i32);

impl Status {
    /// Executed.
    pub const OK: Self = Self(0);

    /// Whether the entry was executed, as opposed to declined.
    #[inline]
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }

    /// Whether the entry was declined for now: the host may execute it at another time.
    #[inline]
    pub fn is_transient(self) -> bool {
        Error::is_transient(self.0.into())
    }
}

impl From<Error> for Status {
    #[inline]
    fn from(e: Error) -> Self {
        Self(-i32::from(e as u16))
    }
}

impl From<Result<(), Error>> for Status {
    #[inline]
    fn from(r: Result<(), Error>) -> Self {
        match r {
            Ok(()) => Self::OK,
            Err(e) => e.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_negative_on_both_paths() {
        assert_eq!(Error::Refused.to_rax(), -1101);
        assert_eq!(Status::from(Error::Gone), Status(-1111));
        assert!(!Status::from(Err(Error::Busy)).is_ok());
        assert!(Status::from(Ok(())).is_ok());
    }

    #[test]
    fn what_is_declined_for_now_is_known_on_both_paths() {
        for error in [Error::Busy, Error::NoMemory, Error::Operation, Error::Gone] {
            assert!(Error::is_transient(error.to_rax()) && Status::from(error).is_transient());
        }
        for error in [Error::Refused, Error::Argument, Error::NoRing, Error::Again] {
            assert!(!Error::is_transient(error.to_rax()) && !Status::from(error).is_transient());
        }
        assert!(!Status::OK.is_transient());
    }
}
