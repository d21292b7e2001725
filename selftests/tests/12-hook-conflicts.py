#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=240
"""Somebody else is at the functions that the module hooks.

An owner, who may send a function elsewhere, is one at a time (ftrace's IPMODIFY; live patches are such):
whoever comes second is refused, and the first goes on. Tracers that only look are not in the way, and the
module is not in theirs, whichever comes first.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from vm import ktap
from vm.patience import wait_until

BUILD = Path("/src/kvm-dlh/build")
TRACING = Path("/sys/kernel/tracing")
FUNCTION = "____kvm_emulate_hypercall"
VMM = str(BUILD / "bin/dlh-vmm")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)


def insert(name: str) -> subprocess.CompletedProcess[str]:
    folder = "modules" if name == "kvm_dlh" else "test-modules"
    return run("insmod", BUILD / folder / f"{name}.ko")


def is_loaded(name: str) -> bool:
    return Path("/sys/module", name).exists()


def traces() -> set[str]:
    """What would show that a module is, or has been, there."""
    lines = [*(TRACING / "enabled_functions").read_text().splitlines(), *Path("/proc/modules").read_text().splitlines()]
    for directory in (Path("/sys/kernel/debug"), Path("/sys/kernel/livepatch")):
        lines += map(str, directory.glob("*"))
    return set(lines)


def messages() -> list[str]:
    """The module's own lines in the log since the last call, those of loading any module excepted."""
    lines = run("dmesg", "-c").stdout.splitlines()
    return [line for line in lines if "kvm_dlh: " in line and "taint" not in line]


def calls_work() -> bool:
    """A guest's ring, KICK and other hypercalls."""
    results = [
        run(VMM, "ktap", "--only", "KICK", "ring"),
        run(VMM, "ktap", "discovery", "--expect-features=27"),
    ]
    for result in results:
        if result.returncode:
            ktap.comment(result.stdout + result.stderr)
    return not any(result.returncode for result in results)


def stock_host() -> bool:
    return run(VMM, "ktap", "discovery", "--expect-absent").returncode == 0


# Owners.


def hook_holder_works() -> bool:
    """It sees the hypercalls, and leaves them alone."""
    seen = Path("/sys/module/hook_holder/parameters/seen")
    before = int(seen.read_text())
    return stock_host() and int(seen.read_text()) > before


def live_patch_works() -> bool:
    """Its answers are not those of a stock host."""
    return not stock_host()


def hook_holder_goes() -> None:
    run("rmmod", "hook_holder")


def live_patch_goes() -> None:
    """A live patch is disabled, and can be removed when no task is in patched code any more."""
    state = Path("/sys/kernel/livepatch/live_patch")
    settle_live_patch()
    (state / "enabled").write_text("0")
    wait_until(lambda: not state.exists())
    run("rmmod", "live_patch")


def settle_live_patch() -> None:
    """Waits until every task has gone over to the patched code."""
    transition = Path("/sys/kernel/livepatch/live_patch/transition")
    wait_until(lambda: not transition.exists() or transition.read_text() == "0\n")


def owner_first(name: str, works: Callable[[], bool], goes: Callable[[], None]) -> None:
    inserted = insert(name)
    ktap.equal(inserted.returncode, 0, f"{name} goes in")
    settle_live_patch()
    before = traces()
    messages()
    refused = insert("kvm_dlh")
    ktap.ok("Device or resource busy" in refused.stderr, f"kvm_dlh is refused after {name}", refused.stderr)
    said = messages()
    ktap.equal(len(said), 1, "with one line in the log")
    ktap.ok(re.search(rf" {FUNCTION} is owned by another", said[0] if said else ""), "which names the function", *said)
    ktap.equal(traces() ^ before, set(), "and nothing stays behind")
    ktap.ok(works(), f"{name} goes on working")
    goes()
    ktap.ok(not is_loaded(name), f"{name} is removed")
    ktap.equal(insert("kvm_dlh").returncode, 0, "kvm_dlh goes in then")
    ktap.ok(calls_work(), "and works")
    run("rmmod", "kvm_dlh")


def owner_second(name: str, goes: Callable[[], None]) -> None:
    insert("kvm_dlh")
    before = traces()
    refused = insert(name)
    ktap.ok("Device or resource busy" in refused.stderr, f"{name} is refused after kvm_dlh", refused.stderr)
    ktap.equal(traces() ^ before, set(), "and nothing stays behind")
    ktap.ok(calls_work(), "and kvm_dlh goes on working")
    run("rmmod", "kvm_dlh")
    ktap.equal(insert(name).returncode, 0, f"{name} goes in when kvm_dlh has gone")
    goes()
    ktap.ok(not is_loaded(name) and stock_host(), "and leaves a stock host")


