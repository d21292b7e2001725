#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=6G icount=yes timeout=240
"""What a VM costs the host in memory and time does not depend on how many there are, and is little.

Instructions are counted as time, so that it is the same on any machine.
"""

import subprocess
from pathlib import Path

from vm import ktap
from vm.herd import Herd, kernel_kib
from vm.host import MODULES
from vm.patience import wait_until

BOUND_KIB = 16


def first_contact_kib(count: int) -> float:
    """What the queue of each VM takes: VMs that were there before the module get theirs at their first call."""
    herd = Herd(count)
    subprocess.run(["insmod", MODULES / "kvm_dlh.ko"], check=True)
    before = kernel_kib()
    herd.call()
    added = (kernel_kib() - before) / count
    herd.end()
    subprocess.run(["rmmod", "kvm_dlh"], check=True)
    return added


ktap.plan(7)
first_contact_kib(50)
few, many = first_contact_kib(100), first_contact_kib(400)
ktap.comment(f"KiB a VM: {few:.1f} with 100 VMs, {many:.1f} with 400")
ktap.ok(many > 1, "something is measured at all", many)
ktap.ok(many <= BOUND_KIB, f"at most {BOUND_KIB} KiB a VM", many)
ktap.ok(many <= few + 4, "no more for each with more of them", few, many)

subprocess.run(["insmod", MODULES / "kvm_dlh.ko"], check=True)
queues = Path("/sys/kernel/debug/kvm_dlh")
first = Herd(100)
ktap.equal(len(list(queues.iterdir())), 100, "each VM has its queue")
second = Herd(100)
ktap.comment(f"microseconds for each of the first hundred {first.microseconds:.0f}, of the second {second.microseconds:.0f}")
ktap.ok(second.microseconds < first.microseconds * 3, "the second hundred is made about as fast")
first.end()
second.end()
wait_until(lambda: not any(queues.iterdir()))
ktap.equal(list(queues.iterdir()), [], "all are forgotten")
ktap.equal(subprocess.run(["rmmod", "kvm_dlh"]).returncode, 0, "the module goes")
ktap.done()
