// SPDX-License-Identifier: GPL-2.0

//! The data check, and the load of the demo: runs in the guest, as an ordinary process.
//!
//! `dlh-churn check` allocates fresh memory, writes a pattern that is different for each word and lap,
//! waits, verifies it and frees it, over and over, on several threads: memory that the host took away
//! while it was in use shows as a word that is not what was written.
//!
//! `dlh-churn zeroes` looks whether fresh memory reads as zeroes, and leaves other things in it.
//!
//! `dlh-churn holes` frees memory in pieces of a size.
//!
//! `dlh-churn laps` takes memory and gives it back, as fast as it can, for the benchmarks.
//!
//! `dlh-churn fill` takes memory, touches all of it, keeps it until it is told to go by the end of its
//! standard input, and frees it.

#![forbid(unsafe_code)]

use std::{
    fs::File,
    hint::black_box,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use clap::{Parser, Subcommand};
use memmap2::MmapMut;
use rustix::fs::FallocateFlags;

#[derive(Parser)]
#[command(about = "Writes, waits and verifies: does the guest's memory keep what is written?")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Verify continuously; exits with 1 if any word was not what was written.
    Check {
        #[command(flatten)]
        end: End,
        /// Threads.
        #[arg(long, default_value_t = 2)]
        threads: u64,
        /// MiB that each thread has in use at most.
        #[arg(long, default_value_t = 32)]
        mib: usize,
        /// Milliseconds between writing and verifying.
        #[arg(long, default_value_t = 3)]
        wait: u64,
    },
    /// Verify continuously that fresh memory is all zeroes; exits with 1 if any word was not.
    Zeroes {
        #[command(flatten)]
        end: End,
        /// MiB in use at a time.
        #[arg(long, default_value_t = 40)]
        mib: usize,
    },
    /// Take memory, touch all its pages and free them, over and over, and say how long that took.
    Laps {
        /// How often.
        laps: u64,
        /// MiB at a time.
        mib: usize,
    },
    /// Write a file, and punch every other run of pages out of it when standard input ends: on a tmpfs the memory
    /// that is free then lies in pieces.
    Holes {
        /// The file; it stays.
        file: PathBuf,
        /// MiB.
        #[arg(long)]
        mib: u64,
        /// KiB of a run.
        #[arg(long)]
        run_kib: u64,
    },
    /// Touch memory and keep it until standard input ends.
    Fill {
        /// MiB.
        #[arg(long)]
        mib: usize,
    },
}

/// When to end: after so much work, or after so much time.
#[derive(clap::Args)]
struct End {
    /// At least so many laps, of all threads together.
    #[arg(long, default_value_t = 10)]
    laps: u64,
    /// Not before this file is there.
    #[arg(long)]
    until: Option<PathBuf>,
    /// After so many seconds instead, however much has been done.
    #[arg(long, conflicts_with_all = ["laps", "until"])]
    seconds: Option<u64>,
}

impl End {
    /// Whether it is time, `begin` having been the beginning.
    fn has_come(&self, begin: Instant, sums: &Sums) -> bool {
        match (self.seconds, &self.until) {
            (Some(seconds), _) => begin.elapsed() >= Duration::from_secs(seconds),
            (None, until) => {
                sums.laps.load(Relaxed) >= self.laps
                    && until.as_ref().is_none_or(|file| file.exists())
            }
        }
    }
}

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;
const WORD: usize = size_of::<u64>();

