// SPDX-License-Identifier: GPL-2.0

//! What a guest or a VMM may do that no sane one does: it keeps no thread in the kernel, holds nobody else up, and
//! nothing of its calls is pending when KVM_RUN returns.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use dlh_abi::{Function, Operation};

use super::reporting::{report, MIB, PAGE_BYTES, PLACE};
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping};
use crate::ring::{Ring, UNKNOWN};
use crate::thread::{wait_until, PATIENCE};
use crate::vcpu::Exit;
use crate::vm::{Vm, VmConfig, BASE};

/// Memory of which next to nothing is there, and which takes long to go through.
const SPARSE: usize = 512 << 30;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("a vCPU on the thread that it had leaves nothing pending", || moved(false)),
        Case::new("a vCPU on a new thread leaves nothing pending, either", || moved(true)),
        Case::new("entries that the guest takes back are not waited for", taken_back),
        Case::new("a worker that is never idle keeps no tracer from going", busy_worker),
    ]
}

/// KVM_RUN of one vCPU returns while another one's KICK works on what lies in the ring of the first.
fn moved(moved: bool) -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    vm.add_memory(PLACE, Mapping::new(Backing::Sparse, SPARSE)?)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    // The bridge gets to know the VM.
    ring.push(&report(BASE + MIB as u64, PAGE_BYTES), 1)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    let (mut second, mut first) = (vm.vcpus.remove(1), vm.vcpus.remove(0));
    let id = ring.id();
    for _ in 0..3 {
        ring.push(&report(PLACE, SPARSE as u64), 1)?;
        let (done, tail) = thread::scope(|scope| -> Result<(u32, u32)> {
            let kick = scope.spawn(|| {
                second.hypercall(Function::Kick as u64, id, 0, 0).map_err(|e| e.to_string())
            });
            wait_until(PATIENCE, "the call is pending, or over", || {
                vm.stats().and_then(|s| s.get("pending")).is_ok_and(|n| n == 1)
                    || kick.is_finished()
            })?;
            let (first, ring) = (&mut first, &ring);
            let run = move || {
                first.exit(Exit::Pio).map_err(|e| e.to_string())?;
                Ok::<_, String>((ring.done(), ring.tail()))
            };
            let seen = if moved {
                scope.spawn(run).join().map_err(|_| "the thread panicked")??
            } else {
                let mut run = run;
                run()?
            };
            kick.join().map_err(|_| "the thread panicked")??;
            Ok(seen)
        })?;
        check_eq!(done, tail, "done when KVM_RUN returns");
    }
    vm.vcpus = vec![first, second];
    Ok(Verdict::Pass)
}

/// The guest stores a smaller tail while the host executes what it saw.
fn taken_back() -> CaseResult {
    const ENTRIES: u32 = 65536;
    const BACK: u32 = ENTRIES - 500;
    // Mostly the first round does. The host may be faster than the other vCPU.
    for round in 1.. {
        let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
        vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, 4 * MIB)?)?;
        let mut ring = Ring::set_up(&mut vm, 0, PLACE, ENTRIES, 0)?;
        for _ in 0..ENTRIES {
            ring.place(&UNKNOWN)?;
        }
        ring.publish();
        let (mut other, mut vcpu) = (vm.vcpus.remove(1), vm.vcpus.remove(0));
        let done = thread::scope(|scope| -> Result<u32> {
            // This returns to the VMM, before which all is executed that is there.
            let runner = scope.spawn(|| vcpu.exit(Exit::Pio).map_err(|e| e.to_string()));
            while ring.done() == 0 && !runner.is_finished() {
                std::hint::spin_loop();
            }
            other.store(PLACE, BACK)?;
            runner.join().map_err(|_| "the thread panicked")??;
            Ok(ring.done())
        })?;
        vm.vcpus = vec![vcpu, other];
        if done == BACK {
            println!("# taken back in round {round}");
            // It goes on where it is.
            ring.publish_tail(ENTRIES);
            vm.vcpus[0].exit(Exit::Pio)?;
            check_eq!(ring.done(), ENTRIES, "done after the tail is forward again");
            break;
        }
    }
    Ok(Verdict::Pass)
}

/// One call after the other, each of which keeps the worker busy for long. Whoever takes a tracer off waits until every
/// thread has passed a place where it might have slept: the worker has to, in the middle of a request.
fn busy_worker() -> CaseResult {
    const TRACING: &str = "/sys/kernel/tracing";
    // A request may be over too soon for that, but not each time.
    const TRIES: u32 = 200;
    const ENOUGH: u32 = 2;
    if !Path::new(TRACING).join("instances").exists() {
        return Ok(Verdict::Skip("there is no tracefs".into()));
    }
    let instance = format!("{TRACING}/instances/dlh_vmm");
    fs::create_dir_all(&instance)?;
    fs::write(format!("{instance}/set_ftrace_filter"), "schedule_timeout")?;
    let mut vm = Vm::new(VmConfig::default())?;
    vm.add_memory(PLACE, Mapping::new(Backing::Sparse, SPARSE)?)?;
    let mut vcpu = vm.vcpus.remove(0);
    let over = AtomicBool::new(false);
    let (inside, tries) = thread::scope(|scope| -> Result<(u32, u32)> {
        scope.spawn(|| {
            let op = u64::from(Operation::FREE_PAGES.0);
            while !over.load(Ordering::SeqCst) {
                if vcpu.hypercall(Function::Call as u64, op, PLACE, SPARSE as u64).is_err() {
                    break;
                }
            }
        });
        let outcome = (|| {
            // Counted when they begin.
            let requests = || vm.bridge_stats().and_then(|s| s.get("requests"));
            wait_until(PATIENCE, "there is a worker", || requests().is_ok())?;
            let (mut inside, mut tries) = (0, 0);
            while inside < ENOUGH && tries < TRIES {
                fs::write(format!("{instance}/current_tracer"), "function")?;
                let before = requests()?;
                wait_until(PATIENCE, "the next request", || requests().is_ok_and(|n| n > before))?;
                let begun = requests()?;
                fs::write(format!("{instance}/current_tracer"), "nop")?;
                inside += u32::from(requests()? == begun);
                tries += 1;
            }
            Ok((inside, tries))
        })();
        over.store(true, Ordering::SeqCst);
        outcome
    })?;
    fs::remove_dir(&instance)?;
    vm.vcpus = vec![vcpu];
    println!("# the tracer was taken off within one request {inside} of {tries} times");
    check!(inside >= ENOUGH, "a tracer goes only between requests");
    Ok(Verdict::Pass)
}
