#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=3G timeout=240
"""dlh_guest.ko goes in only where there is something to do, says why where there is not, and goes again."""

import subprocess
from pathlib import Path

from vm import ktap
from vm.guest import Guest

MODULES = Path("/src/kvm-dlh/build/modules")
FILES = {"dlh_guest.ko": MODULES / "dlh_guest.ko"}
TRACES = (
    "ls -d /sys/module/dlh_guest /sys/kernel/debug/dlh_guest 2>/dev/null; "
    "grep -h dlh_guest /sys/devices/system/cpu/hotplug/states; true"
)


def host(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def refused(guest: Guest, arguments: str, reason: str, name: str) -> None:
    """The module does not go in, says why, and leaves nothing behind."""
    guest.check("dmesg -c >/dev/null")
    status, _ = guest.run(f"insmod /dlh_guest.ko {arguments}")
    # busybox tries a second time, in the old way, when the kernel refuses the first.
    lines = {line.split("] ", 1)[1] for line in guest.check("dmesg").splitlines() if "dlh_guest: " in line}
    # The kernel's own: that the module taints it, and of a parameter that it is invalid.
    others = ("tree module taints", "verification failed", "invalid for parameter")
    said = {line for line in lines if not any(other in line for other in others)}
    ktap.ok(status != 0, f"{name}: it is refused")
    ktap.ok(len(said) == 1 and reason in next(iter(said)), f"{name}: with one clear line", sorted(said))
    ktap.equal(guest.check(TRACES), "", f"{name}: nothing stays behind")


def open_file(guest: Guest, name: str, how: str) -> None:
    """A file that is open keeps the driver where it is, and nothing happens when it is closed."""
    guest.check("insmod /dlh_guest.ko")
    path = f"/sys/kernel/debug/dlh_guest/{name}"
    script = f"exec 7{how}{path}; rmmod dlh_guest; echo $?; exec 7>&-; rmmod dlh_guest; echo $?"
    said = guest.check(script).splitlines()
    numbers = [line for line in said if line.isdecimal()]
    ktap.equal(numbers, ["1", "0"], f"the driver does not go while somebody has {name} open, and goes then")


ktap.plan(3 * 11 + 1 + 3 + 3 + 4)
with Guest(files=FILES, mem="256M") as guest:
    refused(guest, "", "the host has no deferrable hypercalls", "a stock host")
    host("insmod", MODULES / "kvm_dlh.ko")
    refused(guest, "", "the host does not take free pages", "a host without ksm_bridge")
    host("insmod", MODULES / "ksm_bridge.ko")
    refused(guest, "ring_entries=100", "ring_entries=100 is no power of two", "a ring of 100")
    refused(guest, "ring_entries=131072", "ring_entries=131072 is no power of two", "a ring too large")
    refused(guest, "order=11", "order=11 is not between", "an order too large")
    refused(guest, "batch=0", "batch=0 is not between", "no batch")
    refused(guest, "batch=33", "batch=33 is not between", "a batch too large")
    refused(guest, "pace_mib=1048577", "pace_mib=1048577 is not between", "a pace too fast")
    refused(guest, "timeout_ms=0", "timeout_ms=0 is not between", "no time to wait")

    guest.check("insmod /dlh_guest.ko order=3 batch=1 order=0 pace_mib=4096 timeout_ms=60000 ring_entries=64")
    parameters = guest.check("cd /sys/module/dlh_guest/parameters; grep . *")
    given = "batch:1\norder:0\npace_mib:4096\nring_entries:64\ntimeout_ms:60000\n"
    ktap.equal(parameters, given, "parameters can be read, and of one given twice the last counts")
    guest.check("rmmod dlh_guest")

    for lap in range(3):
        loaded = guest.run("insmod /dlh_guest.ko order=0 ring_entries=64").status
        rings = "rings 1\n" in guest.check("cat /sys/kernel/debug/dlh_guest/stats")
        removed = guest.run("rmmod dlh_guest").status
        ktap.equal((loaded, rings, removed), (0, True, 0), f"inserted, has its ring, removed, lap {lap}")
    open_file(guest, "stats", "<")
    open_file(guest, "bench", "<")
    open_file(guest, "trace", ">")
    ktap.equal(guest.check(TRACES), "", "nothing stays behind")
    order = guest.check("cat /sys/module/page_reporting/parameters/page_reporting_order")
    ktap.equal(order, "9\n", "the order of reporting is as before")
    (rings,) = Path("/sys/kernel/debug/kvm_dlh").glob("*/rings")
    ktap.equal(rings.read_text(), "", "the host has no ring")

with Guest(files=FILES, mem="256M", free_page_reporting=True) as guest:
    refused(guest, "", "belongs to another driver, standing back", "virtio-balloon reports already")
with Guest(files=FILES, mem="256M", append="page_poison=1") as guest:
    refused(guest, "", "poisons free pages", "a kernel that poisons free pages")
host("rmmod", "ksm_bridge")
host("rmmod", "kvm_dlh")
ktap.ok(not Path("/sys/module/kvm_dlh").exists(), "the host's modules go")
ktap.done()
