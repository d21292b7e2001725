#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=3G icount=yes timeout=600
"""Taking memory back by reports costs the host little more than if the VMM did it itself."""

import subprocess

from vm import ktap

# Nothing else is to run while instructions are counted: the worker may use all of its CPU.
subprocess.run(["insmod", "build/modules/kvm_dlh.ko", "budget_us=1000000"], check=True)
subprocess.run(["insmod", "build/modules/ksm_bridge.ko", "worker_cpu_percent=100"], check=True)
run = subprocess.run(["build/bin/dlh-vmm", "reclaim"], check=True, stdout=subprocess.PIPE, text=True)
ktap.plan(3)
ktap.comment(run.stdout)
figures = {name: float(value) for name, value in (line.split() for line in run.stdout.splitlines() if line[0] != "#")}
for shape, what, bound in (
    ("2m_huge", "2 MiB blocks of huge pages", 1.2),
    ("2m_small", "2 MiB blocks of small pages", 1.2),
    ("4k_runs16", "single pages in runs of 16", 1.5),
):
    ratio = figures[f"reclaim_{shape}_ratio"]
    ktap.ok(ratio <= bound, f"{what}: at most {bound} times the instructions of madvise", ratio)
subprocess.run(["rmmod", "ksm_bridge", "kvm_dlh"], check=True)
ktap.done()