def switch_off() -> None:
    """All of ftrace at once: the kernel does not do that below a hook that somebody relies on, or at all."""
    insert("kvm_dlh")
    switch = Path("/proc/sys/kernel/ftrace_enabled")
    try:
        switch.write_text("0")
    except OSError as error:
        ktap.comment(f"the kernel says: {error.strerror}")
    ktap.ok(calls_work(), "ftrace is not switched off below kvm_dlh")
    if switch.read_text() != "1\n":
        switch.write_text("1")
    run("rmmod", "kvm_dlh")


# Tracers.


def trace_file(name: str, text: str) -> None:
    (TRACING / name).write_text(text)


class Tracer:
    """One that looks at the functions, and leaves lines with a mark in the trace."""

    name = ""
    mark = FUNCTION

    def on(self) -> None: ...

    def off(self) -> None: ...

    def seen(self) -> int:
        """How many lines, since the last call."""
        text = (TRACING / "trace").read_text()
        trace_file("trace", "")
        return sum(self.mark in line for line in text.splitlines() if not line.startswith("#"))


class Function(Tracer):
    """ftrace's own tracers of functions: of the one that we take over, and of the one that we watch."""

    def __init__(self, name: str) -> None:
        self.name, self.tracer = f"the {name} tracer", name

    def on(self) -> None:
        trace_file("set_ftrace_filter", f"{FUNCTION}\nkvm_arch_destroy_vm\n")
        trace_file("current_tracer", self.tracer)

    def off(self) -> None:
        trace_file("current_tracer", "nop")
        trace_file("set_ftrace_filter", "")


class Probe(Tracer):
    """A kprobe, at the entry or at the return of the function."""

    mark = "dlh_probe:"

    def __init__(self, kind: str, name: str) -> None:
        self.name, self.kind = name, kind

    def on(self) -> None:
        trace_file("kprobe_events", f"{self.kind}:dlh_probe {FUNCTION}")
        trace_file("events/kprobes/dlh_probe/enable", "1")

    def off(self) -> None:
        trace_file("events/kprobes/dlh_probe/enable", "0")
        trace_file("kprobe_events", "")


class Event(Tracer):
    """A tracepoint of KVM that we have a probe on."""

    def __init__(self, event: str) -> None:
        self.name, self.event, self.mark = f"the event {event}", event, f" {event}:"

    def on(self) -> None:
        trace_file(f"events/kvm/{self.event}/enable", "1")

    def off(self) -> None:
        trace_file(f"events/kvm/{self.event}/enable", "0")


TRACERS = (
    Function("function"),
    Function("function_graph"),
    Probe("p", "a kprobe"),
    Probe("r", "a return probe"),
    Event("kvm_exit"),
    Event("kvm_userspace_exit"),
)


def tracer_first(tracer: Tracer) -> None:
    tracer.on()
    tracer.seen()
    inserted = insert("kvm_dlh").returncode == 0
    worked = calls_work()
    seen = tracer.seen()
    tracer.off()
    worked = worked and calls_work()
    removed = run("rmmod", "kvm_dlh").returncode == 0
    ktap.equal((inserted, worked, removed), (True, True, True), f"{tracer.name}, then the module: all goes well")
    ktap.ok(seen, "and the tracer sees something")


def tracer_second(tracer: Tracer) -> None:
    inserted = insert("kvm_dlh").returncode == 0
    tracer.on()
    tracer.seen()
    worked = calls_work()
    seen = tracer.seen()
    removed = run("rmmod", "kvm_dlh").returncode == 0
    stock = stock_host()
    later = tracer.seen()
    tracer.off()
    ktap.equal(
        (inserted, worked, removed, stock), (True,) * 4, f"the module, then {tracer.name}: all goes well"
    )
    ktap.ok(seen and later, "and the tracer sees something, also when the module has gone", seen, later)


OWNERS = (
    ("hook_holder", hook_holder_works, hook_holder_goes),
    ("live_patch", live_patch_works, live_patch_goes),
)

ktap.plan(14 * len(OWNERS) + 1 + 4 * len(TRACERS) + 1)
before = traces()
for name, works, goes in OWNERS:
    owner_first(name, works, goes)
    owner_second(name, goes)
switch_off()
for tracer in TRACERS:
    tracer_first(tracer)
    tracer_second(tracer)
ktap.equal(traces() ^ before, set(), "nothing of all that is left")
ktap.done()
