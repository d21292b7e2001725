// SPDX-License-Identifier: GPL-2.0

//! FREE_PAGES for every kind of memory that a VMM may give to a VM: released, or left alone and counted.

use std::fs;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dlh_abi::Error;

use super::reporting::{
    check_fell, check_postponed, check_refused, check_skipped, pattern, rss_anon, with_bridge,
    Entry, Setup, MIB, PAGE_BYTES, PLACE,
};
use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, FILE_WORD, HUGE_PAGE, PAGE};
use crate::thread::{wait_until, PATIENCE};
use crate::vm::{Vm, VmConfig};

/// log2 of the sizes of huge pages.
const TWO_MIB: u32 = 21;
const ONE_GIB: u32 = 30;

pub(super) fn cases() -> Vec<Case> {
    const CASES: &[Entry] = &[
        ("a shared memfd gets holes", shared_memfd),
        ("a sealed memfd is left alone", sealed_memfd),
        ("private pages over an empty memfd are given back", private_memfd),
        ("private pages over a file's are left alone", private_over_file),
        ("a page with a memory error below private ones is not looked at", poisoned_file),
        ("shared huge pages of 2 MiB are given back whole", || huge(TWO_MIB, true)),
        ("private huge pages of 2 MiB are given back whole", || huge(TWO_MIB, false)),
        ("a huge page of 1 GiB is given back whole", || huge(ONE_GIB, true)),
        ("pages that KSM has merged are given back", ksm),
        ("pages in swap are given back without being read", swapped),
        ("locked memory is left alone", locked),
        ("a memfd that is locked elsewhere is left alone", locked_elsewhere),
        ("memory armed with userfaultfd is left alone", userfaultfd),
        ("a memfd armed with userfaultfd is left alone", userfaultfd_memfd),
        ("memory pinned for input and output is left alone", pinned),
        ("single pages that are pinned are left alone, and no others", pinned_pages),
        ("a memfd pinned elsewhere is left alone", pinned_elsewhere),
        ("huge pages that are pinned are left alone", pinned_huge),
        ("a device's memory is left alone", device_memory),
        ("a read-only memslot is left alone", readonly),
        ("a VM with assigned devices is refused as a whole", assigned),
        ("the free-page map says what is free, and what came back", map),
        ("the free-page map forgets memslots that go", map_forgets),
    ];
    with_bridge(CASES)
}

/// Reports all but `edge` bytes at both ends; what was reported must be zeroes then, and the rest as it was.
fn check_released(setup: &mut Setup, edge: usize) -> Result<()> {
    let before = setup.vm.bridge_stats()?;
    let len = setup.memory.len() - 2 * edge;
    let status = setup.report(PLACE + edge as u64, len as u64)?;
    check_eq!(status, 0, "status");
    let after = setup.vm.bridge_stats()?;
    let pages = (len / PAGE) as u64;
    check_eq!(after.since(&before, "merged_pages")?, pages, "merged_pages");
    check_eq!(setup.memory.first_difference(edge, len, |_| 0), None, "what is not zero");
    setup.check_kept(0, edge)?;
    setup.check_kept(edge + len, edge)?;
    // It is memory like any other again.
    setup.vm.vcpus[0].store(PLACE + edge as u64 + 8, 0x5a5a)?;
    let seen = setup.memory.word32(edge + 8).load(Ordering::SeqCst);
    check_eq!(seen, 0x5a5a, "what the VMM reads where the guest wrote");
    Ok(())
}

