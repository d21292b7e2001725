// SPDX-License-Identifier: GPL-2.0

//! The queue of a VM: there from its beginning, known under KVM's name for it, gone with it.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use kvm_ioctls::Kvm;

use crate::ktap::{check, check_eq, Case, CaseResult, Result, Verdict};
use crate::stats::Stats;
use crate::thread::wait_until;
use crate::vm::{Vm, VmConfig};

const DEBUGFS: &str = "/sys/kernel/debug";

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("a VM has its queue before it has run", at_once),
        Case::new("a VM under the descriptor of one that still lives", same_descriptor),
        Case::new("a hundred VMs at the same time", hundred),
        Case::new("a VM that another thread has made", by_thread),
    ]
}

fn directory(module: &str, name: &str) -> PathBuf {
    PathBuf::from(format!("{DEBUGFS}/{module}/{name}"))
}

/// What the module has, of this process.
fn ours() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(format!("{DEBUGFS}/kvm_dlh"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(&format!("{}-", std::process::id())) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn all_gone() -> Result<()> {
    wait_until(Duration::from_secs(10), "the queues are gone", || {
        ours().is_ok_and(|names| names.is_empty())
    })
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
    wait_until(Duration::from_secs(10), "one is gone", || ours().is_ok_and(|n| n.len() == 1))?;
    drop(vcpu);
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

/// KVM names its directory by the thread; the VMM's pid is in the statistics.
fn by_thread() -> CaseResult {
    let kvm = Kvm::new()?;
    let maker = std::thread::spawn(move || {
        // SAFETY: Has no preconditions.
        kvm.create_vm().map(|vm| (vm, unsafe { libc::gettid() }))
    });
    let (vm, tid) = maker.join().map_err(|_| "the thread panicked")??;
    let name = format!("{tid}-{}", vm.as_raw_fd());
    check!(directory("kvm", &name).exists(), "KVM has no directory {name}");
    let ours = directory("kvm_dlh", &name);
    let seen = Stats::read(&ours.join("stats"))?.get("vmm_pid")?;
    check!(tid as u32 != std::process::id(), "the thread has the pid of its process");
    check_eq!(seen, u64::from(std::process::id()), "vmm_pid");
    drop(vm);
    wait_until(Duration::from_secs(10), "it is gone", || !ours.exists())?;
    Ok(Verdict::Pass)
}