/// The word that belongs at `index` in lap `lap` of thread `thread`; never 0, which is what released
/// memory reads as.
fn pattern(thread: u64, lap: u64, index: usize) -> u64 {
    let seed = (thread << 48) ^ (lap << 24) ^ index as u64;
    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Memory straight from the kernel, which gets it back when this is dropped. (What the C library's allocator has freed
/// it soon keeps for itself: then nothing is free in the guest, and nothing is checked.)
///
/// # Panics
///
/// There is no such memory.
fn fresh(bytes: usize) -> MmapMut {
    MmapMut::map_anon(bytes).expect("no memory")
}

/// Stores in each word what `word` says of its index.
fn write(memory: &mut [u8], word: impl Fn(usize) -> u64) {
    for (i, bytes) in memory.chunks_exact_mut(WORD).enumerate() {
        bytes.copy_from_slice(&word(i).to_ne_bytes());
    }
}

/// How many words are not what `word` says of their index.
fn wrong(memory: &[u8], word: impl Fn(usize) -> u64) -> u64 {
    let differs = |&(i, bytes): &(usize, &[u8])| *bytes != word(i).to_ne_bytes();
    memory.chunks_exact(WORD).enumerate().filter(differs).count() as u64
}

/// Laps, MiB and words that were wrong.
#[derive(Default)]
struct Sums {
    laps: AtomicU64,
    kib: AtomicU64,
    mismatches: AtomicU64,
}

fn check(thread: u64, mib: usize, wait: Duration, end: &End, sums: &Sums) {
    let (begin, mut lap) = (Instant::now(), 0);
    while !end.has_come(begin, sums) {
        lap += 1;
        // From 256 KiB up, so that pages of every order are taken and given back.
        let bytes = MIB / 4 * (1 + (lap as usize * 7) % (4 * mib));
        let mut memory = fresh(bytes);
        write(&mut memory, |i| pattern(thread, lap, i));
        thread::sleep(wait);
        let mismatches = wrong(&memory, |i| pattern(thread, lap, i));
        drop(memory);
        sums.laps.fetch_add(1, Relaxed);
        sums.kib.fetch_add((bytes >> 10) as u64, Relaxed);
        sums.mismatches.fetch_add(mismatches, Relaxed);
    }
}

fn zeroes(mib: usize, end: &End, sums: &Sums) {
    let (begin, mut lap) = (Instant::now(), 0);
    while !end.has_come(begin, sums) {
        lap += 1;
        let mut memory = fresh(mib * MIB);
        for page in memory.chunks_exact_mut(PAGE) {
            // What is only read is the kernel's one page of zeroes.
            page[0] = 1;
            let mismatches = wrong(&page[WORD..], |_| 0);
            sums.mismatches.fetch_add(mismatches, Relaxed);
        }
        write(&mut memory, |i| pattern(0, lap, i));
        // Nobody reads it: that it is written must not be left out.
        black_box(&memory);
        sums.laps.fetch_add(1, Relaxed);
        sums.kib.fetch_add((mib as u64) << 10, Relaxed);
    }
}

/// What the subcommand of that name does.
fn holes(path: &Path, bytes: u64, run: u64) -> io::Result<()> {
    if run == 0 || bytes % (2 * run) != 0 {
        return Err(io::Error::other("the file is no multiple of two runs"));
    }
    let mut file = File::create(path)?;
    // Page by page: so each is allocated by itself.
    let page = [0x5a; PAGE];
    for _ in (0..bytes).step_by(page.len()) {
        file.write_all(&page)?;
    }
    println!("filled {} MiB", bytes >> 20);
    io::stdin().read_to_end(&mut Vec::new())?;
    for at in (0..bytes).step_by(2 * run as usize) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, at, run)?;
    }
    Ok(())
}

/// Says what it came to, and ends the process.
fn conclude(sums: &Sums) -> ! {
    let [laps, kib, wrong] = [&sums.laps, &sums.kib, &sums.mismatches].map(|n| n.load(Relaxed));
    println!("laps {laps} mib {} mismatches {wrong}", kib >> 10);
    std::process::exit(i32::from(wrong != 0 || laps == 0));
}

fn main() {
    match Arguments::parse().command {
        Command::Check { end, threads, mib, wait } => {
            let (wait, sums) = (Duration::from_millis(wait), Sums::default());
            thread::scope(|scope| {
                for thread in 1..=threads {
                    let (end, sums) = (&end, &sums);
                    scope.spawn(move || check(thread, mib, wait, end, sums));
                }
            });
            conclude(&sums);
        }
        Command::Zeroes { end, mib } => {
            let sums = Sums::default();
            zeroes(mib, &end, &sums);
            conclude(&sums);
        }
        Command::Laps { laps, mib } => {
            let begin = Instant::now();
            for _ in 0..laps {
                let mut memory = fresh(mib * MIB);
                memory.chunks_exact_mut(PAGE).for_each(|page| page[0] = 1);
                black_box(&memory);
            }
            println!("nanoseconds {}", begin.elapsed().as_nanos());
        }
        Command::Holes { file, mib, run_kib } => {
            if let Err(error) = holes(&file, mib << 20, run_kib << 10) {
                eprintln!("dlh-churn: {}: {error}", file.display());
                std::process::exit(1);
            }
        }
        Command::Fill { mib } => {
            let mut memory = fresh(mib * MIB);
            write(&mut memory, |i| pattern(0, 0, i));
            println!("filled {mib} MiB");
            let mut rest = Vec::new();
            // An error ends it just the same.
            let _ = io::stdin().read_to_end(&mut rest);
            drop(memory);
        }
    }
}