fn shared_memfd() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::SharedMemfd, 10 * MIB)?)?;
    let other = setup.memory.again()?;
    let before = setup.memory.file_bytes()?;
    check_released(&mut setup, MIB)?;
    // Before the check has read there, which makes pages of zeroes in the file.
    println!("# the file took {before} bytes, and now {}", setup.memory.file_bytes()?);
    check_eq!(setup.report(PLACE + MIB as u64, 8 * MIB as u64)?, 0, "status");
    let fell = before - setup.memory.file_bytes()?;
    check!(fell >= 8 * MIB as u64, "the file has lost {fell} bytes of {} MiB", 8);
    check_eq!(other.first_difference(MIB, 8 * MIB, |_| 0), None, "what others see");
    check_eq!(other.first_difference(0, MIB, pattern), None, "what others have lost");
    setup.finish()
}

fn sealed_memfd() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::SealedMemfd, 2 * MIB)?)?;
    check_skipped(&mut setup, "skipped_kind")?;
    setup.finish()
}

fn private_memfd() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::EmptyPrivateMemfd, 10 * MIB)?)?;
    let (rss, in_file) = (rss_anon()?, setup.memory.file_bytes()?);
    check_eq!(setup.report(PLACE + MIB as u64, 8 * MIB as u64)?, 0, "status");
    check_fell(rss, 8 * MIB)?;
    // A private copy is made of a page of the file, which others may have, too.
    check_eq!(setup.memory.file_bytes()?, in_file, "bytes in the file");
    check_released(&mut setup, MIB)?;
    setup.finish()
}

fn private_over_file() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::PrivateMemfd, 2 * HUGE_PAGE)?)?;
    check_skipped(&mut setup, "skipped_file")?;
    setup.finish()?;
    // What was not written yet reads as the file.
    let mut setup = Setup::unfilled(Mapping::new(Backing::PrivateMemfd, MIB)?)?;
    setup.report(PLACE, MIB as u64)?;
    let changed = setup.memory.first_difference(0, MIB, |_| FILE_WORD);
    check_eq!(changed, None, "offset of what changed in a file's mapping");
    setup.finish()
}

fn poisoned_file() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::EmptyPrivateMemfd, 2 * MIB)?)?;
    let page = MIB;
    setup.memory.again()?.poison(page)?;
    let before = setup.vm.bridge_stats()?;
    check_eq!(setup.report(PLACE, setup.memory.len() as u64)?, 0, "status");
    let after = setup.vm.bridge_stats()?;
    check_eq!(after.since(&before, "skipped_file")?, 1, "skipped_file");
    check_eq!(after.since(&before, "merged_pages")?, (2 * MIB / PAGE - 1) as u64, "merged_pages");
    setup.check_kept(page, PAGE)?;
    setup.finish()
}

/// Huge pages that are not in use.
fn free_huge_pages(shift: u32) -> Result<u64> {
    let pool = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/free_hugepages", 1 << (shift - 10));
    Ok(fs::read_to_string(pool)?.trim().parse()?)
}

fn huge(shift: u32, shared: bool) -> CaseResult {
    let size = 1 << shift;
    let pages = if shift == TWO_MIB { 4 } else { 1 };
    let mapping = Mapping::new(Backing::Hugetlb { shift, shared }, pages * size)?;
    mapping.fill(0, MIB, pattern);
    mapping.fill(pages * size - MIB, MIB, pattern);
    let mut setup = Setup::unfilled(mapping)?;
    let free = free_huge_pages(shift)?;
    let before = setup.vm.bridge_stats()?;
    // All but its first page: of the first huge page nothing can be given back.
    let partial = setup.report(PLACE + PAGE_BYTES, (size - PAGE) as u64)?;
    check_eq!(partial, 0, "status of a part of a huge page");
    let after = setup.vm.bridge_stats()?;
    let kept = (size / PAGE) as u64 - 1;
    check_eq!(after.since(&before, "skipped_partial")?, kept, "skipped_partial");
    check_eq!(after.since(&before, "merged_pages")?, 0, "merged_pages");
    check_eq!(free_huge_pages(shift)?, free, "free huge pages after a part");
    setup.check_kept(0, MIB)?;
    setup.check_kept(pages * size - MIB, MIB)?;
    if pages > 1 {
        // From the middle of the first to the middle of the last.
        let (begin, end) = (size / 2, pages * size - size / 2);
        check_eq!(setup.report(PLACE + begin as u64, (end - begin) as u64)?, 0, "status");
        let last = setup.vm.bridge_stats()?;
        let whole = ((pages - 2) * size / PAGE) as u64;
        check_eq!(last.since(&after, "merged_pages")?, whole, "merged_pages");
        check_eq!(last.since(&after, "skipped_partial")?, (size / PAGE) as u64, "skipped_partial");
        setup.check_kept(0, MIB)?;
        setup.check_kept(pages * size - MIB, MIB)?;
    }
    // Page by page, all in one go: neighbours are joined first. Of 1 GiB that is more than may wait.
    let free = free_huge_pages(shift)?;
    check_eq!(setup.report(PLACE, size as u64)?, 0, "status of a whole page");
    check_eq!(free_huge_pages(shift)?, free + 1, "free huge pages");
    check_eq!(setup.memory.first_difference(0, MIB, |_| 0), None, "what is not zero");
    if pages > 1 {
        setup.check_kept(pages * size - MIB, MIB)?;
    }
    setup.finish()
}

