// SPDX-License-Identifier: GPL-2.0

//! The functions of the hypercall: from registers to checked arguments to one method.

use dlh_abi::{
    Call, Error as CallError, Function, Gpa, RingSize, Status, ABI_VERSION, FEATURE_CALL,
    FEATURE_CALLS, FEATURE_RING, FEATURE_TRACE,
};
use kernel::{
    prelude::*,
    sync::{
        barrier::{smp_mb, Full},
        Arc,
    },
};
use kvm_hooks::{HypercallArgs, Killed};
use kvm_registry::Owner;
use kvm_vm::Vcpu;

use crate::{
    failure::Failure,
    host::Host,
    ring::{Queue, Ring},
    stats::Event,
};

/// Carries out one hypercall; returns RAX. On the vCPU's thread; may sleep.
///
/// # Errors
///
/// The task is being killed. The call is not over then: whoever runs the vCPU after that makes it again.
pub(crate) fn hypercall(host: &Arc<Host>, vcpu: &Vcpu, args: HypercallArgs) -> Result<i64, Killed> {
    let queue = match host.queue_of_vcpu(vcpu) {
        Ok(queue) => queue,
        Err(e) => return Ok(e.to_rax()),
    };
    queue.stats().count(Event::Hypercall);
    match dispatch(host, &queue, vcpu, args) {
        Ok(rax) => Ok(rax),
        Err(Failure::Call(e)) => {
            queue.stats().error(e.into());
            Ok(e.to_rax())
        }
        Err(Failure::Killed) => Err(Killed),
    }
}

fn dispatch(
    host: &Arc<Host>,
    queue: &Arc<Queue>,
    vcpu: &Vcpu,
    HypercallArgs { function, arg }: HypercallArgs,
) -> Result<i64, Failure> {
    if vcpu.is_refused() {
        return Err(CallError::Refused.into());
    }
    match Function::try_from(function)? {
        Function::Features => {
            let own = FEATURE_RING | FEATURE_CALL | FEATURE_CALLS | FEATURE_TRACE;
            let bits = host.registry().features() | own;
            Ok(i64::from(ABI_VERSION) << 32 | i64::from(bits))
        }
        Function::RingSetup => set_up(host, queue, vcpu, arg),
        Function::RingTeardown => {
            let id = ring_id(arg[0])?;
            if queue.remove_ring(id, Some(vcpu))? {
                Ok(0)
            } else {
                Err(CallError::NoRing.into())
            }
        }
        Function::Kick => {
            let ring = queue.ring(ring_id(arg[0])?).ok_or(CallError::NoRing)?;
            queue.stats().count(Event::Kick);
            if ring.kick(vcpu)? {
                Ok(0)
            } else {
                Err(CallError::NoRing.into())
            }
        }
        Function::Call => {
            let call = Call::from_registers(arg[0], arg[1], arg[2])?;
            let Status(status) = queue.insert(vcpu, &call)?;
            Ok(i64::from(status))
        }
        Function::Calls => {
            let [array, count, flags] = arg;
            if flags != 0 {
                return Err(CallError::Argument.into());
            }
            let ended = queue.insert_all(vcpu, Gpa(array), count)?;
            Ok(i64::try_from(ended).map_err(|_| CallError::Size)?)
        }
    }
}

fn ring_id(arg: u64) -> Result<u32, CallError> {
    u32::try_from(arg).map_err(|_| CallError::NoRing)
}

fn set_up(
    host: &Arc<Host>,
    queue: &Arc<Queue>,
    vcpu: &Vcpu,
    [gpa, entries, flags]: [u64; 3],
) -> Result<i64, Failure> {
    if flags != 0 {
        return Err(CallError::Argument.into());
    }
    let gpa = Gpa(gpa);
    if !gpa.is_page_aligned() {
        return Err(CallError::Align.into());
    }
    let size = RingSize::try_from(entries)?;
    // What is refused costs the caller nothing, not even the ring it has.
    Ring::check_memory(vcpu, gpa, size)?;
    queue.remove_ring(vcpu.index(), Some(vcpu))?;
    let ring = Ring::set_up(queue, host.tables(), vcpu, gpa, size)?;
    host.tables().announce(&ring).map_err(|_| CallError::NoMemory)?;
    if queue.add_ring(ring.clone()).is_err() {
        ring.forget();
        return Err(CallError::NoMemory.into());
    }
    // Whoever closes all rings sets the flag first: it has seen this ring, or this sees the flag.
    smp_mb(Full);
    if host.is_closing() {
        queue.remove_ring(ring.id(), Some(vcpu))?;
        return Err(CallError::Gone.into());
    }
    ring.follow();
    Ok(i64::from(ring.id()))
}
