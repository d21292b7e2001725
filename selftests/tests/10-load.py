#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=120
"""kvm_dlh.ko is inserted and removed, and says so clearly when it cannot be."""

import subprocess
from pathlib import Path

from vm import ktap

MODULES = Path("/src/kvm-dlh/build/modules")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


ktap.plan(5)
for lap in range(3):
    inserted = run("insmod", str(MODULES / "kvm_dlh.ko"))
    removed = run("rmmod", "kvm_dlh")
    ktap.equal((inserted.returncode, removed.returncode), (0, 0), f"inserted and removed, lap {lap}")
refused = run("insmod", str(MODULES / "kvm_dlh.ko"), "budget_entries=0")
ktap.ok(refused.returncode != 0, "a bad parameter is refused")
ktap.ok("budget_entries=0 is not between" in run("dmesg").stdout, "with the reason in the log")
ktap.done()
