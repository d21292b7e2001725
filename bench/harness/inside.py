# SPDX-License-Identifier: GPL-2.0
"""What the cases use inside L1: printing figures, and telling the host's instructions from a guest's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from vm.guest import Guest
from vm.host import insert_host_modules, workers

BINARIES = Path("/src/kvm-dlh/build/bin")
TRACING = Path("/sys/kernel/tracing")
RESULTS = Path("/results")
# Set by bench/run --profile: a case does once what is to be looked at, and ends.
PROFILING = "BENCH_PROFILE" in os.environ
# What a guest asks the host for, beside hypercalls, of which KVM's own counter has all.
ASKED = ("kvm/kvm_pio", "kvm/kvm_mmio", "kvm/kvm_fast_mmio")
# The exit status of a case that has looked, and has no figure to give: it is not run again.
NO_FIGURE = 3


def figure(name: str, value: float) -> None:
    """Says what was measured."""
    print(f"figure {name} {value:.6g}" if isinstance(value, float) else f"figure {name} {value}", flush=True)


@contextmanager
def profiled(guest: Guest | None = None) -> Iterator[None]:
    """What is done meanwhile is what bench/run --profile shows. The guest's kernel must be where the host's is."""
    if PROFILING:
        kallsyms = Path("/proc/kallsyms").read_text()
        (RESULTS / "kallsyms").write_text(kallsyms)
        if guest:
            modules = guest.check("sed -n '/dlh_guest\\|balloon\\|empty_reporter/p' /proc/kallsyms")
            core = "".join(line for line in kallsyms.splitlines(keepends=True) if "[" not in line)
            (RESULTS / "kallsyms.guest").write_text(core + modules)
        print("profile begin", flush=True)
        while not (RESULTS / "profiling").exists():
            time.sleep(0.05)
    yield
    if PROFILING:
        print("profile end", flush=True)


def vmm(*arguments: str) -> dict[str, float]:
    """The `name value` lines that dlh-vmm prints; its remarks are passed on."""
    command = [BINARIES / "dlh-vmm", *arguments]
    values = {}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        for line in run.stdout:
            if line.startswith("#"):
                print(line, end="", flush=True)
            else:
                name, value = line.split()
                values[name] = float(value)
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command)
    return values


def no_figure(why: str) -> NoReturn:
    """Ends the case: what it looked for is not so."""
    print(why)
    sys.exit(NO_FIGURE)


def insert(*modules: str) -> None:
    """Inserts the host's modules; all of them if none is named. No limit in time: here that is instructions."""
    if not modules:
        insert_host_modules()
    for module in modules:
        subprocess.run(["insmod", f"/src/kvm-dlh/build/modules/{module}.ko"], check=True)


def idle_waits() -> list[int]:
    """How long entries waited that a guest wrote right before it halted, in ticks of the time-stamp counter."""
    (TRACING / "trace_clock").write_text("x86-tsc")
    event = TRACING / "events/kvm_dlh/kvm_dlh_guest_event/enable"
    event.write_text("1")
    try:
        offset = int(vmm("idle")["tsc_offset"])
        text = (TRACING / "trace").read_text()
    finally:
        event.write_text("0")
        (TRACING / "trace_clock").write_text("local")
    found = re.findall(r" (\d+): kvm_dlh_guest_event: .* payload 0x(\w+) ", text)
    if len(found) != 1000:
        raise RuntimeError(f"of 1000 events {len(found)} are in the trace")
    return [int(executed) + offset - int(written, 16) for executed, written in found]


def executed(pid: int) -> int:
    """Instructions that all threads of a VMM have executed, those of its guest and of our workers for it included
    (sum_exec_runtime, whose nanoseconds are instructions here)."""
    stats = [*Path(f"/proc/{pid}/task").glob("*/schedstat")]
    stats += [Path(f"/proc/{worker}/schedstat") for worker in workers(pid)]
    return sum(int(stat.read_text().split()[0]) for stat in stats)


class GuestInstructions:
    """Counts what a VMM's vCPUs execute in the guest: from each kvm_entry to the kvm_exit after it.

    Beside that, how often the guest does PIO and MMIO, that which ends in the kernel included, as a virtio device's
    notifications do: KVM's own counters leave it out.

    A few instructions of the host on either side are counted, too, and the host's own count grows while this is on.
    """

    def __enter__(self) -> Self:
        (TRACING / "synthetic_events").write_text("dlh_bench u64 ns")
        self._trigger("kvm/kvm_entry", "hist:keys=common_pid:begin=common_timestamp")
        self._trigger(
            "kvm/kvm_exit",
            "hist:keys=common_pid:ns=common_timestamp-$begin:onmatch(kvm.kvm_entry).dlh_bench($ns)",
        )
        self._trigger("synthetic/dlh_bench", "hist:keys=common_pid:vals=ns")
        for event in ASKED:
            self._trigger(event, "hist:keys=common_pid")
        return self

    def count(self, pid: int) -> tuple[int, int]:
        """Instructions so far, and in how many entries, of a VMM's threads."""
        threads = {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}
        text = (TRACING / "events/synthetic/dlh_bench/hist").read_text()
        found = re.findall(r"\{ common_pid:\s+(\d+) \} hitcount:\s+(\d+)\s+ns:\s+(\d+)", text)
        mine = [(int(ns), int(hits)) for thread, hits, ns in found if int(thread) in threads]
        return sum(ns for ns, _ in mine), sum(hits for _, hits in mine)

    def asked(self, pid: int) -> int:
        """How often the guest has done PIO or MMIO."""
        threads = {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}
        texts = ((TRACING / "events" / event / "hist").read_text() for event in ASKED)
        found = (hit for text in texts for hit in re.findall(r"\{ common_pid:\s+(\d+) \} hitcount:\s+(\d+)", text))
        return sum(int(hits) for thread, hits in found if int(thread) in threads)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in (*ASKED, "synthetic/dlh_bench", "kvm/kvm_exit", "kvm/kvm_entry"):
            trigger = TRACING / "events" / event / "trigger"
            active = [line for line in trigger.read_text().splitlines() if not line.startswith("#")]
            for line in active:
                trigger.write_text(f"!{line.split(' [')[0]}")
        # Opened to be written anew: that removes what there is.
        (TRACING / "synthetic_events").write_text("")

    @staticmethod
    def _trigger(event: str, what: str) -> None:
        (TRACING / "events" / event / "trigger").write_text(what)


def quiet(guest: Guest, seconds: float = 3, slack_kib: int = 512, timeout: float = 240) -> None:
    """Waits until a guest's footprint has not changed for some seconds; says so if that takes long."""
    deadline, last, since = time.monotonic() + timeout, -(1 << 40), time.monotonic()
    said = since
    while time.monotonic() - since < seconds:
        now = guest.rss_kib()
        if abs(now - last) > slack_kib:
            last, since = now, time.monotonic()
        if time.monotonic() > said + 8:
            said = time.monotonic()
            print(f"settling, {now >> 10} MiB", flush=True)
        if time.monotonic() > deadline:
            raise TimeoutError(f"the footprint of {guest.name} still changes after {timeout} s")
        time.sleep(0.2)


def sample(value: Callable[[], float], until: Callable[[], bool], pause: float) -> list[tuple[float, float]]:
    """(seconds, value) from now on, every `pause` seconds, until it is over."""
    begin, samples = time.monotonic(), []
    while True:
        samples.append((time.monotonic() - begin, value()))
        if until():
            return samples
        time.sleep(pause)
