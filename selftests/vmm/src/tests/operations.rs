// SPDX-License-Identifier: GPL-2.0

//! Operations of other modules, through the interface in `linux/kvm_dlh.h`: the samples in `samples/`, and
//! one that is odd (`selftests/modules/odd_operation.c`). The subject inserts and removes all modules.

mod odd;
mod pending;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use dlh_abi::{Call, Error, Function, Operation};

use super::check_vm_works;
use super::reload::Modules;
use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result, Verdict};
use crate::ring::{Ring, NOP};
use crate::stats::{directories, Stats};
use crate::thread::{wait_until, with_vcpu, PATIENCE};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Vm, VmConfig, BASE};

const CALL: u64 = Function::Call as u64;
/// Where second rings are.
const OTHER: u64 = BASE + 0x10_0000;

/// For so long calls are pending that are waited for, in milliseconds.
const LONG: u64 = 2500;
/// As long as a sample may be asked to wait, in milliseconds.
const MOST_MS: u64 = 60_000;

/// What a sample's `arg[1]` asks for.
#[derive(Clone, Copy, Debug)]
enum Ending {
    AtOnce,
    Early,
    /// After so many milliseconds.
    Late(u64),
    Refused,
}

/// A sample operation.
#[derive(Clone, Copy, Debug)]
struct Sample {
    module: &'static str,
    op: Operation,
}

const IN_C: Sample = Sample { module: "dlh_sample_c", op: Operation(32) };
const IN_RUST: Sample = Sample { module: "dlh_sample_rust", op: Operation(33) };

impl Sample {
    fn call(self, number: u64, ending: Ending) -> Call {
        let how = match ending {
            Ending::AtOnce => 0,
            Ending::Early => 1,
            Ending::Late(ms) => 2 | (ms << 32),
            Ending::Refused => 3,
        };
        Call { op: self.op, arg: [number, how] }
    }

    /// Its first call in a VM; returns what it keeps for it. Adds 0.
    fn attach(self, vm: &mut Vm) -> Result<Account> {
        let list = || directories(self.module, std::process::id());
        let before = list()?;
        check_eq!(insert(vm, self.call(0, Ending::AtOnce))?, 0, "the first call");
        let mut found = list()?;
        found.retain(|path| !before.contains(path));
        match &found[..] {
            [path] => Ok(Account(path.clone())),
            _ => failed(format!("{} made {found:?} for a VM", self.module)),
        }
    }
}

/// A sample's directory of a VM.
#[derive(Debug)]
struct Account(PathBuf);

impl Account {
    fn get(&self, name: &str) -> Result<u64> {
        Stats::read(&self.0.join("stats"))?.get(name)
    }

    /// Calls that have been accepted, whether they have ended or not.
    fn accepted(&self) -> Result<u64> {
        let stats = Stats::read(&self.0.join("stats"))?;
        Ok(stats.get("calls")? + stats.get("waiting")?)
    }

    /// Waits until so many have been.
    fn wait_accepted(&self, count: u64) -> Result<()> {
        wait_until(PATIENCE, &format!("{count} accepted in {self:?}"), || {
            self.accepted().is_ok_and(|seen| seen == count)
        })
    }

    /// Waits until a value is what it should be.
    fn wait(&self, name: &str, value: u64) -> Result<()> {
        wait_until(PATIENCE, &format!("{name} {value} in {self:?}"), || {
            self.get(name).is_ok_and(|seen| seen == value)
        })
    }
}

/// A trap-inserted call; returns RAX.
fn insert(vm: &mut Vm, call: Call) -> Result<i64> {
    vm.hypercall(0, CALL, call.op.0.into(), call.arg[0], call.arg[1])
}

/// Where the module files are.
struct Build {
    ours: Modules,
    samples: Modules,
    test_modules: Modules,
}

impl Build {
    fn new(build: &Path) -> Self {
        Self {
            ours: Modules(build.join("modules")),
            samples: Modules(build.join("samples")),
            test_modules: Modules(build.join("test-modules")),
        }
    }

