// SPDX-License-Identifier: GPL-2.0

//! VMs whose descriptors another process has, too: it can do nothing with them but keep the VM there when
//! its creator is gone.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dlh_abi::{Call, Operation};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::ktap::{check, check_eq, failed, Case, CaseResult, Result, Verdict};
use crate::memory::{Backing, Mapping};
use crate::ring::{Ring, NOP};
use crate::stats::{self, Stats};
use crate::thread::{wait_until, PATIENCE};
use crate::vcpu::{Exit, Stop};
use crate::vm::{Vm, VmConfig, BASE};

/// Memory that the lender's guest reports.
const PLACE: u64 = 0x2000_0000;
const LEN: usize = 8 << 20;
/// Entries that the lender leaves in its ring.
const LEFT: u32 = 5;
/// What the lender is told to do.
const RUN: u8 = b'r';
const FLOOD: u8 = b'f';
const REPORT: u8 = b'p';

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("another process can do nothing with a VM", refused),
        Case::new("a VM with entries left outlives its creator", || outlives(None)),
        Case::new("a VM in a flood outlives its creator", || outlives(Some(FLOOD))),
        Case::new("a VM in a flood of reports outlives its creator", || outlives(Some(REPORT))),
    ]
}

/// The process that lends: makes a VM, leaves entries in its ring, sends its descriptors to standard input,
/// and does what it is told there.
pub(crate) fn lend() -> Result<()> {
    // SAFETY: The test that started this process has put one end of a pair of sockets there.
    let mut borrower = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    let mut vm = Vm::new(VmConfig::default())?;
    vm.add_memory(PLACE, Mapping::new(Backing::Anonymous, LEN)?)?;
    let mut ring = Ring::set_up(&mut vm, 0, BASE, 64, 0)?;
    let report = Call { op: Operation::FREE_PAGES, arg: [PLACE, LEN as u64] };
    // The bridge gets to know a VM by its first report.
    ring.push(&report, 1)?;
    vm.vcpus[0].exit(Exit::Pio)?;
    ring.push(&NOP, LEFT)?;
    for descriptor in [vm.descriptor(), vm.vcpus[0].descriptor()] {
        borrower.send_with_fd(&[0u8][..], descriptor)?;
    }
    let mut word = [0];
    while borrower.read(&mut word)? == 1 {
        match word[0] {
            RUN => {
                vm.vcpus[0].exit(Exit::Pio)?;
                check_eq!(ring.done(), ring.tail(), "done after the exit");
            }
            what => {
                borrower.write_all(&[what])?;
                let call = if what == FLOOD { NOP } else { report };
                loop {
                    vm.vcpus[0].flood(&mut ring, &call, u64::MAX, |stop| stop == Stop::Tick)?;
                }
            }
        }
        borrower.write_all(&word)?;
    }
    Ok(())
}

/// A process that is killed at the latest when the test is over.
struct Victim(Child);

impl Victim {
    fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// A lender, and what it has lent.
struct Lender {
    process: Victim,
    socket: UnixStream,
    vm: VmFd,
    vcpu: VcpuFd,
}

impl Lender {
    fn new() -> Result<Self> {
        let (mut socket, theirs) = UnixStream::pair()?;
        let process = Command::new(std::env::current_exe()?)
            .arg("lend")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()?;
        let kvm = Kvm::new()?;
        let (vm, vcpu) = (receive(&mut socket)?, receive(&mut socket)?);
        // SAFETY: A descriptor of a VM that is ours alone in this process.
        let vm = unsafe { kvm.create_vmfd_from_rawfd(vm.into_raw_fd()) }?;
        // SAFETY: As above, of a vCPU.
        let vcpu = unsafe { vm.create_vcpu_from_rawfd(vcpu.into_raw_fd()) }?;
        Ok(Self { process: Victim(process), socket, vm, vcpu })
    }

    fn pid(&self) -> u32 {
        self.process.0.id()
    }

    fn stats(&self) -> Result<Stats> {
        stats::of_process("kvm_dlh", self.pid())
    }

