#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G icount=yes timeout=300
"""What guests do does not decide how often the kernel's code is changed.

A probe is attached with the first ring of the host, or the first VM that reports pages, and detached a minute
after the last; each changes code that all CPUs run. Counted is what the kernel is told to do, by kprobes on its
own functions. Instructions are counted as time, so a minute in which nothing runs passes at once.
"""

import subprocess
import time
from pathlib import Path

from vm import ktap

BUILD = Path("/src/kvm-dlh/build")
TRACING = Path("/sys/kernel/tracing")
VMM = BUILD / "bin/dlh-vmm"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if result.returncode:
        ktap.comment(result.stdout + result.stderr)
    return result


def hits() -> tuple[int, int]:
    """How often probes were attached and detached."""
    counts = {}
    for line in (TRACING / "kprobe_profile").read_text().splitlines():
        name, hit, *_ = line.split()
        counts[name] = int(hit)
    return counts["dlh_attach"], counts["dlh_detach"]


def since(before: tuple[int, int]) -> tuple[int, int]:
    attached, detached = hits()
    return attached - before[0], detached - before[1]


def insert(name: str) -> None:
    run("insmod", BUILD / f"modules/{name}.ko")


def hooked() -> list[str]:
    return sorted((TRACING / "enabled_functions").read_text().splitlines())


with (TRACING / "kprobe_events").open("w") as events:
    events.write("p:dlh_attach tracepoint_probe_register\n")
    events.flush()
    events.write("p:dlh_detach tracepoint_probe_unregister\n")
for probe in ("dlh_attach", "dlh_detach"):
    (TRACING / f"events/kprobes/{probe}/enable").write_text("1")
# The kernel's grace periods are the time that rings take to go; they are not what is counted.
Path("/sys/kernel/rcu_expedited").write_text("1")

ktap.plan(14)

# Which functions are hooked: KVM's, though another module has some of the same names.
ktap.equal(run("insmod", BUILD / "test-modules/namesake.ko").returncode, 0, "a module with functions of KVM's names goes in")
before = hooked()
insert("kvm_dlh")
ours = [line for line in hooked() if line not in before]
ktap.equal([line.split()[1] for line in ours], ["[kvm]"] * 3, "three functions are hooked, and they are KVM's")
run("rmmod", "kvm_dlh")
run("rmmod", "namesake")

# Rings.
insert("kvm_dlh")
insert("ksm_bridge")
before = hits()
ktap.equal(run(VMM, "ktap", "--only", "a thousand rings", "ring").returncode, 0, "a thousand rings come and go")
ktap.equal(since(before), (2, 0), "the two probes were attached once, and stay")
for _ in range(3):
    run(VMM, "ktap", "--only", "KICK", "ring")
ktap.equal(since(before), (2, 0), "and serve other VMs")
time.sleep(65)
ktap.equal(since(before), (2, 2), "they are detached when there has been no ring for a minute")
ktap.equal(run(VMM, "ktap", "--only", "KICK", "ring").returncode, 0, "the next ring works")
ktap.equal(since(before), (4, 2), "for it they are attached again")

# VMs that report pages.
before = hits()
case = "anonymous memory is given back"
reported = [run(VMM, "ktap", "--only", case, "free_pages").returncode for _ in range(5)]
ktap.equal(reported, [0] * 5, "five VMs report pages, one after the other")
ktap.equal(since(before), (1, 0), "one more probe was attached, once, and stays")

# Modules that go do not wait for the minute.
before = hits()
ktap.equal(run("rmmod", "ksm_bridge").returncode, 0, "ksm_bridge goes")
ktap.equal(since(before), (0, 1), "and takes its probe along")
ktap.equal(run("rmmod", "kvm_dlh").returncode, 0, "kvm_dlh goes")
ktap.equal(since(before), (0, 3), "and takes its probes along")
ktap.done()
