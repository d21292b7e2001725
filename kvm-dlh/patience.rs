// SPDX-License-Identifier: GPL-2.0

//! Guest memory that is not there: asked for a bounded number of times, and waited for with no lock held.

use dlh_abi::{Error as CallError, Gpa};
use kvm_hooks::{may_go_on, sleep_a_moment, Killed};
use kvm_vm::{Absent, GuestWindow, Presence, Vcpu, Vm};

use crate::failure::Failure;

/// How often memory is asked for at most, about a millisecond apart while it does not come.
const TRIES: u32 = 2000;

/// How long to go on asking. Who keeps the memory away may be the VMM's user: nothing waits for that without end.
pub(crate) struct Patience(u32);

/// Why there is no point in trying again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GivenUp {
    /// The memory cannot be had, or does not come.
    Never,
    /// The current task is being killed.
    Killed,
}

impl From<Killed> for GivenUp {
    fn from(_: Killed) -> Self {
        Self::Killed
    }
}

impl Patience {
    /// All of it.
    pub(crate) fn new() -> Self {
        Self(TRIES)
    }

    /// Asks for what was absent; `Ok` means: try again. On a thread of the VMM; may sleep; no locks, the
    /// memslots' included.
    pub(crate) fn ask(&mut self, absent: Absent, vm: &Vm) -> Result<(), GivenUp> {
        if !may_go_on() {
            return Err(GivenUp::Killed);
        }
        self.0 = self.0.checked_sub(1).ok_or(GivenUp::Never)?;
        match absent.fetch(vm) {
            Presence::Here => Ok(()),
            Presence::NotYet => Ok(sleep_a_moment()?),
            Presence::Never => Err(GivenUp::Never),
        }
    }
}

/// Shows `work` the `bytes` bytes of guest memory from the page-aligned `gpa` on, again until all that it accesses is
/// there. On a thread of the VMM; may sleep.
///
/// # Errors
///
/// [`CallError::Memory`] if they are not in one usable memslot, or do not come.
pub(crate) fn with_window<T>(
    vcpu: &Vcpu,
    gpa: Gpa,
    bytes: u64,
    mut work: impl FnMut(&GuestWindow<'_>) -> Result<T, Absent>,
) -> Result<T, Failure> {
    let mut patience = Patience::new();
    loop {
        let absent = {
            let slots = vcpu.vm().memslots();
            let window = GuestWindow::open(&slots, gpa, bytes).map_err(|_| CallError::Memory)?;
            match work(&window) {
                Ok(result) => return Ok(result),
                Err(absent) => absent,
            }
        };
        match patience.ask(absent, vcpu.vm()) {
            Ok(()) => {}
            Err(GivenUp::Never) => return Err(CallError::Memory.into()),
            Err(GivenUp::Killed) => return Err(Failure::Killed),
        }
    }
}
