#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=3G timeout=240
"""Each CPU of the guest has a ring of its own, while CPUs come and go and memory is reported."""

import re
import time

from vm import ktap
from vm.guest import Guest
from vm.host import DEBUGFS, insert_host_modules, remove_host_modules

DRIVER = "/src/kvm-dlh/build/modules/dlh_guest.ko"
CPU = "/sys/devices/system/cpu/cpu{}/online"


def guest_stat(guest: Guest, name: str) -> int:
    text = guest.check("cat /sys/kernel/debug/dlh_guest/stats")
    return int(dict(line.split() for line in text.splitlines())[name])


def host_rings(guest: Guest) -> dict[int, str]:
    """The rings the host has of the guest: address by vCPU."""
    (path,) = (DEBUGFS / "kvm_dlh").glob(f"{guest.pid}-*/rings")
    return {int(line.split()[0]): re.findall(r"gpa=(\w+)", line)[0] for line in path.read_text().splitlines()}


def online(guest: Guest, cpu: int, value: int) -> None:
    guest.check(f"echo {value} > {CPU.format(cpu)}")


ktap.plan(14)
insert_host_modules()
# No more vCPUs than the host under test has CPUs: with three on two, a boot was seen to hang before the
# guest's first module.
with Guest(smp=2, mem="384M", modules=[f"{DRIVER} order=0"]) as guest:
    rings = host_rings(guest)
    ktap.equal(sorted(rings), [0, 1], "the host has a ring for each vCPU")
    ktap.equal(len(set(rings.values())), 2, "each in a place of its own")
    ktap.equal(guest_stat(guest, "rings"), 2, "the guest counts them")

    online(guest, 1, 0)
    ktap.equal(host_rings(guest), {0: rings[0]}, "a CPU that goes takes its ring away")
    ktap.equal(guest_stat(guest, "rings"), 1, "the guest counts that")
    online(guest, 1, 1)
    ktap.equal(sorted(host_rings(guest)), [0, 1], "a CPU that comes brings a ring")

    # Reports move from CPU to CPU, and wait for rings that go away under them.
    reports = guest_stat(guest, "reports")
    load = guest.begin(
        "for i in 1 2 3 4 5 6; do dd if=/dev/zero of=/tmp/f bs=1M count=120 2>/dev/null; rm /tmp/f; "
        "for c in 1; do echo 0 > /sys/devices/system/cpu/cpu$c/online; sleep 0.3; done; sleep 1; "
        "for c in 1; do echo 1 > /sys/devices/system/cpu/cpu$c/online; done; sleep 1; done"
    )
    ktap.equal(guest.finish(load, timeout=150).status, 0, "CPUs come and go while pages are reported")
    ktap.ok(guest_stat(guest, "reports") > reports, "pages were reported meanwhile")
    ktap.equal(sorted(host_rings(guest)), [0, 1], "all have rings in the end")
    # A last report: whatever a vanished ring has cost is made up for.
    ranges = guest_stat(guest, "ranges")
    guest.check("dd if=/dev/zero of=/tmp/f bs=1M count=120 2>/dev/null; rm /tmp/f")
    deadline = time.monotonic() + 20
    while guest_stat(guest, "ranges") == ranges and time.monotonic() < deadline:
        time.sleep(0.5)
    ktap.ok(guest_stat(guest, "ranges") > ranges, "and reporting goes on")
    text = guest.check("cat /sys/kernel/debug/dlh_guest/stats")
    ktap.comment(" ".join(text.split("\n")))
    guest.check("rmmod dlh_guest")
    ktap.equal(host_rings(guest), {}, "unloading takes all rings away")
    guest.check("insmod /modules/dlh_guest.ko")
    ktap.equal(sorted(host_rings(guest)), [0, 1], "loading again brings them back")

# Powering off, rebooting and kexec tell drivers in the same way; here the VM is kept to look at it.
with Guest(smp=2, mem="256M", modules=[DRIVER], qemu=["-no-shutdown"]) as guest:
    ktap.equal(sorted(host_rings(guest)), [0, 1], "another guest has its rings")
    guest.begin("poweroff -f")
    deadline = time.monotonic() + 60
    while guest.qmp("query-status")["status"] != "shutdown" and time.monotonic() < deadline:
        time.sleep(0.2)
    ktap.equal(host_rings(guest), {}, "a guest that powers off leaves no ring behind")
remove_host_modules()
ktap.done()
