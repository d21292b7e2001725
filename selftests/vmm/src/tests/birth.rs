// SPDX-License-Identifier: GPL-2.0

//! The queue of a VM: there from its beginning, known under KVM's name for it, gone with it.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;

use kvm_ioctls::{Kvm, VmFd};

use super::check_vm_works;
use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::stats::directories;
use crate::thread::{wait_until, PATIENCE};
use crate::vm::{Vm, VmConfig};

const DEBUGFS: &str = "/sys/kernel/debug";

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("a VM has its queue before it has run", at_once),
        Case::new("a VM under the descriptor of one that still lives", same_descriptor),
        Case::new("a hundred VMs at the same time", hundred),
        Case::new("a VM that another thread has made, and has ended", another_thread),
        Case::new("VMs that sixteen threads make at the same time", threads),
    ]
}

fn directory(module: &str, name: &str) -> PathBuf {
    PathBuf::from(format!("{DEBUGFS}/{module}/{name}"))
}

/// What the module has, of this process.
fn ours() -> Result<Vec<String>> {
    let paths = directories("kvm_dlh", std::process::id())?;
    let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let mut names: Vec<_> = paths.into_iter().filter_map(name).collect();
    names.sort();
    Ok(names)
}

fn all_gone() -> Result<()> {
    wait_until(PATIENCE, "the queues are gone", || ours().is_ok_and(|names| names.is_empty()))
}

fn at_once() -> CaseResult {
    all_gone()?;
    let vm = Kvm::new()?.create_vm()?;
    let name = format!("{}-{}", std::process::id(), vm.as_raw_fd());
    check!(directory("kvm", &name).exists(), "KVM has no directory {name}");
    check_eq!(ours()?, vec![name.clone()], "the module's directories when the VM has been made");
    let rings = fs::read_to_string(directory("kvm_dlh", &name).join("rings"))?;
    check_eq!(rings, "", "rings of a new VM");
    drop(vm);
    all_gone()?;
    Ok(Verdict::Pass)
}

fn same_descriptor() -> CaseResult {
    all_gone()?;
    let kvm = Kvm::new()?;
    // The next descriptor opened after this is closed: that of /dev/kvm, for the second VM.
    let placeholder = fs::File::open("/dev/null")?;
    let first = kvm.create_vm()?;
    let name = format!("{}-{}", std::process::id(), first.as_raw_fd());
    // A vCPU keeps its VM.
    let vcpu = first.create_vcpu(0)?;
    drop(first);
    drop(placeholder);
    // KVM has no directory for it, so the module hears of it at its first call only.
    let second = Vm::new(VmConfig::default())?;
    let names = ours()?;
    check_eq!(names.len(), 2, "directories of two VMs: {names:?}");
    check!(names.contains(&name), "no {name} in {names:?}");
    second.stats()?.check_law()?;
    drop(second);
    wait_until(PATIENCE, "one is gone", || ours().is_ok_and(|n| n.len() == 1))?;
    drop(vcpu);
    all_gone()?;
    Ok(Verdict::Pass)
}

/// KVM, and so the module, names it after the thread; the module says whose process it is.
fn another_thread() -> CaseResult {
    all_gone()?;
    // SAFETY: Has no preconditions.
    let make = || Ok((unsafe { libc::gettid() }, Vm::new(VmConfig::default())?));
    let made: Result<_> = std::thread::spawn(make).join().map_err(|_| "the thread panicked")?;
    let (tid, mut vm) = made?;
    check!(tid as u32 != std::process::id(), "the thread is the process's first");
    let found = directories("kvm_dlh", std::process::id())?;
    check_eq!(found.len(), 1, "directories of this process's VMs, {found:?}");
    let name = found[0].file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.unwrap_or_default();
    check!(name.starts_with(&format!("{tid}-")), "it is called {name}, made by thread {tid}");
    check_eq!(vm.stats()?.get("vmm_pid")?, u64::from(std::process::id()), "vmm_pid");
    check_vm_works(&mut vm)?;
    drop(vm);
    all_gone()?;
    Ok(Verdict::Pass)
}

fn hundred() -> CaseResult {
    all_gone()?;
    let mut vms = Vec::new();
    let kvm = Kvm::new()?;
    for _ in 0..100 {
        vms.push(kvm.create_vm()?);
    }
    check_eq!(ours()?.len(), 100, "queues");
    drop(vms);
    all_gone()?;
    // And they are of use.
    let vm = Vm::new(VmConfig::default())?;
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

/// More than once around the places that the module has for VMs that are being made.
fn threads() -> CaseResult {
    const THREADS: usize = 16;
    const EACH: usize = 10;
    all_gone()?;
    let start = Barrier::new(THREADS);
    let vms = thread::scope(|scope| -> Result<Vec<VmFd>> {
        let makers: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| -> Result<Vec<VmFd>> {
                    let kvm = Kvm::new()?;
                    start.wait();
                    (0..EACH).map(|_| Ok(kvm.create_vm()?)).collect()
                })
            })
            .collect();
        let mut vms = Vec::new();
        for maker in makers {
            vms.extend(maker.join().map_err(|_| "a thread that makes VMs died")??);
        }
        Ok(vms)
    })?;
    // KVM names the directory of a VM by the thread that made it.
    let named = fs::read_dir(format!("{DEBUGFS}/kvm_dlh"))?.count();
    check_eq!(named, THREADS * EACH, "queues");
    drop(vms);
    wait_until(PATIENCE, "the queues are gone", || {
        fs::read_dir(format!("{DEBUGFS}/kvm_dlh")).is_ok_and(|entries| entries.count() == 0)
    })?;
    Ok(Verdict::Pass)
}