    fn remove(&self, module: &str) -> Result<()> {
        self.ours.remove(module)
    }
}

fn is_loaded(module: &str) -> bool {
    Path::new("/sys/module").join(module).exists()
}

/// What a case is made of: it begins with kvm_dlh.ko alone.
type Entry = (&'static str, fn(&Build) -> CaseResult);
/// The same for a case that is run with each sample.
type SampleEntry = (&'static str, fn(&Build, Sample) -> CaseResult);

pub(super) fn cases(build: &Path) -> Vec<Case> {
    const OF_EACH: &[SampleEntry] = &[
        ("is known only while its module is there", comes_and_goes),
        ("each way to end reaches the guest", endings),
        ("bad arguments are refused", bad_arguments),
        ("calls are executed in the order of their positions", in_order),
        ("done waits for the first pending call", pending::done_waits),
        ("done passes what has ended before a pending call", pending::done_follows),
        ("KICK and RING_TEARDOWN wait for what is pending", pending::waits),
        ("nothing is pending when a signal ends KVM_RUN", pending::interrupted),
        ("a ring's memslot goes with calls pending", pending::memslot_goes),
        ("two vCPUs flood it", flooded),
        ("each VM has its own context", two_vms),
        ("its module goes with calls waiting in a ring", goes_before_execution),
        ("its module comes and goes while calls are pending", pending::goes_while_pending),
        ("its module goes while a CALL is pending", pending::goes_during_call),
        ("its module goes while VMs end", goes_with_vms),
        ("kvm_dlh cannot go below it", holds),
        ("a VMM is killed with calls pending", pending::killed),
    ];
    const OF_ALL: &[Entry] = &[
        ("two operations at once", two_samples),
        ("what cannot be registered is refused", odd::refused),
        ("whatever an operation answers, its call ends", odd::answers),
        ("an operation that cannot start in a VM", odd::attach),
        ("feature bits come and go with the operation", odd::features),
    ];
    let build = Rc::new(Build::new(build));
    let mut cases = Vec::new();
    for sample in [IN_C, IN_RUST] {
        for &(name, test) in OF_EACH {
            let build = build.clone();
            cases.push(Case::new(format!("{}: {name}", sample.module), move || {
                prepared(&build, |build| test(build, sample))
            }));
        }
    }
    for &(name, test) in OF_ALL {
        let build = build.clone();
        cases.push(Case::new(name, move || prepared(&build, test)));
    }
    cases
}

/// Whatever happens in a case, the next one finds a stock host.
fn prepared(build: &Build, test: impl Fn(&Build) -> CaseResult) -> CaseResult {
    build.ours.insert("kvm_dlh")?;
    let result = test(build);
    let mut left = Ok(());
    for module in [IN_C.module, IN_RUST.module, odd::MODULE, "kvm_dlh"] {
        if is_loaded(module) {
            left = left.and(build.remove(module));
        }
    }
    result.and_then(|verdict| left.map(|()| verdict))
}

/// What the host stores in an entry, or returns from a CALL.
fn answer(outcome: std::result::Result<(), Error>) -> i64 {
    outcome.map_or_else(Error::to_rax, |()| 0)
}

/// Places calls with a NOP behind each, executes all of them at an exit, and checks the statuses.
fn execute(vm: &mut Vm, ring: &mut Ring, calls: &[(Call, i64)]) -> Result<()> {
    let mut expected = Vec::new();
    for (call, status) in calls {
        expected.push((ring.place(call)?, call, status));
        ring.place(&NOP)?;
    }
    ring.publish();
    vm.vcpus[0].exit(Exit::Pio)?;
    check_eq!(ring.done(), ring.tail(), "done");
    for (position, call, status) in expected {
        check_eq!(i64::from(ring.status(position)), *status, "status of {call:x?}");
    }
    Ok(())
}

fn comes_and_goes(build: &Build, sample: Sample) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, u32::MAX - 20)?;
    let call = sample.call(5, Ending::AtOnce);
    for _ in 0..3 {
        let before = vm.stats()?;
        execute(&mut vm, &mut ring, &[(call, answer(Err(Error::Operation))); 2])?;
        check_eq!(insert(&mut vm, call)?, Error::Operation.to_rax(), "CALL without the module");
        let after = vm.stats()?;
        check_eq!(after.since(&before, "errors_operation")?, 3, "errors_operation");
        check_eq!(after.since(&before, "declined")?, 3, "declined");
        after.check_law()?;

        build.samples.insert(sample.module)?;
        let account = sample.attach(&mut vm)?;
        execute(&mut vm, &mut ring, &[(call, 0); 3])?;
        check_eq!(account.get("calls")?, 4, "calls");
        check_eq!(account.get("sum")?, 15, "sum");
        build.remove(sample.module)?;
        check!(!account.0.exists(), "{account:?} is there without the module");
    }
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn endings(build: &Build, sample: Sample) -> CaseResult {
    let all = [
        (sample.call(1, Ending::AtOnce), 0),
        (sample.call(2, Ending::Early), 0),
        (sample.call(4, Ending::Late(20)), 0),
        (sample.call(8, Ending::Refused), answer(Err(Error::Busy))),
        (sample.call(16, Ending::Late(0)), 0),
    ];
    let mut vm = Vm::new(VmConfig::default())?;
    build.samples.insert(sample.module)?;
    let account = sample.attach(&mut vm)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, u32::MAX - 3)?;
    let before = vm.stats()?;
    execute(&mut vm, &mut ring, &all)?;
    check_eq!(ring.declined(), 1, "declined in the header");
    check_eq!(account.get("sum")?, 1 + 2 + 4 + 16, "sum after the entries");
    for (call, expected) in all {
        check_eq!(insert(&mut vm, call)?, expected, "CALL {call:x?}");
    }
    check_eq!(account.get("sum")?, 2 * (1 + 2 + 4 + 16), "sum after the CALLs");
    check_eq!(account.get("calls")?, 9, "calls");
    check_eq!(account.get("waiting")?, 0, "waiting");
    let after = vm.stats()?;
    // Four by each way, and the NOPs.
    check_eq!(after.since(&before, "executed")?, 13, "executed");
    check_eq!(after.since(&before, "errors_busy")?, 2, "errors_busy");
    check_eq!(after.since(&before, "declined")?, 2, "declined");
    check_eq!(after.get("pending")?, 0, "pending");
    after.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

fn bad_arguments(build: &Build, sample: Sample) -> CaseResult {
    let words = [
        4,
        u64::from(u32::MAX),
        1 << 32,
        1 | (1 << 32),
        3 | (1 << 32),
        2 | ((MOST_MS + 1) << 32),
        2 | (u64::from(u32::MAX) << 32),
        u64::MAX,
    ];
    let refused = words
        .map(|word| (Call { op: sample.op, arg: [u64::MAX, word] }, answer(Err(Error::Argument))));
    let mut vm = Vm::new(VmConfig::default())?;
    build.samples.insert(sample.module)?;
    let account = sample.attach(&mut vm)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let before = vm.stats()?;
    execute(&mut vm, &mut ring, &refused)?;
    for (call, expected) in refused {
        check_eq!(insert(&mut vm, call)?, expected, "CALL {call:x?}");
    }
    let after = vm.stats()?;
    check_eq!(after.since(&before, "errors_argument")?, 16, "errors_argument");
    after.check_law()?;
    check_eq!(account.get("calls")?, 1, "calls that were counted");
    Ok(Verdict::Pass)
}

fn in_order(build: &Build, sample: Sample) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    build.samples.insert(sample.module)?;
    let account = sample.attach(&mut vm)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 128, u32::MAX - 50)?;
    let mut digest = 0u64;
    let mut number = 0;
    for _ in 0..4 {
        let mut calls = Vec::new();
        for ending in [Ending::AtOnce, Ending::Early].into_iter().cycle().take(60) {
            number += 1;
            digest = digest.wrapping_mul(31).wrapping_add(number);
            calls.push((sample.call(number, ending), 0));
        }
        execute(&mut vm, &mut ring, &calls)?;
        check_eq!(account.get("digest")?, digest, "digest after {number}");
    }
    Ok(Verdict::Pass)
}

