// SPDX-License-Identifier: GPL-2.0

//! Why a hypercall did not do what it was to do.

use dlh_abi::Error as CallError;
use kvm_hooks::Killed;

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The guest hears this.
    Call(CallError),
    /// The guest hears nothing: the task is being killed.
    Killed,
}

impl From<CallError> for Failure {
    fn from(e: CallError) -> Self {
        Self::Call(e)
    }
}

impl From<Killed> for Failure {
    fn from(_: Killed) -> Self {
        Self::Killed
    }
}
