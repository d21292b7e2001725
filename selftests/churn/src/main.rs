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
        /// MiB in use at a time; above 32, the C library takes them from the kernel each time.
        #[arg(long, default_value_t = 40)]
        mib: usize,
    },
    /// Take memory, touch all its pages and free them, over and over, and say how long that took.
    Laps {
        /// How often.
        laps: u64,
        /// MiB at a time; above 32, the C library takes them from the kernel each time.
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

const MIB_WORDS: usize = (1 << 20) / size_of::<u64>();
const PAGE_WORDS: usize = 4096 / size_of::<u64>();

/// The word that belongs at `index` in lap `lap` of thread `thread`; never 0, which is what released
/// memory reads as.
fn pattern(thread: u64, lap: u64, index: usize) -> u64 {
    let seed = (thread << 48) ^ (lap << 24) ^ index as u64;
    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Laps, MiB and words that were wrong.
#[derive(Default)]
struct Sums {
    laps: AtomicU64,
    mib: AtomicU64,
    mismatches: AtomicU64,
}

fn check(thread: u64, mib: usize, wait: Duration, end: &End, sums: &Sums) {
    let (begin, mut lap) = (Instant::now(), 0);
    while !end.has_come(begin, sums) {
        lap += 1;
        // From 256 KiB up, so that pages of every order are taken and given back.
        let words = MIB_WORDS / 4 * (1 + (lap as usize * 7) % (4 * mib));
        // A fresh mapping each time: pages come from the guest's free lists and go back there.
        let memory: Vec<u64> = (0..words).map(|i| pattern(thread, lap, i)).collect();
        thread::sleep(wait);
        let wrong =
            memory.iter().enumerate().filter(|(i, w)| **w != pattern(thread, lap, *i)).count();
        drop(memory);
        sums.laps.fetch_add(1, Relaxed);
        sums.mib.fetch_add((words / MIB_WORDS) as u64, Relaxed);
        sums.mismatches.fetch_add(wrong as u64, Relaxed);
    }
}

fn zeroes(mib: usize, end: &End, sums: &Sums) {
    let (begin, mut lap) = (Instant::now(), 0);
    while !end.has_come(begin, sums) {
        lap += 1;
        // The compiler must not know what is in it.
        let mut memory = black_box(vec![0u64; mib * MIB_WORDS]);
        for page in memory.chunks_mut(PAGE_WORDS) {
            // What is only read is the kernel's one page of zeroes.
            page[0] = 1;
            let wrong = page.iter().skip(1).filter(|&&word| word != 0).count();
            sums.mismatches.fetch_add(wrong as u64, Relaxed);
        }
        memory.iter_mut().enumerate().for_each(|(i, word)| *word = pattern(0, lap, i));
        // Nobody reads it: that it is written must not be left out.
        black_box(&memory);
        sums.laps.fetch_add(1, Relaxed);
        sums.mib.fetch_add(mib as u64, Relaxed);
    }
}

/// What the subcommand of that name does.
fn holes(path: &Path, bytes: u64, run: u64) -> io::Result<()> {
    if run == 0 || bytes % (2 * run) != 0 {
        return Err(io::Error::other("the file is no multiple of two runs"));
    }
    let mut file = File::create(path)?;
    // Page by page: so each is allocated by itself.
    let page = vec![0x5a; PAGE_WORDS * size_of::<u64>()];
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
    let [laps, mib, wrong] = [&sums.laps, &sums.mib, &sums.mismatches].map(|n| n.load(Relaxed));
    println!("laps {laps} mib {mib} mismatches {wrong}");
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
                let mut memory = black_box(vec![0u64; mib * MIB_WORDS]);
                memory.chunks_mut(PAGE_WORDS).for_each(|page| page[0] = 1);
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
            let memory: Vec<u64> = (0..mib * MIB_WORDS).map(|i| pattern(0, 0, i)).collect();
            println!("filled {} MiB", memory.len() / MIB_WORDS);
            let mut rest = Vec::new();
            // An error ends it just the same.
            let _ = io::stdin().read_to_end(&mut rest);
            drop(memory);
        }
    }
}
