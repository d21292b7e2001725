// SPDX-License-Identifier: GPL-2.0

//! Very many of everything, and nothing left of it afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dlh_abi::{Error, Function};

use super::check_vm_works;
use super::races::{life_with_ring, stock_life, vms_in_turn};
use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result, Verdict};
use crate::memory::PAGE;
use crate::ring::{Ring, NOP};
use crate::stats;
use crate::thread::{wait_until, PATIENCE};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Vm, VmConfig, BASE};

const KICK: u64 = Function::Kick as u64;
const TEARDOWN: u64 = Function::RingTeardown as u64;

/// vCPUs of the large VM.
const VCPUS: usize = 512;
/// Processes that make VMs at the same time: KVM, and the module, mostly wait for RCU.
const PROCESSES: u32 = 32;
/// VMs each of them makes before anything is counted, and after that.
const FIRST: u32 = 10;
const MORE: u32 = 90;
/// Where that takes longer than so many seconds, it is so many for each process: with fewer the test says nothing.
const SECONDS: u64 = 60;
const LEAST: u32 = 13;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("512 vCPUs with a ring each", many_vcpus),
        Case::new("thousands of VMs leave nothing behind", many_vms),
    ]
}

fn many_vcpus() -> CaseResult {
    let mut vm = Vm::new(VmConfig { vcpus: VCPUS, ..VmConfig::default() })?;
    let before = vm.stats()?;
    let mut rings = Vec::new();
    for index in 0..VCPUS {
        let ring = Ring::set_up(&mut vm, index, BASE + (index * PAGE) as u64, 64, !(index as u32))?;
        check_eq!(ring.id(), index as u64, "id of a ring");
        rings.push(ring);
    }
    check_eq!(vm.rings()?.lines().count(), VCPUS, "rings of the VM");

    // All on one thread, one after the other, then each on its own, all at once.
    for (vcpu, ring) in vm.vcpus.iter_mut().zip(&mut rings) {
        for exit in [Exit::Cpuid, Exit::Pio] {
            ring.stage(&NOP)?;
            let published = vcpu.publish(ring, 0, exit)?;
            check_eq!(published.done, ring.tail(), "done as a guest sees it after {exit:?}");
        }
    }
    std::thread::scope(|scope| {
        let start = |(vcpu, ring)| {
            let (vcpu, ring): (&mut crate::vcpu::Vcpu, &mut Ring) = (vcpu, ring);
            std::thread::Builder::new().stack_size(128 << 10).spawn_scoped(scope, move || {
                let flooded = vcpu.flood(ring, &NOP, 200, |_| true)?;
                check_eq!(flooded.stop, Stop::Done, "how a flood ended");
                check_eq!(ring.done(), ring.tail(), "done when a flood was over");
                Ok(())
            })
        };
        let workers = vm.vcpus.iter_mut().zip(&mut rings).map(start).collect::<Vec<_>>();
        workers.into_iter().try_for_each(|worker| -> Result<()> {
            worker?.join().map_err(|_| "a vCPU thread panicked")?
        })
    })?;
    let after = vm.stats()?;
    check_eq!(after.since(&before, "executed")?, 202 * VCPUS as u64, "entries executed");
    after.check_law()?;

    for (index, ring) in rings.iter_mut().enumerate() {
        ring.push(&NOP, 3)?;
        check_eq!(vm.hypercall(VCPUS / 2, KICK, ring.id(), 0, 0)?, 0, "KICK of ring {index}");
        check_eq!(ring.done(), ring.tail(), "done of ring {index} after KICK");
    }
    // By its own vCPU or by the last one.
    for (index, ring) in rings.iter_mut().enumerate() {
        let caller = if index % 2 == 0 { index } else { VCPUS - 1 };
        check_eq!(vm.hypercall(caller, TEARDOWN, ring.id(), 0, 0)?, 0, "RING_TEARDOWN of {index}");
        ring.push(&NOP, 1)?;
    }
    for (index, ring) in rings.iter().enumerate() {
        let rax = vm.hypercall(index, KICK, ring.id(), 0, 0)?;
        check_eq!(rax, Error::NoRing.to_rax(), "KICK of ring {index} after RING_TEARDOWN");
        check_eq!(ring.done().wrapping_add(1), ring.tail(), "done of ring {index}");
    }
    check_eq!(vm.rings()?, "", "rings of the VM");
    let after = vm.stats()?;
    check_eq!(after.since(&before, "executed")?, 205 * VCPUS as u64, "entries executed");
    check_eq!(after.since(&before, "rings_set_up")?, VCPUS as u64, "rings_set_up");
    after.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

/// What a process that [`many_vms`] starts does: it makes `count` VMs, or [`LEAST`] if that takes too many seconds, each
/// with a ring, and lets them go, some with
/// work to do, some without, some without the ring; or, if they are to be `stock`, just VMs. Prints how many.
pub(crate) fn come_and_go(count: u32, seconds: u64, stock: bool) -> Result<()> {
    let life = if stock { stock_life } else { life_with_ring };
    println!("{}", vms_in_turn(count.min(LEAST), count, Duration::from_secs(seconds), life)?);
    Ok(())
}

fn many_vms() -> CaseResult {
    let uses = uses()?;
    // All that is made once, or is kept for the next one, is there after this.
    let mut made = batch(FIRST)?;
    check_nothing_left(&uses)?;
    let before = objects()?;
    let started = Instant::now();
    let more = batch(MORE)?;
    check_nothing_left(&uses)?;
    made += more;
    println!("# {made} VMs, {more} of them in {:.1} s", started.elapsed().as_secs_f64());
    // What is freed after an RCU grace period goes at some time; what has been left behind does not.
    wait_until(PATIENCE, "nothing is left of the VMs", || match grown(&before, more) {
        Ok(grown) => grown.is_empty(),
        Err(_) => false,
    })?;
    Ok(Verdict::Pass)
}

/// The kernel's caches in which there is an object for every other VM, of `count`, that was not there `before`.
fn grown(before: &BTreeMap<String, u64>, count: u64) -> Result<Vec<String>> {
    let mut grown = Vec::new();
    for (name, objects) in objects()? {
        let growth = objects.saturating_sub(before.get(&name).copied().unwrap_or(0));
        if growth > count / 20 {
            println!("# {growth} more objects in {name}");
        }
        // One object kept of each VM would be twice that.
        if growth > count / 2 {
            grown.push(name);
        }
    }
    Ok(grown)
}

/// Has processes make VMs, at most `count` each, at the same time; returns how many they made.
fn batch(count: u32) -> Result<u64> {
    let start = || {
        Command::new(std::env::current_exe()?)
            .args(["vms", &count.to_string(), &SECONDS.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
    };
    let processes = (0..PROCESSES).map(|_| start()).collect::<Vec<_>>();
    // All have ended before any of them is judged.
    let ended = processes.into_iter().map(|process| process?.wait_with_output());
    let mut made = 0;
    for output in ended.collect::<Vec<_>>() {
        let output = output?;
        check!(output.status.success(), "a process that makes VMs ended with {}", output.status);
        made += String::from_utf8(output.stdout)?.trim().parse::<u64>()?;
    }
    Ok(made)
}

/// How often KVM's modules and ours are used.
fn uses() -> Result<Vec<(String, String)>> {
    let mut uses = Vec::new();
    for module in ["kvm", "kvm_amd", "kvm_intel", "kvm_dlh", "ksm_bridge"] {
        if let Ok(count) = fs::read_to_string(format!("/sys/module/{module}/refcnt")) {
            uses.push((module.to_owned(), count));
        }
    }
    check!(uses.iter().any(|(name, _)| name == "kvm_dlh"), "kvm_dlh is not there: {uses:?}");
    Ok(uses)
}

/// Checks that the modules have forgotten all VMs, and that nothing holds on to the modules.
fn check_nothing_left(before: &Vec<(String, String)>) -> Result<()> {
    for module in ["kvm_dlh", "ksm_bridge"] {
        wait_until(PATIENCE, &format!("{module} has forgotten all VMs"), || {
            stats::vms(module).is_ok_and(|count| count == 0)
        })?;
    }
    wait_until(PATIENCE, "the modules are used as often as before", || {
        uses().is_ok_and(|uses| uses == *before)
    })
}

/// Objects in each of the kernel's caches, and its mappings; without what is kept for speed only.
fn objects() -> Result<BTreeMap<String, u64>> {
    // What is freed after an RCU grace period is freed by then.
    std::thread::sleep(Duration::from_millis(500));
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    std::thread::sleep(Duration::from_millis(500));
    let mut objects = BTreeMap::new();
    for line in fs::read_to_string("/proc/slabinfo")?.lines().skip(2) {
        let mut words = line.split_whitespace();
        match (words.next(), words.next().map(str::parse)) {
            // Those of mappings that have gone stay for long; the mappings themselves are counted below.
            (Some("vmap_area"), _) => None,
            (Some(name), Some(Ok(count))) => objects.insert(name.to_owned(), count),
            _ => return failed(format!("/proc/slabinfo has the line {line:?}")),
        };
    }
    let mappings = fs::read_to_string("/proc/vmallocinfo")?;
    let live = mappings.lines().filter(|line| !line.contains("unpurged")).count();
    objects.insert("/proc/vmallocinfo".to_owned(), live as u64);
    Ok(objects)
}