    /// Tells the lender what to do, and waits until it says that it does, or has done, that.
    fn tell(&mut self, what: u8) -> Result<()> {
        self.socket.write_all(&[what])?;
        let mut answer = [0];
        self.socket.read_exact(&mut answer)?;
        check_eq!(answer, [what], "what the lender answered");
        Ok(())
    }

    /// Checks that this process can neither run nor change anything.
    fn check_refused(&mut self) -> Result<()> {
        let memory = Mapping::new(Backing::Anonymous, LEN)?;
        let region = kvm_userspace_memory_region {
            slot: 7,
            guest_phys_addr: 0x7000_0000,
            memory_size: LEN as u64,
            userspace_addr: memory.address(),
            ..Default::default()
        };
        // SAFETY: If it was not refused, the guest would have this memory, which nobody else uses.
        let added = unsafe { self.vm.set_user_memory_region(region) };
        let errors = [
            ("KVM_RUN", self.vcpu.run().map(drop)),
            ("KVM_GET_REGS", self.vcpu.get_regs().map(drop)),
            ("KVM_SMI", self.vcpu.smi()),
            ("KVM_CREATE_VCPU", self.vm.create_vcpu(7).map(drop)),
            ("KVM_SET_USER_MEMORY_REGION", added),
        ];
        for (name, result) in errors {
            let errno = result.err().map(|error| error.errno());
            check_eq!(errno, Some(libc::EIO), "{name} in another process than the creator's");
        }
        Ok(())
    }
}

fn receive(socket: &mut UnixStream) -> Result<File> {
    match socket.recv_with_fd(&mut [0]) {
        Ok((1, Some(file))) => Ok(file),
        Ok(other) => failed(format!("the lender sent {other:?}")),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

fn refused() -> CaseResult {
    let mut lender = Lender::new()?;
    let before = lender.stats()?;
    for _ in 0..3 {
        lender.check_refused()?;
    }
    // Not one counter; in particular the entries that wait in the ring are not executed.
    check_eq!(lender.stats()?, before, "statistics of the VM");
    lender.tell(RUN)?;
    let after = lender.stats()?;
    check_eq!(after.since(&before, "executed")?, LEFT.into(), "entries the VM executed itself");
    after.check_law()?;
    Ok(Verdict::Pass)
}

fn outlives(doing: Option<u8>) -> CaseResult {
    let known = |pid| {
        ["kvm_dlh", "ksm_bridge"]
            .map(|module| stats::directories(module, pid).map_or(9, |d| d.len()))
    };
    for round in 0..6 {
        let mut lender = Lender::new()?;
        let pid = lender.pid();
        check_eq!(known(pid), [1, 1], "VMs the modules know of the creator");
        let before = lender.stats()?;
        if let Some(what) = doing {
            lender.tell(what)?;
            std::thread::sleep(Duration::from_millis(5 * round));
        }
        lender.process.kill()?;
        check_eq!(known(pid), [1, 1], "VMs the modules know of the creator that is gone");
        wait_until(PATIENCE, "nothing is pending", || {
            lender.stats().and_then(|stats| stats.get("pending")).is_ok_and(|n| n == 0)
        })?;
        let after = lender.stats()?;
        after.check_law()?;
        let executed = after.since(&before, "executed")?;
        check!(doing.is_some() || executed == 0, "{executed} entries executed, and nobody ran it");
        lender.check_refused()?;
        std::thread::sleep(Duration::from_millis(20));
        check_eq!(lender.stats()?, after, "statistics a while after the creator's end");

        // Whichever is the last one takes the VM with it.
        let Lender { vm, vcpu, .. } = lender;
        let last: Box<dyn std::any::Any> = if round % 2 == 0 {
            drop(vm);
            Box::new(vcpu)
        } else {
            drop(vcpu);
            Box::new(vm)
        };
        std::thread::sleep(Duration::from_millis(20));
        check_eq!(known(pid), [1, 1], "VMs the modules know while one descriptor is left");
        drop(last);
        wait_until(PATIENCE, "the modules have forgotten the VM", || known(pid) == [0, 0])?;
    }
    Ok(Verdict::Pass)
}