fn ksm() -> CaseResult {
    const KSM: &str = "/sys/kernel/mm/ksm";
    let shared = || -> Result<u64> {
        Ok(fs::read_to_string(format!("{KSM}/pages_sharing"))?.trim().parse()?)
    };
    let pages = 1024;
    let mapping = Mapping::new(Backing::Anonymous, pages * PAGE)?;
    // All pages alike, and not zero.
    mapping.fill(0, mapping.len(), |at| pattern(at % PAGE));
    mapping.mergeable()?;
    fs::write(format!("{KSM}/sleep_millisecs"), "10")?;
    fs::write(format!("{KSM}/pages_to_scan"), "2000")?;
    fs::write(format!("{KSM}/run"), "1")?;
    let mut setup = Setup::unfilled(mapping)?;
    wait_until(PATIENCE, "KSM has merged the pages", || {
        shared().is_ok_and(|sharing| sharing >= pages as u64 - 300)
    })?;
    let half = pages / 2 * PAGE;
    check_eq!(setup.report(PLACE, half as u64)?, 0, "status");
    check_eq!(setup.memory.first_difference(0, half, |_| 0), None, "what is not zero");
    let changed = setup.memory.first_difference(half, half, |at| pattern(at % PAGE));
    check_eq!(changed, None, "offset of lost data");
    // KSM goes on: it merges them once more when they are alike again.
    setup.memory.fill(0, half, |at| pattern(at % PAGE));
    wait_until(PATIENCE, "KSM has merged the pages again", || {
        shared().is_ok_and(|sharing| sharing >= pages as u64 - 300)
    })?;
    let changed = setup.memory.first_difference(0, 2 * half, |at| pattern(at % PAGE));
    check_eq!(changed, None, "offset of lost data");
    fs::write(format!("{KSM}/run"), "2")?;
    setup.finish()
}

/// A line of `/proc/self/status`, in KiB.
fn status_kib(name: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("");
    let words = line.trim_start_matches(':').split_whitespace().next();
    Ok(words.ok_or_else(|| format!("no {name} in /proc/self/status"))?.parse()?)
}

/// Pages read from swap since the host has booted.
fn swapped_in() -> Result<u64> {
    let counters = fs::read_to_string("/proc/vmstat")?;
    let value = counters.lines().find_map(|line| line.strip_prefix("pswpin "));
    Ok(value.ok_or("no pswpin in /proc/vmstat")?.parse()?)
}

