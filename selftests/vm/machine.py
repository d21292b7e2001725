# SPDX-License-Identifier: GPL-2.0
"""L1, the host under test: the stock kernel with the Debian root, under QEMU."""

from __future__ import annotations

import fcntl
import itertools
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .initramfs import Initramfs, ModuleTree
from .kernel_log import Finding, scan_file
from .patience import BOOT_SILENCE, PATIENCE, SILENCE, SLOW

REPOSITORY = Path("/src/kvm-dlh")
# tools/enter shows the root here without what is mounted in it
ROOT_IMAGE = Path("/root-image")
MODULES = ("9p", "9pnet_virtio", "overlay")
# The stock kernel, emulated on several CPUs, was seen to hang while it brings them up, once in some hundred
# boots. Nothing of this project is in it by then, so that says nothing: it is booted once more.
BOOTS = 3


@dataclass(frozen=True)
class Options:
    """What can be chosen about L1."""

    smp: int = 2
    mem: str = "6G"
    icount: bool = False
    """Whether instructions are counted as time, on all CPUs together."""
    timeout: float = 7200.0
    """Seconds after which it is given up, whatever it says."""
    silence: float = SILENCE
    """Seconds without a sign of life after which it is given up: no output, and no line in a kernel's log."""
    suspend: bool = False
    """Whether L1's devices outlive being suspended (not hibernation, that resets them)."""
    one_thread: bool = False
    """Whether the emulator runs all CPUs in one thread: slower, and without the races of its own."""
    append: str = ""
    qemu: tuple[str, ...] = ()


@dataclass
class Outcome:
    """How a run of L1 ended."""

    seconds: float
    status: int | None = None
    """Exit status of the command, if L1 lived to tell."""
    problem: str = ""
    """Why the run is no good, whatever the command said."""
    findings: dict[Path, list[Finding]] = field(default_factory=dict)
    boots: int = 1
    """How often it was booted."""

    def good(self) -> bool:
        return self.status == 0 and not self.problem and not self.findings


