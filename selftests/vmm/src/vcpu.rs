// SPDX-License-Identifier: GPL-2.0

//! A vCPU whose guest does one command at a time.

use std::os::fd::{AsRawFd, RawFd};

use dlh_abi::{Call, Function, HYPERCALL_NR};
use kvm_bindings::{
    kvm_mp_state, kvm_msr_entry, kvm_regs, Msrs, KVM_EXIT_XEN, KVM_MP_STATE_RUNNABLE,
    KVM_RUN_X86_GUEST_MODE, KVM_RUN_X86_SMM,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::boot;
use crate::guest::{Code, PORT_DONE, PORT_TICK};
use crate::ktap::{failed, Result};
use crate::ring::Ring;

/// Why KVM_RUN returned to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The command has ended.
    Done,
    /// The guest used the port for exits in the middle of a command.
    Tick,
    Hlt,
    /// Access to guest-physical memory that is not there; a read got zeroes.
    Mmio {
        address: u64,
        write: bool,
    },
    /// A hypercall that KVM takes for one of Xen's, which the VMM is to answer.
    Xen {
        number: u64,
    },
    /// A signal, or an immediate exit.
    Interrupted,
    /// KVM_RUN failed with this errno.
    Error(i32),
}

/// An exit that a guest makes after it has published entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Pio,
    Cpuid,
    Hlt,
    /// The function FEATURES, which does nothing else.
    Hypercall,
    /// The function KICK for the ring that was published to.
    Kick,
}

impl Exit {
    /// All kinds.
    pub(crate) const ALL: [Exit; 5] =
        [Exit::Pio, Exit::Cpuid, Exit::Hlt, Exit::Hypercall, Exit::Kick];

    fn code(self) -> Code {
        match self {
            Exit::Pio => Code::ExitPio,
            Exit::Cpuid => Code::ExitCpuid,
            Exit::Hlt => Code::ExitHlt,
            Exit::Hypercall | Exit::Kick => Code::ExitHypercall,
        }
    }

    fn function(self) -> Function {
        if self == Exit::Kick {
            Function::Kick
        } else {
            Function::Features
        }
    }
}

/// What a guest that published saw right after its exit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Published {
    /// `done` of the ring.
    pub(crate) done: u32,
    /// RAX, if the exit was a hypercall.
    pub(crate) result: i64,
}

/// What a flood came to; see [`Vcpu::flood`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flooded {
    /// How the command stopped: [`Stop::Done`] when it got to its end or saw the ring detached.
    pub(crate) stop: Stop,
    /// The tail the guest has published.
    pub(crate) tail: u32,
    /// How often the guest found the ring full.
    pub(crate) full: u64,
}

/// A vCPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: VcpuFd,
    index: usize,
}

impl Vcpu {
    /// Takes a new vCPU to the server loop.
    pub(crate) fn new(fd: VcpuFd, index: usize) -> Result<Self> {
        let mut vcpu = Self { fd, index };
        vcpu.park()?;
        Ok(vcpu)
    }

