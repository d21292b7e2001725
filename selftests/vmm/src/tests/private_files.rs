// SPDX-License-Identifier: GPL-2.0

//! FREE_PAGES of private memory over files, as of a VMM that has restored a snapshot: released only where
//! the guest says that it relies on nothing, and then the file is what it finds.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use dlh_abi::{has_passed, Call, Contents, Error, FreePages, Gfn, GfnRange};

use super::reporting::{
    case_with_bridge, check_fell, check_skipped, pattern, report, rss_anon, Setup, MIB, PAGE_BYTES,
    PLACE,
};
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping, FILE_WORD, HUGE_PAGE, PAGE};
use crate::vcpu::Exit;

/// Where the file behind the memory is.
#[derive(Clone)]
enum Place {
    /// In no directory.
    Memfd,
    /// In this directory.
    Directory(PathBuf),
}

impl Place {
    /// Private memory over a file of [`FILE_WORD`]s.
    fn map(&self, len: usize) -> Result<Mapping> {
        let Self::Directory(path) = self else {
            return Ok(Mapping::new(Backing::PrivateMemfd, len)?);
        };
        let path = path.join("memory");
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
        // It goes with the mapping.
        fs::remove_file(path)?;
        Ok(Mapping::private_of_file(file, len)?)
    }

    /// The counter of what is kept of it without the flag.
    fn counter(&self) -> &'static str {
        match self {
            Self::Memfd => "skipped_file",
            Self::Directory(path) if is_tmpfs(path) => "skipped_file",
            Self::Directory(_) => "skipped_kind",
        }
    }
}

/// Whether a directory is in a file system of shmem.
fn is_tmpfs(path: &Path) -> bool {
    let path = path.to_string_lossy();
    fs::read_to_string("/proc/mounts").is_ok_and(|mounts| {
        mounts.lines().any(|line| {
            let mut words = line.split(' ').skip(1);
            words.next() == Some(&path) && words.next() == Some("tmpfs")
        })
    })
}