fn swapped() -> CaseResult {
    let mut setup = Setup::anonymous(18 * MIB)?;
    setup.memory.page_out()?;
    let swap = status_kib("VmSwap")?;
    check!(swap > 15 << 10, "only {swap} KiB are in swap");
    let read = swapped_in()?;
    check_eq!(setup.report(PLACE + MIB as u64, 16 * MIB as u64)?, 0, "status");
    let left = status_kib("VmSwap")?;
    check!(left + (14 << 10) < swap, "{left} KiB of {swap} are in swap still");
    let read = swapped_in()? - read;
    // What the VM itself needs meanwhile may be read.
    check!(read < 200, "{read} pages were read from swap");
    check_eq!(setup.memory.first_difference(MIB, 16 * MIB, |_| 0), None, "what is not zero");
    setup.check_kept(0, MIB)?;
    setup.check_kept(17 * MIB, MIB)?;
    setup.finish()
}

fn locked() -> CaseResult {
    let mapping = Mapping::new(Backing::Anonymous, MIB)?;
    mapping.lock(0, MIB)?;
    let mut setup = Setup::new(mapping)?;
    check_skipped(&mut setup, "skipped_locked")?;
    setup.finish()?;

    // Only a part in the middle.
    let mut setup = Setup::anonymous(3 * MIB)?;
    setup.memory.lock(MIB, MIB)?;
    let before = setup.vm.bridge_stats()?;
    setup.report(PLACE, 3 * MIB as u64)?;
    setup.check_kept(MIB, MIB)?;
    setup.check_reported(0, MIB)?;
    setup.check_reported(2 * MIB, MIB)?;
    let after = setup.vm.bridge_stats()?;
    check_eq!(after.since(&before, "skipped_locked")?, 256, "skipped_locked");
    setup.finish()
}

fn locked_elsewhere() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::SharedMemfd, MIB)?)?;
    let other = setup.memory.again()?;
    other.lock(0, MIB)?;
    check_skipped(&mut setup, "skipped_locked")?;
    drop(other);
    setup.finish()
}

fn readonly() -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mapping = Mapping::new(Backing::Anonymous, MIB)?;
    mapping.fill(0, MIB, pattern);
    let slot = vm.add_readonly_memory(PLACE, mapping)?;
    let memory = vm.region(slot).mapping.clone();
    let mut setup = Setup::with_slot(vm, memory, slot)?;
    check_skipped(&mut setup, "skipped_readonly")?;
    // However long the range is that begins there: it costs the host nothing.
    let ranges = [(PLACE, 2 * MIB as u64), (PLACE, 1 << 45), (PLACE, (1 << 52) - PLACE)];
    check_refused(&mut setup, Error::Memory, &ranges)?;
    setup.finish()
}

fn userfaultfd() -> CaseResult {
    let setup = Setup::anonymous(MIB)?;
    let armed = match setup.memory.arm_userfaultfd() {
        Ok(armed) => armed,
        Err(error) => return Ok(Verdict::Skip(format!("no userfaultfd here: {error}"))),
    };
    let mut setup = setup;
    check_postponed(&mut setup, "skipped_uffd")?;
    drop(armed);
    // Nobody watches the memory any more.
    check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status");
    check_eq!(setup.check_reported(0, MIB)?, 256, "pages of zeroes");
    setup.finish()
}

fn userfaultfd_memfd() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::SharedMemfd, MIB)?)?;
    let armed = setup.memory.arm_userfaultfd()?;
    check_postponed(&mut setup, "skipped_uffd")?;
    drop(armed);
    check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status");
    check_eq!(setup.check_reported(0, MIB)?, 256, "pages of zeroes");
    setup.finish()
}

fn pinned() -> CaseResult {
    let mut setup = Setup::anonymous(MIB)?;
    let ring = match setup.memory.pin() {
        Ok(ring) => ring,
        Err(error) => return Ok(Verdict::Skip(format!("no io_uring here: {error}"))),
    };
    check_skipped(&mut setup, "skipped_pinned")?;
    // Where it may not be read, nobody can see that it is pinned.
    setup.memory.hide(true)?;
    let before = setup.vm.bridge_stats()?;
    check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status of memory that is hidden");
    setup.memory.hide(false)?;
    check_eq!(setup.vm.bridge_stats()?.since(&before, "skipped_kind")?, 256, "skipped_kind");
    setup.check_kept(0, MIB)?;
    drop(ring);
    setup.finish()
}