    /// Its descriptor, to lend to another process.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Abandons whatever the vCPU is doing and waits in the server loop for the next command.
    pub(crate) fn park(&mut self) -> Result<()> {
        // Lets KVM complete the instruction that an exit interrupted, before it is abandoned.
        self.fd.set_kvm_immediate_exit(1);
        let stop = self.resume();
        self.fd.set_kvm_immediate_exit(0);
        if !matches!(stop, Ok(Stop::Interrupted)) {
            return failed(format!("an immediate exit gave {stop:?}"));
        }
        let mut sregs = self.fd.get_sregs()?;
        boot::set_mode(&mut sregs);
        self.fd.set_sregs(&sregs)?;
        // Not known without an in-kernel interrupt controller, and not needed then.
        let _ = self.fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE });
        self.fd.set_regs(&boot::registers_at_server(self.index))?;
        loop {
            match self.resume()? {
                Stop::Done => return Ok(()),
                Stop::Interrupted => (),
                stop => return failed(format!("before the server loop: {stop:?}")),
            }
        }
    }

    /// One KVM_RUN.
    pub(crate) fn resume(&mut self) -> Result<Stop> {
        let stop = match self.fd.run() {
            Ok(VcpuExit::IoOut(PORT_DONE, _)) => Stop::Done,
            Ok(VcpuExit::IoOut(PORT_TICK, _)) => Stop::Tick,
            Ok(VcpuExit::Hlt) => Stop::Hlt,
            Ok(VcpuExit::MmioRead(address, data)) => {
                data.fill(0);
                Stop::Mmio { address, write: false }
            }
            Ok(VcpuExit::MmioWrite(address, _)) => Stop::Mmio { address, write: true },
            Ok(VcpuExit::Unsupported(KVM_EXIT_XEN)) => {
                // SAFETY: After this exit the union holds a hypercall of Xen's, the only kind there is.
                let call = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.xen.u.hcall };
                Stop::Xen { number: call.input }
            }
            Ok(VcpuExit::Intr) => Stop::Interrupted,
            Ok(exit) => {
                let exit = format!("{exit:?}");
                let at = self.fd.get_regs()?.rip;
                return failed(format!("unexpected exit {exit} at {at:#x}"));
            }
            Err(error) if error.errno() == libc::EINTR => Stop::Interrupted,
            Err(error) => Stop::Error(error.errno()),
        };
        Ok(stop)
    }

    /// Gives the waiting guest a command, and runs it up to the first stop.
    pub(crate) fn begin(&mut self, code: Code, set: impl FnOnce(&mut kvm_regs)) -> Result<Stop> {
        let mut regs = self.fd.get_regs()?;
        set(&mut regs);
        regs.r15 = boot::code_address(code);
        self.fd.set_regs(&regs)?;
        self.resume()
    }

    /// Runs on until the command has ended, through the exits that are part of it.
    pub(crate) fn finish(&mut self, mut stop: Stop) -> Result<kvm_regs> {
        loop {
            match stop {
                Stop::Done => return Ok(self.fd.get_regs()?),
                // KVM_RUN may be interrupted by what the kernel has to do for this thread.
                Stop::Tick | Stop::Hlt | Stop::Interrupted => stop = self.resume()?,
                stop => return failed(format!("the guest stopped with {stop:?}")),
            }
        }
    }

    /// A hypercall with any number; returns RAX.
    pub(crate) fn raw_hypercall(&mut self, rax: u64, arguments: [u64; 4]) -> Result<i64> {
        let stop = self.begin(Code::Hypercall, |regs| set_hypercall(regs, rax, arguments))?;
        Ok(self.finish(stop)?.rax as i64)
    }

    /// A DLH hypercall; returns RAX.
    pub(crate) fn hypercall(&mut self, function: u64, rcx: u64, rdx: u64, rsi: u64) -> Result<i64> {
        self.raw_hypercall(HYPERCALL_NR, [function, rcx, rdx, rsi])
    }

    /// A DLH hypercall that the VMM must answer as it would one of Xen's; returns RAX.
    pub(crate) fn xen_hypercall(&mut self, arguments: [u64; 4], answer: u64) -> Result<i64> {
        let stop = self.begin_hypercall(arguments)?;
        if stop != (Stop::Xen { number: HYPERCALL_NR }) {
            return failed(format!("a hypercall stopped with {stop:?}, not as one of Xen's"));
        }
        self.finish_xen_hypercall(answer)
    }

    /// Answers what stopped with [`Stop::Xen`]; returns RAX.
    pub(crate) fn finish_xen_hypercall(&mut self, answer: u64) -> Result<i64> {
        // KVM passes it on at the next KVM_RUN.
        self.fd.get_kvm_run().__bindgen_anon_1.xen.u.hcall.result = answer;
        let stop = self.resume()?;
        Ok(self.finish(stop)?.rax as i64)
    }

    /// A DLH hypercall up to the first stop.
    pub(crate) fn begin_hypercall(&mut self, arguments: [u64; 4]) -> Result<Stop> {
        self.begin(Code::Hypercall, |regs| set_hypercall(regs, HYPERCALL_NR, arguments))
    }

    /// Has the guest write a model-specific register; one that it does not have ends the guest.
    pub(crate) fn write_msr(&mut self, register: u32, value: u64) -> Result<()> {
        let stop = self.begin(Code::WriteMsr, |regs| {
            (regs.rcx, regs.rax, regs.rdx) = (register.into(), value & 0xffff_ffff, value >> 32);
        })?;
        self.finish(stop).map(drop)
    }

    /// Whether the guest that runs is a nested one.
    pub(crate) fn is_nested(&mut self) -> bool {
        u32::from(self.fd.get_kvm_run().flags) & KVM_RUN_X86_GUEST_MODE != 0
    }

    /// Has the guest run the nested guest of the VMCB at `vmcb`, which takes the commands from then on;
    /// or, if that is who runs, has it end.
    pub(crate) fn vmrun(&mut self, vmcb: u64) -> Result<()> {
        let stop = self.begin(Code::Vmrun, |regs| regs.rax = vmcb)?;
        self.finish(stop).map(drop)
    }

    /// A DLH hypercall at privilege level 3.
    pub(crate) fn user_hypercall(&mut self, arguments: [u64; 4]) -> Result<i64> {
        let stop = self.begin(Code::User, |regs| {
            set_hypercall(regs, HYPERCALL_NR, arguments);
            regs.r14 = boot::code_address(Code::UserHypercall);
        })?;
        let level = self.fd.get_sregs()?.ss.dpl;
        if stop != Stop::Done || level != 3 {
            return failed(format!("a call from user mode stopped with {stop:?} at level {level}"));
        }
        let result = self.fd.get_regs()?.rax as i64;
        self.park()?;
        Ok(result)
    }

    /// A DLH hypercall in system management mode; EAX, as that is all of it there.
    pub(crate) fn smm_hypercall(&mut self, arguments: [u64; 4]) -> Result<i32> {
        self.fd.smi()?;
        let stop = self.begin(Code::Server, |regs| set_hypercall(regs, HYPERCALL_NR, arguments))?;
        let in_smm = u32::from(self.fd.get_kvm_run().flags) & KVM_RUN_X86_SMM != 0;
        if stop != Stop::Tick || !in_smm {
            return failed(format!("an SMI stopped with {stop:?}, in SMM: {in_smm}"));
        }
        let result = self.fd.get_regs()?.rax as i32;
        let stop = self.resume()?;
        if stop != Stop::Done {
            return failed(format!("on its way out of SMM the guest stopped with {stop:?}"));
        }
        Ok(result)
    }

    /// Makes the guest publish what was staged for `ring` since last time, burn `spins` rounds of a
    /// loop without an exit of its own, and then make an exit; runs up to the first stop.
    pub(crate) fn begin_publish(
        &mut self,
        ring: &mut Ring,
        spins: u64,
        then: Exit,
    ) -> Result<Stop> {
        let staged = ring.take_staged();
        let (gpa, mask, id) = (ring.gpa(), ring.entries() - 1, ring.id());
        self.begin(Code::Publish, |regs| {
            regs.rdi = gpa;
            regs.rsi = boot::STAGING as u64;
            regs.rcx = staged.count.into();
            regs.r8 = staged.position.into();
            regs.r9 = mask.into();
            regs.rbx = spins;
            regs.r11 = then.function() as u64;
            regs.r12 = if then == Exit::Kick { id } else { 0 };
            regs.r13 = 0;
            regs.r14 = boot::code_address(then.code());
        })
    }

    /// [`Vcpu::begin_publish`] to its end.
    pub(crate) fn publish(&mut self, ring: &mut Ring, spins: u64, then: Exit) -> Result<Published> {
        let stop = self.begin_publish(ring, spins, then)?;
        self.finish_publish(stop)
    }

    /// Runs what [`Vcpu::begin_publish`] began to its end.
    pub(crate) fn finish_publish(&mut self, stop: Stop) -> Result<Published> {
        let regs = self.finish(stop)?;
        Ok(Published { done: regs.rax as u32, result: regs.r13 as i64 })
    }

    /// Makes an exit without publishing anything.
    pub(crate) fn exit(&mut self, kind: Exit) -> Result<()> {
        let stop = self.begin_exit(kind)?;
        self.finish_exit(stop)
    }

    /// The same up to the first stop: KVM_RUN returns to the VMM once.
    pub(crate) fn begin_exit(&mut self, kind: Exit) -> Result<Stop> {
        // The code reads `done` of a ring at RDI; any mapped memory will do.
        self.begin(kind.code(), |regs| {
            (regs.rdi, regs.r11, regs.r12) = (boot::STAGING as u64, 0, 0);
        })
    }

    /// Runs what [`Vcpu::begin_exit`] began to its end.
    pub(crate) fn finish_exit(&mut self, stop: Stop) -> Result<()> {
        self.finish(stop).map(drop)
    }

    /// What the guest reads at `gpa`.
    pub(crate) fn load(&mut self, gpa: u64) -> Result<u32> {
        let stop = self.begin(Code::ExitCpuid, |regs| regs.rdi = gpa - 64)?;
        Ok(self.finish(stop)?.rax as u32)
    }

    /// Lets the guest write at `gpa`.
    pub(crate) fn store(&mut self, gpa: u64, value: u32) -> Result<()> {
        // A publication of no entries: only the tail is stored.
        let stop = self.begin(Code::Publish, |regs| {
            regs.rdi = gpa;
            (regs.rcx, regs.rbx) = (0, 0);
            regs.r8 = value.into();
            regs.r14 = boot::code_address(Code::Server);
        })?;
        self.finish(stop).map(drop)
    }

    /// Lets the guest fill `batch` slots and then make a hypercall that is not ours, `laps` times.
    /// Returns the ticks of its time-stamp counter for all of it, and for the filling alone.
    pub(crate) fn measure(
        &mut self,
        ring: &mut Ring,
        call: &Call,
        batch: u64,
        laps: u64,
    ) -> Result<(u64, u64)> {
        let (gpa, mask, cookie, tail) =
            (ring.gpa(), ring.entries() - 1, ring.cookie().0, ring.tail());
        let stop = self.begin(Code::Measure, |regs| {
            (regs.rdi, regs.rsi) = (gpa, mask.into());
            (regs.rbp, regs.r14) = (batch, laps);
            regs.r8 = tail.into();
            regs.r9 = call.op.0.into();
            (regs.r10, regs.r11, regs.r12) = (call.arg[0], call.arg[1], cookie);
        })?;
        let regs = self.finish(stop)?;
        let tail = ring.guest_tail();
        ring.set_producer_tail(tail);
        Ok((regs.rax, regs.rbx))
    }

    /// What the guest's time-stamp counter reads.
    pub(crate) fn tsc(&self) -> Result<u64> {
        let mut msrs = tsc_msr(0)?;
        if self.fd.get_msrs(&mut msrs)? != 1 {
            return failed("KVM does not tell the time-stamp counter");
        }
        Ok(msrs.as_slice()[0].data)
    }

    /// Sets the guest's time-stamp counter.
    pub(crate) fn set_tsc(&self, value: u64) -> Result<()> {
        if self.fd.set_msrs(&tsc_msr(value)?)? != 1 {
            return failed("KVM does not set the time-stamp counter");
        }
        Ok(())
    }

    /// Lets the guest exit with CPUID, `laps` times; returns the ticks of its time-stamp counter for that.
    pub(crate) fn measure_exit(&mut self, laps: u64) -> Result<u64> {
        let stop = self.begin(Code::MeasureExit, |regs| regs.r14 = laps)?;
        Ok(self.finish(stop)?.rax)
    }

    /// Lets the guest make a hypercall `laps` times; returns the ticks for that, and the last result.
    pub(crate) fn measure_hypercall(
        &mut self,
        number: u64,
        [function, rcx, rdx]: [u64; 3],
        laps: u64,
    ) -> Result<(u64, i64)> {
        let stop = self.begin(Code::MeasureHypercall, |regs| {
            (regs.rbp, regs.rbx) = (number, function);
            (regs.r10, regs.r11) = (rcx, rdx);
            regs.r14 = laps;
        })?;
        let regs = self.finish(stop)?;
        Ok((regs.rax, regs.r12 as i64))
    }

    /// Has the guest store to `gpa`, `laps` times; returns the ticks of its time-stamp counter for that.
    pub(crate) fn measure_store(&mut self, gpa: u64, laps: u64) -> Result<u64> {
        let stop = self.begin(Code::MeasureStore, |regs| (regs.rdi, regs.r14) = (gpa, laps))?;
        Ok(self.finish(stop)?.rax)
    }

    /// Takes what KVM has put aside of stores to coalesced MMIO; returns how many they were.
    pub(crate) fn take_coalesced(&mut self) -> Result<u64> {
        self.fd.map_coalesced_mmio_ring()?;
        let mut count = 0;
        while self.fd.coalesced_mmio_read()?.is_some() {
            count += 1;
        }
        Ok(count)
    }

    /// Has the guest fill one slot and wait until it is done, again and again, as many times as there are
    /// words at `place`: the ticks of its time-stamp counter for each wait go there. It spins `step` ticks
    /// longer between two each time, and at most `most`.
    pub(crate) fn sample_waits(
        &mut self,
        ring: &mut Ring,
        call: &Call,
        (place, samples): (u64, u64),
        (step, most): (u64, u64),
    ) -> Result<()> {
        self.sample(Code::SampleWait, ring, call, (place, samples), (most, step))
    }

    /// Has the guest fill `batch` slots and exit, again and again, as many times as there are words at
    /// `place`: the ticks for each exit go there.
    pub(crate) fn sample_exits(
        &mut self,
        ring: &mut Ring,
        call: &Call,
        (place, samples): (u64, u64),
        batch: u64,
    ) -> Result<()> {
        self.sample(Code::SampleExit, ring, call, (place, samples), (batch, 0))
    }

    /// Has the guest fill one slot and halt, again and again, `samples` times. The first argument of each
    /// entry is the time-stamp counter just before.
    pub(crate) fn sample_idle(&mut self, ring: &mut Ring, call: &Call, samples: u64) -> Result<()> {
        self.sample(Code::SampleIdle, ring, call, (0, samples), (0, 0))
    }

    /// How many ticks its time-stamp counter makes in a millisecond.
    pub(crate) fn tsc_khz(&self) -> Result<u32> {
        Ok(self.fd.get_tsc_khz()?)
    }

    fn sample(
        &mut self,
        code: Code,
        ring: &mut Ring,
        call: &Call,
        (place, samples): (u64, u64),
        (rbp, r13): (u64, u64),
    ) -> Result<()> {
        let (gpa, mask, cookie, tail) =
            (ring.gpa(), ring.entries() - 1, ring.cookie().0, ring.tail());
        let stop = self.begin(code, |regs| {
            (regs.rdi, regs.rsi) = (gpa, mask.into());
            (regs.rbx, regs.r14) = (place, samples);
            (regs.rbp, regs.r13) = (rbp, r13);
            (regs.r8, regs.r9) = (tail.into(), call.op.0.into());
            (regs.r10, regs.r11, regs.r12) = (call.arg[0], call.arg[1], cookie);
        })?;
        self.finish(stop)?;
        let tail = ring.guest_tail();
        ring.set_producer_tail(tail);
        Ok(())
    }

    /// Lets the guest produce `count` times the same entry by itself. `on_stop` sees each stop that
    /// is not an end, and says whether to go on; if not, the vCPU is parked.
    pub(crate) fn flood(
        &mut self,
        ring: &mut Ring,
        call: &Call,
        count: u64,
        mut on_stop: impl FnMut(Stop) -> bool,
    ) -> Result<Flooded> {
        let (gpa, mask, cookie, tail) =
            (ring.gpa(), ring.entries() - 1, ring.cookie().0, ring.tail());
        let mut stop = self.begin(Code::Flood, |regs| {
            regs.rdi = gpa;
            regs.rsi = mask.into();
            regs.rbp = count;
            regs.r8 = tail.into();
            regs.r9 = call.op.0.into();
            (regs.r10, regs.r11) = (call.arg[0], call.arg[1]);
            regs.r12 = cookie;
            regs.r13 = 0;
        })?;
        while stop != Stop::Done && on_stop(stop) {
            stop = self.resume()?;
        }
        let regs = self.fd.get_regs()?;
        if stop != Stop::Done {
            self.park()?;
        }
        // R8D may be one ahead, where the guest was stopped just before it stored that.
        let tail = ring.guest_tail();
        ring.set_producer_tail(tail);
        Ok(Flooded { stop, tail, full: regs.r13 })
    }
}

fn tsc_msr(data: u64) -> Result<Msrs> {
    const IA32_TSC: u32 = 0x10;
    let msr = kvm_msr_entry { index: IA32_TSC, data, ..Default::default() };
    Msrs::from_entries(&[msr]).map_err(|e| format!("{e:?}").into())
}

fn set_hypercall(regs: &mut kvm_regs, rax: u64, [rbx, rcx, rdx, rsi]: [u64; 4]) {
    (regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi) = (rax, rbx, rcx, rdx, rsi);
}
