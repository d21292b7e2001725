// SPDX-License-Identifier: GPL-2.0

//! What the host pays to take back memory of a VM, in ticks of the time-stamp counter: by reports through a
//! ring, and by the VMM's own madvise. Where instructions are counted a tick is an instruction.

use std::arch::x86_64::_rdtsc;
use std::sync::Arc;

use dlh_abi::{Call, Function, Operation};

use crate::{
    ktap::{check_eq, Result},
    memory::{Backing, Mapping, HUGE_PAGE, PAGE},
    ring::Ring,
    vm::{Vm, VmConfig, BASE},
};

const PLACE: u64 = 0x4000_0000;
/// Ranges that are reported together, as many as a Linux guest reports at a time.
const TOGETHER: usize = 32;
const KICK: u64 = Function::Kick as u64;

/// What is taken back, and in which pieces.
struct Shape {
    name: &'static str,
    backing: Backing,
    bytes: usize,
    /// Bytes of a range that is reported.
    range: usize,
    /// Neighbouring bytes that are free; between two of them as much is in use.
    run: usize,
}

const SHAPES: [Shape; 5] = [
    Shape {
        name: "2m_huge",
        backing: Backing::TransparentHuge,
        bytes: 512 << 20,
        range: HUGE_PAGE,
        run: HUGE_PAGE,
    },
    Shape {
        name: "2m_small",
        backing: Backing::Anonymous,
        bytes: 128 << 20,
        range: HUGE_PAGE,
        run: HUGE_PAGE,
    },
    Shape {
        name: "64k",
        backing: Backing::Anonymous,
        bytes: 64 << 20,
        range: 16 * PAGE,
        run: 16 * PAGE,
    },
    Shape { name: "4k", backing: Backing::Anonymous, bytes: 32 << 20, range: PAGE, run: PAGE },
    Shape {
        name: "4k_runs16",
        backing: Backing::Anonymous,
        bytes: 64 << 20,
        range: PAGE,
        run: 16 * PAGE,
    },
];

/// Ticks that `work` takes.
fn ticks(work: impl FnOnce() -> Result<()>) -> Result<u64> {
    // SAFETY: Every x86-64 CPU has the instruction.
    let begin = unsafe { _rdtsc() };
    work()?;
    // SAFETY: As above.
    Ok(unsafe { _rdtsc() } - begin)
}

/// A VM whose guest has written to all of its memory.
fn filled(shape: &Shape) -> Result<(Vm, Arc<Mapping>)> {
    let mut vm = Vm::new(VmConfig::default())?;
    let slot = vm.add_memory(PLACE, Mapping::new(shape.backing, shape.bytes)?)?;
    let memory = vm.region(slot).mapping.clone();
    fill(&mut vm, shape, shape.bytes)?;
    Ok((vm, memory))
}

/// Has the guest write to the first `bytes` of its memory.
fn fill(vm: &mut Vm, shape: &Shape, bytes: usize) -> Result<()> {
    let step = if shape.backing == Backing::TransparentHuge { HUGE_PAGE } else { PAGE };
    for at in (0..bytes).step_by(step) {
        vm.vcpus[0].store(PLACE + at as u64, 1)?;
    }
    Ok(())
}

/// The offsets of the runs.
fn runs(shape: &Shape) -> impl Iterator<Item = usize> {
    // Whole blocks are all free; of small runs every other one is.
    let step = if shape.run < HUGE_PAGE { 2 * shape.run } else { shape.run };
    (0..shape.bytes).step_by(step)
}

fn by_madvise(shape: &Shape) -> Result<u64> {
    let (_vm, memory) = filled(shape)?;
    ticks(|| {
        for at in runs(shape) {
            memory.give_back(at, shape.run)?;
        }
        Ok(())
    })
}

fn by_reports(shape: &Shape) -> Result<u64> {
    let (mut vm, _memory) = filled(shape)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let report = |at: usize| Call {
        op: Operation::FREE_PAGES,
        arg: [PLACE + at as u64, shape.range as u64],
    };
    // The bridge gets to know the VM, and makes room in its map.
    ring.push(&report(0), 1)?;
    check_eq!(vm.hypercall(0, KICK, ring.id(), 0, 0)?, 0, "KICK");
    // All of it is to be there when it is measured.
    fill(&mut vm, shape, shape.range)?;
    let mut empty = u64::MAX;
    for _ in 0..20 {
        empty = empty.min(ticks(|| vm.hypercall(0, KICK, ring.id(), 0, 0).map(drop))?);
    }
    let pieces = (shape.run / shape.range).max(1);
    let ranges: Vec<_> =
        runs(shape).flat_map(|run| (0..pieces).map(move |i| run + i * shape.range)).collect();
    let mut sum = 0;
    for together in ranges.chunks(TOGETHER) {
        for at in together {
            ring.place(&report(*at))?;
        }
        ring.publish();
        let all = ticks(|| {
            check_eq!(vm.hypercall(0, KICK, ring.id(), 0, 0)?, 0, "KICK");
            Ok(())
        })?;
        sum += all.saturating_sub(empty);
        check_eq!(ring.done(), ring.tail(), "done after KICK");
    }
    check_eq!(ring.declined(), 0, "entries declined");
    let merged = vm.bridge_stats()?.get("merged_pages")?;
    let calls = vm.bridge_stats()?.get("runs")?;
    println!(
        "# {}: {} ranges became {calls} runs, an empty KICK takes {empty}",
        shape.name,
        ranges.len()
    );
    check_eq!(merged as usize, (ranges.len() * shape.range + shape.range) / PAGE, "merged_pages");
    Ok(sum)
}

/// Reports the same pages again and again.
pub(crate) fn repeat(laps: u64) -> Result<()> {
    let mut vm = Vm::new(VmConfig::default())?;
    vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, HUGE_PAGE)?)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    for _ in 0..laps {
        for page in 0..TOGETHER {
            let arg = [PLACE + (page * PAGE) as u64, PAGE as u64];
            ring.place(&Call { op: Operation::FREE_PAGES, arg })?;
        }
        ring.publish();
        check_eq!(vm.hypercall(0, KICK, ring.id(), 0, 0)?, 0, "KICK");
    }
    Ok(())
}

/// Prints `name ticks` lines, ticks for each GiB taken back.
pub(crate) fn reclaim() -> Result<()> {
    for shape in &SHAPES {
        let bytes = runs(shape).count() * shape.run;
        let a_gib = |ticks: u64| ticks as f64 * (1 << 30) as f64 / bytes as f64;
        let (madvise, reports) = (a_gib(by_madvise(shape)?), a_gib(by_reports(shape)?));
        println!("reclaim_{}_madvise {madvise:.0}", shape.name);
        println!("reclaim_{}_dlh {reports:.0}", shape.name);
        println!("reclaim_{}_ratio {:.4}", shape.name, reports / madvise);
    }
    Ok(())
}
