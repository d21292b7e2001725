# SPDX-License-Identifier: GPL-2.0
# mem: 5G
"""A thousand small VMs, each with a ring: memory, what setting them up takes, and whether they slow one another down."""

import resource
import subprocess
import time
from pathlib import Path

from harness.inside import BINARIES, figure, insert, vmm

COUNT = 1000


def kernel_kib() -> int:
    """What the kernel has allocated for itself."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    time.sleep(1)
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    fields = {name: int(value) for name, value, *_ in lines}
    return sum(fields[f"{name}:"] for name in ("Slab", "VmallocUsed", "Percpu", "KernelStack", "PageTables"))


def herd(count: int) -> tuple["subprocess.Popen[str]", float]:
    """So many VMs, and the microseconds it took to make each."""
    process = subprocess.Popen(
        [BINARIES / "dlh-vmm", "herd", "--rings", str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, ready(process)


def ready(process: "subprocess.Popen[str]") -> float:
    assert process.stdout
    return float(process.stdout.readline().split()[1])


def call(process: "subprocess.Popen[str]") -> float:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()
    return ready(process)


def end(process: "subprocess.Popen[str]") -> None:
    assert process.stdin
    process.stdin.close()
    process.wait()


# Three files a VM.
resource.setrlimit(resource.RLIMIT_NOFILE, (8 * COUNT, 8 * COUNT))
# Not measured: what happens for the first time only.
process, _ = herd(2)
insert("kvm_dlh")
call(process)
end(process)
subprocess.run(["rmmod", "kvm_dlh"], check=True)
# Made before the module is there: then only what the module adds is counted.
for count, name in ((1, "1"), (COUNT, "1000")):
    process, _ = herd(count)
    insert("kvm_dlh")
    before = kernel_kib()
    figure(f"ring_setup_{name}_insns", call(process) * 1000)
    if count > 1:
        figure("kib_a_vm", (kernel_kib() - before) / count)
    measured = vmm("measure")
    figure(f"drain_{name}_b32", measured["deferred_total_b32"])
    figure(f"exit_ring_empty_{name}", measured["exit_ring_empty"])
    end(process)
    subprocess.run(["rmmod", "kvm_dlh"], check=True)