type Test = (&'static str, fn(&Place) -> CaseResult);

pub(super) fn cases(directories: &[PathBuf]) -> Vec<Case> {
    const TESTS: &[Test] = &[
        ("without the flag they are kept", without),
        ("with the flag the file shows, and nothing else is lost", with_flag),
        ("a report without the flag is kept beside one with it", mixed),
        ("what is locked, pinned, armed, hidden or read-only is kept with the flag, too", kept),
    ];
    let mut cases = Vec::new();
    for place in [Place::Memfd].into_iter().chain(directories.iter().cloned().map(Place::Directory))
    {
        let name = match &place {
            Place::Memfd => "memfd".into(),
            Place::Directory(path) => path.to_string_lossy().into_owned(),
        };
        for &(what, run) in TESTS {
            let place = place.clone();
            cases.push(case_with_bridge(format!("{name}: {what}"), move || run(&place)));
        }
    }
    cases.push(case_with_bridge("other kinds of memory: the flag changes nothing", others));
    cases
}

/// The call that names pages free whose contents nobody relies on.
fn any(gpa: u64, bytes: usize) -> Call {
    let frames = GfnRange::new(Gfn(gpa / PAGE_BYTES), (bytes / PAGE) as u64);
    FreePages::Pages(frames.expect("a range of a guest"), Contents::Any).call()
}

/// Makes one call through the ring, and waits until the host is done with it; returns the status.
fn make(setup: &mut Setup, call: &Call) -> Result<i32> {
    let position = setup.ring.place(call)?;
    setup.ring.publish();
    setup.vm.vcpus[0].exit(Exit::Pio)?;
    setup.wait(position)?;
    Ok(setup.ring.status(position))
}

fn without(place: &Place) -> CaseResult {
    let mut setup = Setup::new(place.map(2 * MIB)?)?;
    check_skipped(&mut setup, place.counter())?;
    setup.finish()
}

fn with_flag(place: &Place) -> CaseResult {
    let mut setup = Setup::new(place.map(10 * MIB)?)?;
    let (rss, in_file) = (rss_anon()?, setup.memory.file_bytes()?);
    let before = setup.vm.bridge_stats()?;
    check_eq!(make(&mut setup, &any(PLACE + MIB as u64, 8 * MIB))?, 0, "status");
    let after = setup.vm.bridge_stats()?;
    check_eq!(after.since(&before, "merged_pages")?, (8 * MIB / PAGE) as u64, "merged_pages");
    check_eq!(after.since(&before, place.counter())?, 0, "pages kept");
    check_fell(rss, 8 * MIB)?;
    setup.check_kept(0, MIB)?;
    setup.check_kept(9 * MIB, MIB)?;
    let changed = setup.memory.first_difference(MIB, 8 * MIB, |_| FILE_WORD);
    check_eq!(changed, None, "offset of what is not the file's");
    check_eq!(setup.memory.file_bytes()?, in_file, "bytes in the file");
    // It is memory like any other again, and what is written there is not seen in the file.
    let at = MIB + 8;
    check_eq!(setup.vm.vcpus[0].load(PLACE + at as u64)?, FILE_WORD as u32, "what the guest reads");
    setup.vm.vcpus[0].store(PLACE + at as u64, 0x5a5a)?;
    check_eq!(setup.memory.word32(at).load(Ordering::SeqCst), 0x5a5a, "a word");
    let file = setup.memory.again()?;
    check_eq!(file.first_difference(0, 10 * MIB, |_| FILE_WORD), None, "what changed in the file");
    setup.finish()
}

fn mixed(place: &Place) -> CaseResult {
    const PAIRS: usize = 64;
    let mut setup = Setup::new(place.map(2 * PAIRS * PAGE)?)?;
    let (mut last, mut with) = (0, 0);
    for pair in 0..PAIRS {
        let gpa = PLACE + (2 * pair * PAGE) as u64;
        // Neighbours, of which the second asks for its contents.
        setup.ring.place(&any(gpa, PAGE))?;
        last = setup.ring.place(&report(gpa + PAGE_BYTES, PAGE_BYTES))?;
    }
    setup.ring.publish();
    setup.vm.vcpus[0].exit(Exit::Pio)?;
    setup.wait(last)?;
    check!(has_passed(setup.ring.done(), last), "all of them have ended");
    for pair in 0..PAIRS {
        let at = 2 * pair * PAGE;
        setup.check_kept(at + PAGE, PAGE)?;
        if setup.memory.first_difference(at, PAGE, |_| FILE_WORD).is_none() {
            with += 1;
        } else {
            setup.check_kept(at, PAGE)?;
        }
    }
    println!("# of {PAIRS} pages with the flag {with} have gone");
    setup.finish()
}

/// Reports all of it with the flag: nothing may go, and it must be counted as such.
fn check_any_skipped(setup: &mut Setup, counter: &str) -> Result<()> {
    check_any_kept_as(setup, counter, 0)
}

/// The same, of memory that is better reported again.
fn check_any_postponed(setup: &mut Setup, counter: &str) -> Result<()> {
    check_any_kept_as(setup, counter, -(Error::Busy as i32))
}

fn check_any_kept_as(setup: &mut Setup, counter: &str, status: i32) -> Result<()> {
    let before = setup.vm.bridge_stats()?;
    let len = setup.memory.len();
    check_eq!(make(setup, &any(PLACE, len))?, status, "status of what is kept: {counter}");
    let after = setup.vm.bridge_stats()?;
    check_eq!(after.since(&before, counter)?, (len / PAGE) as u64, "{counter}");
    check_eq!(after.since(&before, "merged_pages")?, 0, "merged_pages");
    Ok(())
}

fn kept(place: &Place) -> CaseResult {
    let mapping = place.map(MIB)?;
    mapping.lock(0, MIB)?;
    let mut setup = Setup::new(mapping)?;
    check_any_skipped(&mut setup, "skipped_locked")?;
    setup.check_kept(0, MIB)?;
    setup.finish()?;

    let mut setup = Setup::new(place.map(MIB)?)?;
    let ring = setup.memory.pin()?;
    check_any_skipped(&mut setup, "skipped_pinned")?;
    setup.check_kept(0, MIB)?;
    drop(ring);
    setup.finish()?;

    // Only one page in the middle.
    let mut setup = Setup::new(place.map(MIB)?)?;
    let ring = setup.memory.pin_part(70 * PAGE, PAGE)?;
    check_eq!(make(&mut setup, &any(PLACE, MIB))?, 0, "status");
    setup.check_kept(70 * PAGE, PAGE)?;
    check_eq!(setup.memory.first_difference(0, 70 * PAGE, |_| FILE_WORD), None, "before the pin");
    let after = setup.memory.first_difference(71 * PAGE, MIB - 71 * PAGE, |_| FILE_WORD);
    check_eq!(after, None, "behind the pin");
    drop(ring);
    setup.finish()?;

    // Memory of a file on a disk cannot be armed for missing pages.
    if place.counter() == "skipped_file" {
        let mut setup = Setup::new(place.map(MIB)?)?;
        let armed = setup.memory.arm_userfaultfd()?;
        check_any_postponed(&mut setup, "skipped_uffd")?;
        setup.check_kept(0, MIB)?;
        drop(armed);
        setup.finish()?;
    }

    let mut setup = Setup::new(place.map(MIB)?)?;
    setup.memory.hide(true)?;
    check_any_skipped(&mut setup, "skipped_kind")?;
    setup.memory.hide(false)?;
    setup.check_kept(0, MIB)?;
    setup.memory.protect(false)?;
    check_any_skipped(&mut setup, "skipped_kind")?;
    setup.memory.protect(true)?;
    setup.check_kept(0, MIB)?;
    setup.finish()
}

fn others() -> CaseResult {
    for backing in [Backing::Anonymous, Backing::SharedMemfd, Backing::EmptyPrivateMemfd] {
        let mut setup = Setup::new(Mapping::new(backing, 2 * HUGE_PAGE)?)?;
        let before = setup.vm.bridge_stats()?;
        check_eq!(make(&mut setup, &any(PLACE, HUGE_PAGE))?, 0, "status");
        let merged = setup.vm.bridge_stats()?.since(&before, "merged_pages")?;
        check_eq!(merged, (HUGE_PAGE / PAGE) as u64, "merged_pages of {backing:?}");
        check_eq!(setup.memory.first_difference(0, HUGE_PAGE, |_| 0), None, "what is not zero");
        setup.check_kept(HUGE_PAGE, HUGE_PAGE)?;
        setup.finish()?;
    }
    // A shared file of another kind stays as it is.
    let mut setup = Setup::new(Mapping::new(Backing::SealedMemfd, 2 * MIB)?)?;
    check_any_skipped(&mut setup, "skipped_kind")?;
    check_eq!(setup.memory.first_difference(0, 2 * MIB, pattern), None, "what is lost");
    setup.finish()?;
    Ok(Verdict::Pass)
}
