#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=300
"""A kernel whose KVM lacks a hook point: one clear line, and nothing left behind.

The module is a test build that looks for a function this kernel does not have. The same holds where
somebody else owns the hook point: a second instance of the module cannot get it.
"""

import subprocess
from pathlib import Path

from vm import ktap

BUILD = Path("/src/kvm-dlh/build")
TRACING = Path("/sys/kernel/tracing")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)


def log() -> list[str]:
    return [line for line in run("dmesg").stdout.splitlines() if "kvm_dlh:" in line and "cannot be extended" in line]


def hooked() -> str:
    return (TRACING / "enabled_functions").read_text()


ktap.plan(11)
before = hooked()
refused = run("insmod", BUILD / "modules-missing_hook/kvm_dlh.ko")
ktap.ok(refused.returncode != 0, "the module is refused", refused.stderr)
ktap.equal(len(log()), 1, "with one line in the log")
ktap.ok("____kvm_emulate_hypercall_is_missing is missing" in log()[0], "which names what is missing", log()[0])
ktap.equal(hooked(), before, "no function stays hooked")
ktap.ok(not Path("/sys/module/kvm_dlh").exists(), "the module is gone")
ktap.ok(not Path("/sys/kernel/debug/kvm_dlh").exists(), "its directory is gone")

# VMs that are made while some of the hooks are there meet a module that is about to go.
herds = subprocess.Popen(["bash", "-c", f"while :; do {BUILD}/bin/dlh-vmm herd 1 </dev/null; done"], stdout=subprocess.DEVNULL)
refusals = [run("insmod", BUILD / "modules-missing_hook/kvm_dlh.ko").returncode for _ in range(8)]
ktap.ok(all(refusals), "it is refused while VMs come and go", refusals)
herds.kill()
herds.wait()
ktap.equal(hooked(), before, "no function stays hooked then either")

ktap.equal(run("insmod", BUILD / "modules/kvm_dlh.ko").returncode, 0, "the real module goes in afterwards")
ktap.ok("____kvm_emulate_hypercall" in hooked(), "and hooks the function", hooked())
run("rmmod", "kvm_dlh")
ktap.equal(hooked(), before, "and leaves nothing behind either")
ktap.done()