/// Pins `kept` of a mapping, reports all of it, and looks that just that is kept.
fn check_pinned(mapping: Mapping, pin: Range<usize>, kept: Range<usize>) -> CaseResult {
    let mut setup = Setup::unfilled(mapping)?;
    let len = setup.memory.len();
    setup.memory.fill(kept.start, kept.len(), pattern);
    let ring = setup.memory.pin_part(pin.start, pin.len())?;
    let before = setup.vm.bridge_stats()?;
    check_eq!(setup.report(PLACE, len as u64)?, 0, "status");
    let after = setup.vm.bridge_stats()?;
    let pages = (kept.len() / PAGE) as u64;
    check_eq!(after.since(&before, "skipped_pinned")?, pages, "skipped_pinned");
    check_eq!(after.since(&before, "merged_pages")?, (len / PAGE) as u64 - pages, "merged_pages");
    setup.check_kept(kept.start, kept.len())?;
    for (at, end) in [(0, kept.start), (kept.end, len)] {
        check_eq!(setup.memory.first_difference(at, end - at, |_| 0), None, "what is not zero");
    }
    drop(ring);
    setup.finish()
}

fn pinned_pages() -> CaseResult {
    // The host looks at 64 pages at a time.
    for page in [0, 1, 63, 64, 65, 128, 255] {
        let here = page * PAGE..(page + 1) * PAGE;
        let mapping = Mapping::new(Backing::Anonymous, MIB)?;
        mapping.fill(0, MIB, pattern);
        check_pinned(mapping, here.clone(), here.clone())?;
        // All around it nothing is there.
        check_pinned(Mapping::new(Backing::Anonymous, MIB)?, here.clone(), here)?;
    }
    // A page of a huge page keeps all of that.
    let mapping = Mapping::new(Backing::TransparentHuge, 3 * HUGE_PAGE)?;
    mapping.fill(0, 3 * HUGE_PAGE, pattern);
    let pinned = HUGE_PAGE + 70 * PAGE;
    check_pinned(mapping, pinned..pinned + PAGE, HUGE_PAGE..2 * HUGE_PAGE)
}

fn pinned_elsewhere() -> CaseResult {
    let mut setup = Setup::new(Mapping::new(Backing::SharedMemfd, MIB)?)?;
    let other = setup.memory.again()?;
    let ring = other.pin()?;
    check_skipped(&mut setup, "skipped_pinned")?;
    drop(ring);
    setup.finish()
}

fn pinned_huge() -> CaseResult {
    for shared in [true, false] {
        let mapping = Mapping::new(Backing::Hugetlb { shift: TWO_MIB, shared }, HUGE_PAGE)?;
        let mut setup = Setup::new(mapping)?;
        let ring = setup.memory.pin()?;
        check_skipped(&mut setup, "skipped_pinned")?;
        drop(ring);
        setup.finish()?;
    }
    Ok(Verdict::Pass)
}

/// The registers of some PCI device, as a file of at least a page.
fn device_file() -> Result<std::os::fd::OwnedFd> {
    for device in fs::read_dir("/sys/bus/pci/devices")? {
        for index in 0..6 {
            let path = device.as_ref().map_err(|e| e.to_string())?.path();
            let path = path.join(format!("resource{index}"));
            let Ok(file) = fs::File::options().read(true).write(true).open(&path) else { continue };
            if file.metadata()?.len() >= PAGE_BYTES
                && Mapping::of_file(file.try_clone()?.into(), PAGE).is_ok()
            {
                println!("# {}", path.display());
                return Ok(file.into());
            }
        }
    }
    failed("no PCI device has memory to map")
}

