# SPDX-License-Identifier: GPL-2.0
# mem: 2G
"""What calls, and exits without any, cost: guest and host together."""

import subprocess
import sys

from harness.inside import PROFILING, figure, insert, profiled, vmm

PRODUCERS = (1, 2, 4, 8)

if PROFILING:
    insert("kvm_dlh")
    with profiled():
        vmm("measure", "--batch", "32", "--laps", "5000")
    sys.exit()
for name, value in vmm("measure").items():
    figure(f"stock_{name}", value)
insert("kvm_dlh")
for name, value in vmm("measure").items():
    figure(name, value)
for vcpus in PRODUCERS:
    figure(f"producers_{vcpus}", vmm("measure", "--vcpus", str(vcpus))["deferred_total_b32"])
for name, value in vmm("drains").items():
    figure(name, value)
subprocess.run(["rmmod", "kvm_dlh"], check=True)
