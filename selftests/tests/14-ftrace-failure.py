#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=240
"""ftrace has given itself up, and cannot take the hooks off: the module's code stays where KVM goes on calling it."""

import subprocess
import time
from pathlib import Path

from vm import ktap

BUILD = Path("/src/kvm-dlh/build")
VMM = BUILD / "bin/dlh-vmm"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if result.returncode:
        ktap.comment(result.stdout + result.stderr)
    return result


def said() -> bool:
    return "kvm_dlh: ftrace has failed" in run("dmesg").stdout


ktap.plan(7)
ktap.equal(run("insmod", BUILD / "modules/kvm_dlh.ko").returncode, 0, "kvm_dlh goes in")
ktap.equal(run("insmod", BUILD / "test-modules/ftrace_failure.ko").returncode, 0, "ftrace fails")
ktap.equal(run(VMM, "ktap", "--only", "KICK", "ring").returncode, 0, "guests go on having rings")
remover = subprocess.Popen(["rmmod", "kvm_dlh"])
deadline = time.monotonic() + 120
while not said() and remover.poll() is None and time.monotonic() < deadline:
    time.sleep(0.1)
ktap.ok(said() and remover.poll() is None, "rmmod does not return, and says why", remover.poll())
state = Path(f"/proc/{remover.pid}/stat").read_text().split()[2] if remover.poll() is None else "gone"
ktap.equal(state, "I", "it counts as idle, not as hung")
# VMs are made, make hypercalls, and end: all of it by way of the module's code. What it answers to its own is
# that it goes; that is no matter here.
subprocess.run([VMM, "ktap", "--only", "FEATURES", "discovery"], stdout=subprocess.DEVNULL, check=False)
ktap.equal(run(VMM, "ktap", "--only", "other hypercalls", "discovery").returncode, 0, "hypercalls are answered")
ktap.ok(Path("/sys/module/kvm_dlh").exists(), "the module is still there")
ktap.done()