fn device_memory() -> CaseResult {
    let mut setup = Setup::unfilled(Mapping::of_file(device_file()?, PAGE)?)?;
    let before = setup.vm.bridge_stats()?;
    setup.report(PLACE, PAGE_BYTES)?;
    let after = setup.vm.bridge_stats()?;
    check_eq!(after.since(&before, "skipped_pfnmap")?, 1, "skipped_pfnmap");
    check_eq!(after.since(&before, "merged_pages")?, 0, "merged_pages");
    setup.finish()
}

fn assigned() -> CaseResult {
    let mut setup = Setup::anonymous(MIB)?;
    let device = setup.vm.assign_devices()?;
    check_refused(&mut setup, Error::Refused, &[(PLACE, MIB as u64), (PLACE, PAGE_BYTES)])?;
    let refused = setup.vm.bridge_stats()?.get("refused_assigned_devices")?;
    check_eq!(refused, 2, "refused_assigned_devices");
    // The VMM takes its device for that away.
    drop(device);
    check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status");
    check_eq!(setup.check_reported(0, MIB)?, 256, "pages of zeroes");
    setup.finish()
}

/// State of the page at `gpa` in the map, if that has one.
fn state_of(map: &[u64], gpa: u64) -> Option<u64> {
    let gfn = gpa / PAGE_BYTES;
    let count = map[2] as usize;
    let mut states = &map[4 + 3 * count..];
    for memslot in map[4..][..3 * count].chunks(3) {
        let (here, rest) = states.split_at(memslot[2] as usize);
        if (memslot[0]..memslot[0] + memslot[1]).contains(&gfn) {
            let page = gfn - memslot[0];
            return Some((here[page as usize / 32] >> (2 * (page % 32))) & 3);
        }
        states = rest;
    }
    None
}

/// Whether what began so long ago must have been counted as having come back in a span of so many seconds, if any. A
/// machine may be too slow for that.
fn in_time(took: Duration, seconds: Option<u64>) -> bool {
    seconds.is_none_or(|seconds| took < Duration::from_secs(seconds))
}

