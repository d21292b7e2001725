// SPDX-License-Identifier: GPL-2.0

//! Test cases, and how their results are printed.

use std::error::Error;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Instant;

use crate::stats::NoDebugfs;

/// Anything that goes wrong fails the case it happens in.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How a case ended that did not fail.
#[derive(Debug)]
pub(crate) enum Verdict {
    Pass,
    /// What is tested cannot be had on this machine.
    Skip(String),
}

/// What a case returns.
pub(crate) type CaseResult = Result<Verdict>;

/// A test case.
pub(crate) struct Case {
    name: String,
    run: Box<dyn Fn() -> CaseResult>,
}

impl Case {
    /// A case with its name.
    pub(crate) fn new(name: impl Into<String>, run: impl Fn() -> CaseResult + 'static) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }
}

/// Seconds after which a case that hangs takes the whole program down: more than one wait, and less than a host under
/// test may be silent for (`selftests/vm/patience.py`).
const CASE_LIMIT: u32 = 1100;

/// Runs the cases whose names contain `only`; returns whether none failed.
pub(crate) fn run(mut cases: Vec<Case>, only: &str) -> bool {
    cases.retain(|case| case.name.contains(only));
    println!("KTAP version 1\n1..{}", cases.len());
    let mut good = true;
    for (index, case) in cases.iter().enumerate() {
        // SAFETY: Sets a timer; SIGALRM ends the process.
        unsafe { libc::alarm(CASE_LIMIT) };
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (case.run)()))
            .unwrap_or_else(|_| Err("it panicked".into()));
        let (word, directive) = match outcome {
            Ok(Verdict::Pass) => ("ok", String::new()),
            Ok(Verdict::Skip(reason)) => ("ok", format!(" # SKIP {reason}")),
            Err(error) if error.is::<NoDebugfs>() => ("ok", format!(" # SKIP {error}")),
            Err(error) => {
                good = false;
                for line in error.to_string().lines() {
                    println!("# {line}");
                }
                ("not ok", String::new())
            }
        };
        println!("# {:.2} s", started.elapsed().as_secs_f64());
        println!("{word} {} - {}{directive}", index + 1, case.name);
    }
    good
}

/// A failure with a message.
pub(crate) fn failed<T>(message: impl Into<String>) -> Result<T> {
    Err(message.into().into())
}

/// Fails the case unless the condition holds.
macro_rules! check {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return $crate::ktap::failed(format!($($message)+));
        }
    };
}
pub(crate) use check;

/// Fails the case unless both values are equal; the rest says what they are.
macro_rules! check_eq {
    ($seen:expr, $expected:expr, $($what:tt)+) => {{
        let (seen, expected) = (&$seen, &$expected);
        if seen != expected {
            let what = format!($($what)+);
            return $crate::ktap::failed(format!("{what}: expected {expected:?}, seen {seen:?}"));
        }
    }};
}
pub(crate) use check_eq;