fn flooded(build: &Build, sample: Sample) -> CaseResult {
    let count = 5000;
    let mut vm = Vm::new(VmConfig { vcpus: 2, ..VmConfig::default() })?;
    build.samples.insert(sample.module)?;
    let account = sample.attach(&mut vm)?;
    let mut rings =
        [Ring::set_up(&mut vm, 0, BASE, 256, 7)?, Ring::set_up(&mut vm, 1, OTHER, 256, 9)?];
    let before = vm.stats()?;
    // Both together may have more calls pending than the sample takes.
    let call = sample.call(3, Ending::Late(1));
    std::thread::scope(|scope| {
        let workers: Vec<_> = vm
            .vcpus
            .iter_mut()
            .zip(&mut rings)
            .map(|(vcpu, ring)| {
                scope.spawn(move || {
                    let flooded = vcpu.flood(ring, &call, count, |_| true)?;
                    check_eq!(flooded.stop, Stop::Done, "how the flood ended");
                    check_eq!(ring.done(), ring.tail(), "done when the flood was over");
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| -> Result<()> {
            worker.join().map_err(|_| "a vCPU thread panicked")?
        })
    })?;
    let after = vm.stats()?;
    let (executed, busy) =
        (after.since(&before, "executed")?, after.since(&before, "errors_busy")?);
    println!("# {executed} executed, {busy} refused for want of room");
    check_eq!(executed + busy, 2 * count, "entries");
    check_eq!(after.since(&before, "declined")?, busy, "declined");
    check_eq!(rings.iter().map(Ring::declined).sum::<u64>(), busy, "declined in the headers");
    check_eq!(after.get("pending")?, 0, "pending");
    after.check_law()?;
    check_eq!(account.get("calls")?, 1 + executed, "calls");
    check_eq!(account.get("sum")?, 3 * executed, "sum");
    Ok(Verdict::Pass)
}

fn two_vms(build: &Build, sample: Sample) -> CaseResult {
    build.samples.insert(sample.module)?;
    let mut vms = Vec::new();
    for _ in 0..2 {
        let mut vm = Vm::new(VmConfig::default())?;
        let account = sample.attach(&mut vm)?;
        let ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
        vms.push((vm, ring, account));
    }
    for lap in 1..=5 {
        for (index, (vm, ring, account)) in vms.iter_mut().enumerate() {
            let number = 100u64.pow(index as u32);
            let endings = [Ending::AtOnce, Ending::Early, Ending::Late(1)];
            execute(vm, ring, &endings.map(|ending| (sample.call(number, ending), 0)))?;
            check_eq!(account.get("sum")?, 3 * lap * number, "sum of VM {index}");
        }
    }
    let (first, _, gone) = vms.remove(0);
    drop(first);
    wait_until(PATIENCE, "the context of the VM that has ended is gone", || !gone.0.exists())?;
    let (vm, ring, account) = &mut vms[0];
    execute(vm, ring, &[(sample.call(1, Ending::Late(1)), 0)])?;
    check_eq!(account.get("sum")?, 1501, "sum of the other VM");
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}

fn goes_before_execution(build: &Build, sample: Sample) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    for ending in [Ending::AtOnce, Ending::Early, Ending::Late(MOST_MS)] {
        build.samples.insert(sample.module)?;
        sample.attach(&mut vm)?;
        let call = sample.call(1, ending);
        let first = ring.tail();
        ring.push(&call, 10)?;
        build.remove(sample.module)?;
        vm.vcpus[0].exit(Exit::Pio)?;
        check_eq!(ring.done(), ring.tail(), "done");
        for position in first..ring.tail() {
            let status = i64::from(ring.status(position));
            check_eq!(status, Error::Operation.to_rax(), "status of entry {position}");
        }
    }
    vm.stats()?.check_law()?;
    check_vm_works(&mut vm)?;
    Ok(Verdict::Pass)
}

/// Removes a sample, which must not wait for the calls that are pending in it: their statuses tell whether it did.
fn remove_at_once(build: &Build, sample: Sample) -> Result<()> {
    let started = Instant::now();
    build.remove(sample.module)?;
    println!("# {} took {:?} to go", sample.module, started.elapsed());
    Ok(())
}

fn goes_with_vms(build: &Build, sample: Sample) -> CaseResult {
    for round in 0..10 {
        build.samples.insert(sample.module)?;
        let mut vms = Vec::new();
        for _ in 0..3 {
            let mut vm = Vm::new(VmConfig::default())?;
            sample.attach(&mut vm)?;
            vms.push(vm);
        }
        drop(vms);
        std::thread::sleep(Duration::from_millis(round * 3));
        remove_at_once(build, sample)?;
    }
    Ok(Verdict::Pass)
}

fn holds(build: &Build, sample: Sample) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    build.samples.insert(sample.module)?;
    for _ in 0..2 {
        let Err(error) = build.remove("kvm_dlh") else {
            return failed(format!("kvm_dlh went away below {}", sample.module));
        };
        check!(error.to_string().contains("in use by"), "kvm_dlh did not go because: {error}");
        let account = sample.attach(&mut vm)?;
        check_eq!(account.get("calls")?, 1, "calls");
        build.remove(sample.module)?;
        build.samples.insert(sample.module)?;
    }
    build.remove(sample.module)?;
    build.remove("kvm_dlh")?;
    Ok(Verdict::Pass)
}

fn two_samples(build: &Build) -> CaseResult {
    let mut vm = Vm::new(VmConfig::default())?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let mut accounts = Vec::new();
    for sample in [IN_C, IN_RUST] {
        build.samples.insert(sample.module)?;
        accounts.push(sample.attach(&mut vm)?);
    }
    let late = Ending::Late(2);
    for lap in 1..=5 {
        let calls = [IN_C.call(1, late), IN_RUST.call(10, late), IN_C.call(2, Ending::AtOnce)];
        execute(&mut vm, &mut ring, &calls.map(|call| (call, 0)))?;
        check_eq!(accounts[0].get("sum")?, 3 * lap, "sum of {}", IN_C.module);
        check_eq!(accounts[1].get("sum")?, 10 * lap, "sum of {}", IN_RUST.module);
    }
    // One goes; the pending call of the other one is not affected.
    for (goes, stays, account) in [(IN_C, IN_RUST, 1), (IN_RUST, IN_C, 0)] {
        let (first, calls) = (ring.tail(), accounts[account].get("calls")?);
        ring.stage(&goes.call(1, Ending::Late(MOST_MS)))?;
        ring.stage(&stays.call(1, Ending::Late(LONG)))?;
        let mut vcpu = vm.vcpus.remove(0);
        with_vcpu(
            &mut vcpu,
            |vcpu| vcpu.publish(&mut ring, 0, Exit::Cpuid),
            || {
                accounts[account].wait("waiting", 1)?;
                accounts[1 - account].wait("waiting", 1)?;
                remove_at_once(build, goes)?;
                check_eq!(accounts[account].get("calls")?, calls, "calls of the one that stays");
                Ok(())
            },
        )?;
        vm.vcpus.push(vcpu);
        let statuses = [first, first + 1].map(|position| i64::from(ring.status(position)));
        check_eq!(statuses, [Error::Gone.to_rax(), 0], "statuses when {} went", goes.module);
        check_eq!(accounts[account].get("calls")?, calls + 1, "calls of the one that stays");
        let unknown = answer(Err(Error::Operation));
        let mixed = [(goes.call(1, late), unknown), (stays.call(1, late), 0)];
        execute(&mut vm, &mut ring, &mixed)?;
        build.samples.insert(goes.module)?;
        accounts[1 - account] = goes.attach(&mut vm)?;
    }
    vm.stats()?.check_law()?;
    Ok(Verdict::Pass)
}
