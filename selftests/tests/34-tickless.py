#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=2G icount=yes timeout=180 append="nohz_full=1 isolcpus=1 rcu_nocbs=1"
"""Entries of a vCPU that does not exit by itself, on a CPU without a timer tick, wait for max_defer_us.

Instructions are counted as time: an entry waits as long on any machine.
"""

import subprocess
from pathlib import Path

from vm import ktap

REPOSITORY = Path("/src/kvm-dlh")

ktap.plan(2)
for defer_us in (0, 50000):
    module = str(REPOSITORY / "build/modules/kvm_dlh.ko")
    subprocess.run(["insmod", module, f"max_defer_us={defer_us}"], check=True)
    run = subprocess.run(
        [REPOSITORY / "build/bin/dlh-vmm", "ktap", "tickless", f"--defer-us={defer_us}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in run.stdout.splitlines():
        print(f"    {line}")
    ktap.equal(run.returncode, 0, f"with max_defer_us={defer_us}")
    subprocess.run(["rmmod", "kvm_dlh"], check=True)
ktap.done()
