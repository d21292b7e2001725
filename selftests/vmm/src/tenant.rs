// SPDX-License-Identifier: GPL-2.0

//! A VM whose guest reports all of its memory whenever it is told to, for tests of who may. It looks at its memory
//! only, so it needs neither root nor debugfs.

use std::sync::Arc;

use clap::ValueEnum;
use dlh_abi::{has_passed, Call, Function, Operation};

use crate::ktap::{check, Result};
use crate::memory::{Backing, Mapping, HUGE_PAGE, PAGE};
use crate::ring::Ring;
use crate::thread::{wait_until, PATIENCE};
use crate::vcpu::Exit;
use crate::vm::{Vm, VmConfig, BASE};

/// Where the memory is, and how far apart two kinds of it are.
const PLACE: u64 = 0x4000_0000;
const APART: u64 = 0x4000_0000;

/// A kind of memory.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Kind {
    Anonymous,
    Memfd,
    /// Shared huge pages of 2 MiB.
    Hugetlb,
    /// Private ones.
    PrivateHugetlb,
}

impl Kind {
    fn backing(self) -> Backing {
        const SHIFT: u32 = HUGE_PAGE.trailing_zeros();
        match self {
            Self::Anonymous => Backing::Anonymous,
            Self::Memfd => Backing::SharedMemfd,
            Self::Hugetlb => Backing::Hugetlb { shift: SHIFT, shared: true },
            Self::PrivateHugetlb => Backing::Hugetlb { shift: SHIFT, shared: false },
        }
    }
}

/// Words that are never 0.
fn pattern(at: usize) -> u64 {
    at as u64 | (1 << 63)
}

/// Says `ready`; then, at each line of the input, fills `mib` MiB of each kind, has the guest report them all at
/// once, and says for each the status and how many of its pages are zeroes: `0 256 -1109 0`. It says `absent` where
/// the host knows no rings. Pages that hold anything else end it.
pub(crate) fn tenant(kinds: &[Kind], mib: usize) -> Result<()> {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut memory: Vec<(u64, Arc<Mapping>)> = Vec::new();
    for (gpa, kind) in (PLACE..).step_by(APART as usize).zip(kinds) {
        let slot = vm.add_memory(gpa, Mapping::new(kind.backing(), mib << 20)?)?;
        memory.push((gpa, vm.region(slot).mapping.clone()));
    }
    println!("ready");
    for line in std::io::stdin().lines() {
        line?;
        println!("{}", report(&mut vm, &memory)?);
    }
    Ok(())
}

/// Says `ready`; then, at each line of the input, goes through `mib` MiB: fills `step` MiB, has the guest report them,
/// goes on with the next, and says `swept`. All must be given up.
pub(crate) fn sweep(kind: Kind, mib: usize, step: usize) -> Result<()> {
    let mut vm = Vm::new(VmConfig::default())?;
    let slot = vm.add_memory(PLACE, Mapping::new(kind.backing(), mib << 20)?)?;
    let memory = vm.region(slot).mapping.clone();
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    // What is made at the first report is there from now on.
    let len = step << 20;
    sweep_step(&mut vm, &mut ring, &memory, 0, len)?;
    println!("ready");
    for line in std::io::stdin().lines() {
        line?;
        for offset in (0..memory.len()).step_by(len) {
            sweep_step(&mut vm, &mut ring, &memory, offset, len)?;
        }
        println!("swept");
    }
    Ok(())
}

fn sweep_step(
    vm: &mut Vm,
    ring: &mut Ring,
    memory: &Mapping,
    offset: usize,
    len: usize,
) -> Result<()> {
    memory.fill(offset, len, pattern);
    let call = Call { op: Operation::FREE_PAGES, arg: [PLACE + offset as u64, len as u64] };
    let position = ring.place(&call)?;
    ring.publish();
    vm.vcpus[0].exit(Exit::Pio)?;
    wait_until(PATIENCE, "done has passed the report", || has_passed(ring.done(), position))?;
    let (status, left) = (ring.status(position), memory.resident(offset, len)?);
    check!(status == 0 && left == 0, "status {status}, {left} pages of {len} bytes are left");
    Ok(())
}

fn report(vm: &mut Vm, memory: &[(u64, Arc<Mapping>)]) -> Result<String> {
    if vm.hypercall(0, Function::Features as u64, 0, 0, 0)? < 0 {
        return Ok("absent".into());
    }
    let mut ring = Ring::set_up(vm, 0, BASE, 64, 0)?;
    let mut positions = Vec::new();
    for (gpa, mapping) in memory {
        mapping.fill(0, mapping.len(), pattern);
        let call = Call { op: Operation::FREE_PAGES, arg: [*gpa, mapping.len() as u64] };
        positions.push(ring.place(&call)?);
    }
    ring.publish();
    vm.vcpus[0].exit(Exit::Pio)?;
    let last = ring.tail().wrapping_sub(1);
    wait_until(PATIENCE, "done has passed all", || has_passed(ring.done(), last))?;
    let mut said = Vec::new();
    for ((_, mapping), position) in memory.iter().zip(positions) {
        said.push(format!("{} {}", ring.status(position), zeroes(mapping)?));
    }
    // It is gone by itself where the modules went meanwhile.
    let _ = vm.hypercall(0, Function::RingTeardown as u64, ring.id(), 0, 0)?;
    Ok(said.join(" "))
}

/// How many pages are zeroes; all others must be as they were.
fn zeroes(mapping: &Mapping) -> Result<usize> {
    let mut zeroes = 0;
    for page in (0..mapping.len()).step_by(PAGE) {
        if mapping.first_difference(page, PAGE, |_| 0).is_none() {
            zeroes += 1;
        } else if let Some(at) = mapping.first_difference(page, PAGE, pattern) {
            return crate::ktap::failed(format!("lost what was at {at:#x}"));
        }
    }
    Ok(zeroes)
}
