// SPDX-License-Identifier: GPL-2.0

//! What a call of [`Operation::FREE_PAGES`] says: which pages are free, or a question.

use crate::{Call, Error, GfnRange, Gpa, Operation, PAGE_SIZE};

/// In the second argument: [`Contents::Any`] (`KVM_DLH_FREE_ANY`).
pub const FREE_ANY: u64 = 1 << 0;
/// In the second argument: [`FreePages::Question`] (`KVM_DLH_FREE_ASK`).
pub const FREE_ASK: u64 = 1 << 1;

/// What a guest relies on finding in pages that it has named free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Zeroes, or what was there.
    Zeroes,
    /// Nothing: zeroes, what was there, or what the file behind private memory holds.
    Any,
}

/// A call of [`Operation::FREE_PAGES`], its arguments checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreePages {
    /// These pages are free.
    Pages(GfnRange, Contents),
    /// Is all that is free to be reported once more? The answer is [`Error::Again`] if so.
    Question,
}

impl FreePages {
    /// What the arguments of a call say.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`]: nothing that this version knows.
    #[inline]
    pub fn parse([first, second]: [u64; 2]) -> Result<Self, Error> {
        // The length is a number of pages, so the bits below that are free for flags.
        let (bytes, flags) = (second & !(PAGE_SIZE - 1), second & (PAGE_SIZE - 1));
        let contents = match flags {
            0 => Contents::Zeroes,
            FREE_ANY => Contents::Any,
            FREE_ASK if first == 0 && bytes == 0 => return Ok(Self::Question),
            _ => return Err(Error::Argument),
        };
        GfnRange::from_bytes(Gpa(first), bytes).map(|frames| Self::Pages(frames, contents))
    }

    /// The call that says it.
    #[inline]
    pub const fn call(self) -> Call {
        let arg = match self {
            Self::Pages(frames, Contents::Zeroes) => [frames.start().gpa().0, frames.bytes()],
            Self::Pages(frames, Contents::Any) => {
                [frames.start().gpa().0, frames.bytes() | FREE_ANY]
            }
            Self::Question => [0, FREE_ASK],
        };
        Call { op: Operation::FREE_PAGES, arg }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_names_no_page() {
        assert_eq!(FreePages::parse(FreePages::Question.call().arg), Ok(FreePages::Question));
        for arg in [[4096, FREE_ASK], [0, FREE_ASK | FREE_ANY], [0, FREE_ASK | 4096], [0, FREE_ANY]]
        {
            assert_eq!(FreePages::parse(arg), Err(Error::Argument), "{arg:x?}");
        }
    }
}
