// SPDX-License-Identifier: GPL-2.0

//! What the interface must take from an operation that is not as it should be.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dlh_abi::{Call, Error, Function, Operation};

use super::{execute, insert, is_loaded, Build, Ending, IN_C};
use crate::ktap::{check, check_eq, failed, CaseResult, Result, Verdict};
use crate::ring::Ring;
use crate::tests::check_vm_works;
use crate::tests::reload::run;
use crate::thread::{wait_until, PATIENCE};
use crate::vm::{Vm, VmConfig, BASE};

/// The module, and a call of its operation with the number it has if nobody says otherwise.
pub(super) const MODULE: &str = "odd_operation";
const ODD: Call = Call { op: Operation(63), arg: [1, 2] };

/// How `insmod` puts EINVAL and EBUSY.
const INVALID: &str = "Invalid parameters";
const BUSY: &str = "Device or resource busy";

fn insmod(build: &Build, parameters: &[&str]) -> Result<()> {
    run(Command::new("insmod")
        .arg(build.test_modules.0.join(format!("{MODULE}.ko")))
        .args(parameters))
}

fn refuse(build: &Build, parameters: &[&str], reason: &str) -> Result<()> {
    let Err(error) = insmod(build, parameters) else {
        return failed(format!("an operation with {parameters:?} was accepted"));
    };
    check!(error.to_string().contains(reason), "{parameters:?} was refused with {error}");
    check!(!is_loaded(MODULE), "{MODULE} is there although {error}");
    Ok(())
}

fn parameter(name: &str) -> PathBuf {
    Path::new("/sys/module").join(MODULE).join("parameters").join(name)
}

fn set(name: &str, value: i32) -> Result<()> {
    Ok(fs::write(parameter(name), value.to_string())?)
}

fn get(name: &str) -> Result<u32> {
    Ok(fs::read_to_string(parameter(name))?.trim().parse()?)
}

pub(super) fn refused(build: &Build) -> CaseResult {
    for parameters in [
        "version=0",
        "version=2",
        "version=4294967295",
        "number=0",
        "number=64",
        "number=65535",
        "no_attach=1",
        "no_detach=1",
        "no_execute=1",
        // Bits with a meaning of their own.
        "feature=1",
        "feature=4",
    ] {
        refuse(build, &[parameters], INVALID)?;
    }
    let mut vm = Vm::new(VmConfig::default())?;
    build.samples.insert(IN_C.module)?;
    let account = IN_C.attach(&mut vm)?;
    refuse(build, &["number=32"], BUSY)?;
    // Built in.
    refuse(build, &["number=2"], BUSY)?;
    refuse(build, &["number=32", "version=2"], INVALID)?;
    check_eq!(
        insert(&mut vm, IN_C.call(9, Ending::Late(1)))?,
        0,
        "a call of the one that was first"
    );
    check_eq!(account.get("sum")?, 9, "its sum");
    build.remove(IN_C.module)?;

    insmod(build, &["number=32"])?;
    check_eq!(insert(&mut vm, IN_C.call(9, Ending::AtOnce))?, 0, "a call of the odd operation");
    check_eq!(get("attached")?, 1, "contexts made by the odd operation");
    let second = build.samples.insert(IN_C.module);
    let Err(error) = second else { return failed("the number was given out twice") };
    check!(error.to_string().contains(BUSY), "the sample was refused with {error}");
    check_eq!(insert(&mut vm, IN_C.call(9, Ending::AtOnce))?, 0, "a call of the odd operation");
    build.remove(MODULE)?;
    build.samples.insert(IN_C.module)?;
    IN_C.attach(&mut vm)?;
    Ok(Verdict::Pass)
}

pub(super) fn answers(build: &Build) -> CaseResult {
    insmod(build, &[])?;
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    // 1 asks for nothing but KVM_DLH_PENDING, which the module never returns by itself.
    for by_token in [0, 1] {
        set("by_token", by_token)?;
        for status in [0, 2, 7, i32::MAX, -1109, -5, -1, i32::MIN] {
            set("status", status)?;
            let before = vm.stats()?;
            let expected = i64::from(status.min(0));
            execute(&mut vm, &mut ring, &[(ODD, expected); 3])?;
            check_eq!(insert(&mut vm, ODD)?, expected, "CALL, status {status}");
            let after = vm.stats()?;
            let declined = if expected == 0 { 0 } else { 4 };
            check_eq!(after.since(&before, "declined")?, declined, "declined, status {status}");
            check_eq!(after.get("pending")?, 0, "pending, status {status}");
            after.check_law()?;
        }
    }
    check_eq!(get("attached")?, 1, "contexts made");
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

pub(super) fn attach(build: &Build) -> CaseResult {
    insmod(build, &[])?;
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    for (name, value) in [("attach_error", -12), ("attach_error", 5), ("no_context", 1)] {
        set(name, value)?;
        let expected = Error::NoMemory.to_rax();
        execute(&mut vm, &mut ring, &[(ODD, expected); 2])?;
        check_eq!(insert(&mut vm, ODD)?, expected, "CALL, {name} {value}");
        check_eq!(get("attached")?, 0, "contexts made, {name} {value}");
        set(name, 0)?;
    }
    execute(&mut vm, &mut ring, &[(ODD, 0); 2])?;
    check_eq!(get("attached")?, 1, "contexts made");
    let mut other = Vm::new(VmConfig::default())?;
    check_eq!(insert(&mut other, ODD)?, 0, "a call in another VM");
    check_eq!((get("attached")?, get("detached")?), (2, 0), "contexts made and given back");
    drop(other);
    wait_until(PATIENCE, "the context of the VM that has ended is given back", || {
        get("detached").is_ok_and(|n| n == 1)
    })?;
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

pub(super) fn features(build: &Build) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut bits = || vm.hypercall(0, Function::Features as u64, 0, 0, 0);
    let stock = bits()?;
    for feature in [1 << 31, 0xff00_0000u32] {
        insmod(build, &[&format!("feature={feature}")])?;
        check_eq!(bits()?, stock | i64::from(feature), "FEATURES with {feature:#x}");
        build.remove(MODULE)?;
        check_eq!(bits()?, stock, "FEATURES without it");
    }
    Ok(Verdict::Pass)
}
