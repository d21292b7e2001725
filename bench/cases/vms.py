# SPDX-License-Identifier: GPL-2.0
# mem: 5G
"""A thousand small VMs, each with a ring: memory, what setting them up takes, and whether they slow one another down."""

import resource
import subprocess

from harness.inside import figure, insert, vmm
from vm.herd import Herd, kernel_kib

COUNT = 1000

# Three files a VM.
resource.setrlimit(resource.RLIMIT_NOFILE, (8 * COUNT, 8 * COUNT))
# Not measured: what happens for the first time only.
herd = Herd(2, rings=True)
insert("kvm_dlh")
herd.call()
herd.end()
subprocess.run(["rmmod", "kvm_dlh"], check=True)
# Made before the module is there: then only what the module adds is counted.
for count, name in ((1, "1"), (COUNT, "1000")):
    herd = Herd(count, rings=True)
    insert("kvm_dlh")
    before = kernel_kib()
    figure(f"ring_setup_{name}_insns", herd.call() * 1000)
    if count > 1:
        figure("kib_a_vm", (kernel_kib() - before) / count)
    measured = vmm("measure")
    figure(f"drain_{name}_b32", measured["deferred_total_b32"])
    figure(f"exit_ring_empty_{name}", measured["exit_ring_empty"])
    herd.end()
    subprocess.run(["rmmod", "kvm_dlh"], check=True)
