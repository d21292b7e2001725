#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G icount=yes timeout=300
"""What the modules cost, in instructions of guest and host together, stays within the bounds promised."""

import resource
import subprocess
import time
from pathlib import Path

from vm import ktap

REPOSITORY = Path("/src/kvm-dlh")


def measure() -> dict[str, float]:
    run = subprocess.run(
        [REPOSITORY / "build/bin/dlh-vmm", "measure"], check=True, stdout=subprocess.PIPE, text=True
    )
    print("".join(f"# {line}\n" for line in run.stdout.splitlines()), end="")
    return {name: float(value) for name, value in (line.split() for line in run.stdout.splitlines())}


def module(*command: str) -> None:
    subprocess.run(command, check=True)


def at_most(value: float, bound: float, name: str) -> None:
    ktap.ok(value <= bound, f"{name}: at most {bound:.0f}", f"{value:.1f}")


def insert_cost() -> float:
    """Instructions of inserting the module, without what waits."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    module("insmod", str(REPOSITORY / "build/modules/kvm_dlh.ko"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds * 1e9


ktap.plan(12)
stock = measure()
inserting = insert_cost()
loaded = measure()
# The probes stay for a minute. Nothing runs meanwhile, so it passes at once.
time.sleep(65)
idle = measure()
module("rmmod", "kvm_dlh")
after = measure()

at_most(loaded["deferred_guest_b32"], 20, "guest side of a deferred call, 32 an exit")
at_most(loaded["deferred_total_b32"], 60, "a deferred call, guest and host together, 32 an exit")
at_most(loaded["deferred_total_b512"], 60, "the same, 512 an exit")
at_most(loaded["deferred_total_b1"], stock["hypercall"] / 2, "a single one: half a stock hypercall")
at_most(loaded["hypercall"] - stock["hypercall"], 60, "added to a hypercall that is not ours")
# The loop is the same, and so is every instruction: not one more.
ktap.equal(loaded["exit"], stock["exit"], "nothing is added to exits while no VM has a ring")
ktap.equal(idle["exit"], stock["exit"], "nor when the last ring has been gone for a minute")
at_most(loaded["exit_after_all"] - stock["exit"], 32, "added to an exit before that")
at_most(loaded["exit_other_vm"] - stock["exit"], 32, "added to an exit of a VM without a ring")
at_most(loaded["exit_ring_empty"] - stock["exit"], 80, "added to an exit of a vCPU with an empty ring")
# Names of functions are not compared with all that the kernel has: that took 1,355 million.
at_most(inserting / 1e6, 200, "inserting the module, in millions")
ktap.equal((after["exit"], after["hypercall"]), (stock["exit"], stock["hypercall"]), "rmmod leaves nothing")
ktap.done()