class Machine:
    """One run of L1. Its logs go to `results`: kernel.log, output.log, qemu.log, and share/, which
    is /results inside."""

    def __init__(self, results: Path, options: Options) -> None:
        self.results = results
        self.options = options
        self.kernel = Path("/kernel") / os.environ["KREL"]
        self.kernel_log = results / "kernel.log"
        self.output_log = results / "output.log"
        self.qemu_log = results / "qemu.log"
        self.share = results / "share"

    def run(self, command: str, on_line: Callable[[str], None]) -> Outcome:
        """Boots L1, runs a shell command in it, and passes on each line it prints."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with (self.results.parent / f".{self.results.name}.lock").open("w") as lock:
            # Two runs of the same test would write to the same logs.
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._run_locked(command, on_line)

    def _run_locked(self, command: str, on_line: Callable[[str], None]) -> Outcome:
        for boots in range(1, BOOTS + 1):
            outcome = self._run_once(command, on_line)
            outcome.boots = boots
            if (self.share / "booted").exists():
                break
        return outcome

    def _run_once(self, command: str, on_line: Callable[[str], None]) -> Outcome:
        shutil.rmtree(self.results, ignore_errors=True)
        self.share.mkdir(parents=True)
        icount = "export VM_ICOUNT=1\n" if self.options.icount else ""
        (self.share / "command").write_text(icount + command)
        self.output_log.touch()
        arguments = self._arguments(self._initramfs())
        started = time.monotonic()
        with self.qemu_log.open("wb") as log:
            log.write((shlex.join(arguments) + "\n").encode())
            log.flush()
            qemu = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            given_up = self._follow(qemu, started + self.options.timeout, on_line)
        finally:
            if qemu.poll() is None:
                qemu.kill()
            qemu.wait()
        outcome = Outcome(time.monotonic() - started)
        status = self.share / "exit-status"
        if status.exists():
            outcome.status = int(status.read_text())
        if not (self.share / "booted").exists():
            outcome.problem = "did not boot"
        elif given_up:
            outcome.problem = f"given up after {outcome.seconds:.0f} s: {given_up}"
        elif outcome.status is None:
            outcome.problem = f"ended without an exit status (QEMU's was {qemu.returncode})"
        for path in (self.kernel_log, *sorted(self.share.glob("guest*.log"))):
            if found := scan_file(path):
                outcome.findings[path] = found
        return outcome

    def log_tails(self, lines: int = 40) -> str:
        """The ends of the logs, for a run that went wrong."""
        parts = []
        for path in (self.qemu_log, self.kernel_log, self.output_log):
            text = path.read_text(errors="replace") if path.exists() else ""
            if path == self.qemu_log:
                # without its command line, and what no emulated CPU has
                text = "\n".join(line for line in text.splitlines()[1:] if "TCG doesn't support" not in line)
            tail = [line.rstrip() for line in text.splitlines()[-lines:]]
            parts.append("\n".join((f"--- end of {path.relative_to(REPOSITORY)}", *tail)))
        return "\n".join(parts)

    def _follow(self, qemu: subprocess.Popen[bytes], deadline: float, on_line: Callable[[str], None]) -> str:
        """Passes on the output until QEMU ends; if L1 is given up before, why."""
        rest, last, written = b"", time.monotonic(), 0
        booted, boot_deadline = False, time.monotonic() + PATIENCE
        with self.output_log.open("rb") as output:
            while True:
                # In this order: what was written before the end is still read.
                ended = qemu.poll() is not None
                now = time.monotonic()
                rest += output.read()
                *complete, rest = rest.split(b"\n")
                for line in complete:
                    on_line(line.decode(errors="replace"))
                if (size := self._written()) != written:
                    written, last = size, now
                booted = booted or (self.share / "booted").exists()
                silence = self.options.silence if booted else BOOT_SILENCE
                problem = ""
                if now > last + silence:
                    problem = f"no sign of life for {silence:.0f} s"
                elif now > deadline or (not booted and now > boot_deadline):
                    problem = "the time is up"
                if ended or problem:
                    if rest:
                        on_line(rest.decode(errors="replace"))
                    return "" if ended else problem
                time.sleep(0.1)

    def _written(self) -> int:
        """The bytes in what L1 and its guests write: they grow as long as something happens."""
        logs = (self.output_log, self.kernel_log, *self.share.glob("*.log"))
        return sum(path.stat().st_size for path in logs if path.exists())

    def _initramfs(self) -> Path:
        image = Initramfs((REPOSITORY / "selftests/vm/l1-init").read_text())
        for path in ModuleTree(self.kernel / "modules" / self.kernel.name).load_order(MODULES):
            image.add_module(path)
        target = self.results / "initramfs.cpio"
        image.write(target)
        return target

    def _arguments(self, initramfs: Path) -> list[str]:
        options = self.options
        accel = subprocess.run(
            [REPOSITORY / "tools/accel"], check=True, capture_output=True, text=True
        ).stdout.strip()
        command_line = "console=ttyS0 loglevel=8 panic=-1 oops=panic"
        if options.icount:
            # Instruction counts need one thread, and the kernel at the same place.
            accel_options = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-cpu", "EPYC"]
            command_line += " nokaslr"
        elif accel == "kvm":
            accel_options = ["-accel", "kvm", "-cpu", "host"]
        else:
            threads = "single" if options.one_thread else "multi"
            accel_options = ["-accel", f"tcg,thread={threads}", "-cpu", "EPYC"]
        ports = itertools.count(1)

        def virtio(device: str) -> tuple[str, ...]:
            if not options.suspend:
                return ("-device", device)
            # 9p's driver cannot set a device up again, and the serial port's loses the state of its host.
            # They need not if the device keeps its own; for that it has to be behind a port.
            port = next(ports)
            return (
                *("-device", f"pcie-root-port,id=port{port},chassis={port}"),
                *("-device", f"{device},bus=port{port},x-pcie-pm-no-soft-reset=on"),
            )

        def share(tag: str, path: Path, writable: bool) -> tuple[str, ...]:
            readonly = "off" if writable else "on"
            local = f"local,id={tag},path={path},security_model=none,multidevs=remap,readonly={readonly}"
            return ("-fsdev", local, *virtio(f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"))

        return [
            "qemu-system-x86_64",
            *("-M", "q35", "-nodefaults", "-display", "none", "-no-reboot", "-run-with", "exit-with-parent=on"),
            *accel_options,
            *("-smp", str(options.smp), "-m", options.mem),
            *("-kernel", str(self.kernel / "vmlinuz"), "-initrd", str(initramfs)),
            *("-append", f"{command_line} {SLOW} {options.append}".strip()),
            *("-serial", f"file:{self.kernel_log}"),
            *virtio("virtio-serial-pci"),
            *("-chardev", f"file,id=output,path={self.output_log}", "-device", "virtserialport,chardev=output"),
            *share("root", ROOT_IMAGE, writable=False),
            *share("repository", REPOSITORY, writable=False),
            *share("kernel", Path("/kernel"), writable=False),
            *share("results", self.share, writable=True),
            *options.qemu,
        ]
