// SPDX-License-Identifier: GPL-2.0

//! What a guest asks for: a function of the hypercall, or an operation of a deferred call.

use crate::Error;

/// The functions of the DLH hypercall (`KVM_DLH_FN_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Function {
    /// Report version and features.
    Features = 0,
    /// Set up, or replace, the calling vCPU's ring.
    RingSetup = 1,
    /// Tear a ring down.
    RingTeardown = 2,
    /// Execute a ring's visible entries to their end, now.
    Kick = 3,
    /// Insert one call into the VM's queue.
    Call = 4,
    /// Insert the calls of an array into the VM's queue.
    Calls = 5,
}

impl TryFrom<u64> for Function {
    type Error = Error;

    fn try_from(nr: u64) -> Result<Self, Error> {
        Ok(match nr {
            0 => Self::Features,
            1 => Self::RingSetup,
            2 => Self::RingTeardown,
            3 => Self::Kick,
            4 => Self::Call,
            5 => Self::Calls,
            _ => return Err(Error::Function),
        })
    }
}

/// The number of a deferrable operation; which numbers exist is the host registry's affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Operation(pub u16);

impl Operation {
    /// Does nothing; for measuring and probing (`KVM_DLH_OP_NOP`).
    pub const NOP: Self = Self(0);
    /// Names guest pages whose contents need no keeping (`KVM_DLH_OP_FREE_PAGES`).
    pub const FREE_PAGES: Self = Self(1);
    /// Puts 16 bytes of the guest's into the host's trace (`KVM_DLH_OP_TRACE`).
    pub const TRACE: Self = Self(2);
}

/// One deferred call: an operation with its arguments, copied out of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// What to do.
    pub op: Operation,
    /// Its arguments; their meaning is the operation's.
    pub arg: [u64; 2],
}

impl Call {
    /// The call that the registers of `KVM_DLH_FN_CALL` describe.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if flags or bits above them are set: version 1 knows none.
    pub fn from_registers(op_flags: u64, arg0: u64, arg1: u64) -> Result<Self, Error> {
        match u16::try_from(op_flags) {
            Ok(op) => Ok(Self { op: Operation(op), arg: [arg0, arg1] }),
            Err(_) => Err(Error::Argument),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn function_numbers_round_trip() {
        for nr in 0..6u64 {
            assert_eq!(Function::try_from(nr).unwrap() as u64, nr);
        }
        assert_eq!(Function::try_from(6), Err(Error::Function));
        assert_eq!(Function::try_from(u64::MAX), Err(Error::Function));
    }

    #[test]
    fn call_flags_are_reserved() {
        assert!(Call::from_registers(0xffff, 1, 2).is_ok());
        assert_eq!(Call::from_registers(0x1_0000, 1, 2), Err(Error::Argument));
    }
}
