#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=6G timeout=240
"""What a VM costs the host in memory and time does not depend on how many there are, and is little."""

import subprocess
import time
from pathlib import Path

from vm import ktap
from vm.host import MODULES

VMM = "/src/kvm-dlh/build/bin/dlh-vmm"
BOUND_KIB = 16


class Herd:
    """A number of VMs, in one process."""

    def __init__(self, count: int) -> None:
        self.process = subprocess.Popen([VMM, "herd", str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.microseconds = self._ready()

    def _ready(self) -> float:
        assert self.process.stdout
        line = self.process.stdout.readline().decode()
        if not line.startswith("ready "):
            raise RuntimeError(f"dlh-vmm herd said {line!r}")
        return float(line.split()[1])

    def call(self) -> float:
        """Has each VM make a call; returns the microseconds it took each."""
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self._ready()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def kernel_kib() -> int:
    """What the kernel has allocated for itself."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    time.sleep(1)
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    fields = {name: int(value) for name, value, *_ in lines}
    return sum(fields[f"{name}:"] for name in ("Slab", "VmallocUsed", "Percpu", "KernelStack", "PageTables"))


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
deadline = time.monotonic() + 20
while any(queues.iterdir()) and time.monotonic() < deadline:
    time.sleep(0.1)
ktap.equal(list(queues.iterdir()), [], "all are forgotten")
ktap.equal(subprocess.run(["rmmod", "kvm_dlh"]).returncode, 0, "the module goes")
ktap.done()