fn map() -> CaseResult {
    const UNKNOWN: u64 = 0;
    const MERGED: u64 = 2;
    const CAME_BACK: u64 = 3;
    let pages = 3 * 512 + 40;
    let mut setup = Setup::anonymous(pages * PAGE)?;
    let place = |page: usize| PLACE + (page * PAGE) as u64;
    // The guest has all of it, so that it faults only where it has lost a page.
    for page in 0..pages {
        setup.vm.vcpus[0].store(place(page), page as u32)?;
    }
    let before = setup.vm.bridge_stats()?;
    let began = Instant::now();
    check_eq!(setup.report(place(7), 1200 * PAGE_BYTES)?, 0, "status");
    let map = setup.vm.free_page_map()?;
    check_eq!(map[0], u64::from_le_bytes(*b"DLHMAP\0\x01"), "the first word of the map");
    for page in 0..pages {
        let expected = if (7..1207).contains(&page) { MERGED } else { UNKNOWN };
        check_eq!(state_of(&map, place(page)), Some(expected), "state of page {page}");
    }
    check_eq!(state_of(&map, 0x7000_0000), None, "state of what is not there");
    let stats = setup.vm.bridge_stats()?;
    check_eq!(stats.since(&before, "map_merged")?, 1200, "map_merged");
    let limit = (pages / 16384 + 1) * 4096 + (1 << 14) + 4096;
    check!(
        stats.get("map_bytes")? < limit as u64,
        "the map takes {} bytes",
        stats.get("map_bytes")?
    );

    // Reading makes no page; writing does.
    for page in (7..1207).step_by(3) {
        check_eq!(setup.vm.vcpus[0].load(place(page))?, 0, "what the guest reads");
    }
    let read = setup.vm.bridge_stats()?;
    check_eq!(read.since(&stats, "came_back_pages")?, 0, "came_back_pages after reading");
    for page in (0..1300).step_by(2) {
        setup.vm.vcpus[0].store(place(page), 1)?;
    }
    let map = setup.vm.free_page_map()?;
    for page in 0..pages {
        let expected = match page {
            7..1207 if page % 2 == 0 => CAME_BACK,
            7..1207 => MERGED,
            _ => UNKNOWN,
        };
        check_eq!(state_of(&map, place(page)), Some(expected), "state of page {page}");
    }
    let after = setup.vm.bridge_stats()?;
    check_eq!(after.since(&before, "map_came_back")?, 600, "map_came_back");
    let took = began.elapsed();
    for (name, seconds) in
        [("came_back_pages", None), ("came_back_10s", Some(10)), ("came_back_100s", Some(100))]
    {
        let (count, least) =
            (after.since(&before, name)?, if in_time(took, seconds) { 600 } else { 0 });
        check!((least..=600).contains(&count), "{name} is {count} after {took:?}");
    }
    // Those that take their time are in the longer spans only.
    std::thread::sleep(Duration::from_millis(1200));
    for page in (9..1207).step_by(200) {
        setup.vm.vcpus[0].store(place(page), 1)?;
    }
    let late = setup.vm.bridge_stats()?;
    check_eq!(late.since(&after, "came_back_1s")?, 0, "came_back_1s");
    if in_time(began.elapsed(), Some(10)) {
        check_eq!(late.since(&after, "came_back_10s")?, 6, "came_back_10s");
    }
    check_eq!(late.since(&after, "came_back_pages")?, 6, "came_back_pages");
    // Reported once more, they are merged again.
    check_eq!(setup.report(place(8), 4 * PAGE_BYTES)?, 0, "status");
    let map = setup.vm.free_page_map()?;
    check_eq!(state_of(&map, place(8)), Some(MERGED), "state of a page reported again");
    check_eq!(state_of(&map, place(12)), Some(CAME_BACK), "state of its neighbour");
    setup.finish()
}

fn map_forgets() -> CaseResult {
    let mut setup = Setup::anonymous(4 * MIB)?;
    let other = PLACE + (64 * MIB) as u64;
    let slot = setup.vm.add_memory(other, Mapping::new(Backing::Anonymous, 2 * MIB)?)?;
    check_eq!(setup.report(PLACE, MIB as u64)?, 0, "status");
    check_eq!(setup.report(other, MIB as u64)?, 0, "status");
    let both = setup.vm.bridge_stats()?;
    check_eq!(state_of(&setup.vm.free_page_map()?, other), Some(2), "state in the second memslot");
    setup.vm.remove_memory(slot)?;
    // It looks at the memslots when it next has something to do.
    check_eq!(setup.report(PLACE + MIB as u64, PAGE_BYTES)?, 0, "status");
    let one = setup.vm.bridge_stats()?;
    check_eq!(both.since(&one, "map_memslots")?, 1, "memslots forgotten");
    check_eq!(both.since(&one, "map_merged")?, 255, "merged pages forgotten");
    check_eq!(
        state_of(&setup.vm.free_page_map()?, other),
        None,
        "state in a memslot that has gone"
    );
    // Moved: what is at the old place and at the new is unknown.
    let moved = PLACE + (128 * MIB) as u64;
    setup.vm.move_memory(setup.slot, moved)?;
    check_eq!(setup.report(moved, PAGE_BYTES)?, 0, "status");
    let map = setup.vm.free_page_map()?;
    check_eq!(state_of(&map, PLACE), None, "state where the memslot was");
    check_eq!(state_of(&map, moved), Some(2), "state of what was just reported");
    check_eq!(state_of(&map, moved + PAGE_BYTES), Some(0), "state of its neighbour");
    setup.finish()
}
