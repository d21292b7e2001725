// SPDX-License-Identifier: GPL-2.0

//! The DLH hypercall, one function of the ABI each.
//!
//! C header: `include/uapi/linux/kvm_dlh.h`. Any context; the host may take its time.

use dlh_abi::{Call, Error as CallError, Function, Gpa, Operation, RingSize};
use dlh_bindings as bindings;
use kernel::{
    fmt,
    sync::atomic::{ordering::Relaxed, Atomic},
};

use crate::CpuGuard;

/// What KVM answers to a hypercall it does not know (`-KVM_ENOSYS`).
const UNKNOWN: i64 = -1000;

/// Hypercalls made so far, by this crate.
static MADE: Atomic<u64> = Atomic::new(0);

/// The host did not do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostError(i64);

impl HostError {
    /// The host knows nothing of DLH: its module is not there, or not there any more.
    pub fn is_absent(self) -> bool {
        self.0 == UNKNOWN
    }

    /// The host has no such ring: nothing of it is worked on.
    pub fn is_no_ring(self) -> bool {
        self.0 == CallError::NoRing.to_rax()
    }

    /// The host does not know what was asked.
    pub fn is_argument(self) -> bool {
        self.0 == CallError::Argument.to_rax()
    }

    /// The host may do it at another time.
    pub fn is_put_off(self) -> bool {
        self.is_absent() || CallError::is_transient(self.0)
    }
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)?;
        f.write_str(if self.is_absent() { " (it has no kvm_dlh)" } else { "" })
    }
}

/// What the host offers.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Its version of the ABI.
    pub version: u32,
    /// `dlh_abi::FEATURE_*`.
    pub bits: u32,
}

/// Hypercalls made so far.
pub fn made() -> u64 {
    MADE.load(Relaxed)
}

/// # Safety
///
/// The function must be one that leaves the memory alone that this kernel has not given up.
unsafe fn make(function: Function, arg: [u64; 3]) -> Result<u64, HostError> {
    MADE.add(1, Relaxed);
    // SAFETY: A hypercall may be made anywhere; the rest is the caller's duty.
    let rax = unsafe { bindings::dlh_guest_hypercall(function as u64, arg[0], arg[1], arg[2]) };
    u64::try_from(rax).map_err(|_| HostError(rax))
}

/// Asks what the host offers.
///
/// # Errors
///
/// As the host answers; [`HostError::is_absent`] on a stock host.
pub fn features() -> Result<Features, HostError> {
    // SAFETY: Changes nothing.
    match unsafe { make(Function::Features, [0; 3]) }? {
        // The contract says "always positive".
        0 => Err(HostError(0)),
        rax => Ok(Features { version: (rax >> 32) as u32, bits: rax as u32 }),
    }
}

/// Makes a hypercall whose number no host knows: the cheapest way to the host and back.
///
/// # Context
///
/// Any. `_here` keeps what comes after it on the vCPU that made it.
#[inline]
pub fn unknown(_here: &CpuGuard) {
    MADE.add(1, Relaxed);
    // SAFETY: A hypercall may be made anywhere, and this one is refused.
    unsafe { bindings::dlh_guest_unknown_hypercall() };
}

/// Sets up a ring for this vCPU; returns its number.
///
/// # Safety
///
/// `gpa` must be the address of zeroed memory of `size.bytes()` bytes that is used for nothing but a
/// ring until the host has said that the ring does not exist (any more).
pub(crate) unsafe fn ring_setup(
    gpa: Gpa,
    size: RingSize,
    _here: &CpuGuard,
) -> Result<u32, HostError> {
    // SAFETY: By the safety requirements, the host writes to memory that was given up for it.
    let id = unsafe { make(Function::RingSetup, [gpa.0, u64::from(size.get()), 0]) }?;
    u32::try_from(id).map_err(|_| HostError(id as i64))
}

/// Tears a ring down: on return nothing of it is, or will be, worked on.
pub(crate) fn ring_teardown(id: u32) -> Result<(), HostError> {
    // SAFETY: Ends the use of memory.
    unsafe { make(Function::RingTeardown, [u64::from(id), 0, 0]) }.map(|_| ())
}

/// Executes what is visible in a ring: on return it has been executed to its end.
pub(crate) fn kick(id: u32) -> Result<(), HostError> {
    // SAFETY: Only what was placed in the ring is executed, and that was allowed there.
    unsafe { make(Function::Kick, [u64::from(id), 0, 0]) }.map(|_| ())
}

/// Puts an event into the host's trace, without a ring.
///
/// # Errors
///
/// The host has no trace, or has none any more.
pub fn trace(payload: [u64; 2]) -> Result<(), HostError> {
    // SAFETY: Names no memory.
    unsafe { call(&Call { op: Operation::TRACE, arg: payload }) }
}

/// Executes one call without a ring: on return it has been executed to its end, or not at all.
///
/// # Safety
///
/// The host may discard the memory that the call names until this returns.
pub(crate) unsafe fn call(call: &Call) -> Result<(), HostError> {
    let [arg0, arg1] = call.arg;
    // SAFETY: By the safety requirements.
    unsafe { make(Function::Call, [u64::from(call.op.0), arg0, arg1]) }.map(|_| ())
}
