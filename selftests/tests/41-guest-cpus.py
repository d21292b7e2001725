#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=3G timeout=240
"""Each CPU of the guest has a ring of its own, while CPUs come and go and memory is reported."""

from vm import ktap
from vm.driver import host_rings, stats, wait_until
from vm.guest import Guest
from vm.host import insert_host_modules, remove_host_modules

DRIVER = "/src/kvm-dlh/build/modules/dlh_guest.ko"
CPU = "/sys/devices/system/cpu/cpu{}/online"


def places(guest: Guest) -> dict[int, int]:
    """Where the rings are that the host has of the guest, by vCPU."""
    return {vcpu: ring.gpa for vcpu, ring in host_rings(guest).items()}


def use_memory(guest: Guest) -> None:
    guest.check("dd if=/dev/zero of=/tmp/f bs=1M count=120 2>/dev/null; rm /tmp/f")


def online(guest: Guest, cpu: int, value: int) -> None:
    guest.check(f"echo {value} > {CPU.format(cpu)}")


ktap.plan(14)
insert_host_modules()
# No more vCPUs than the host under test has CPUs: with three on two, a boot was seen to hang before the
# guest's first module.
with Guest(smp=2, mem="384M", modules=[f"{DRIVER} order=0"]) as guest:
    rings = places(guest)
    ktap.equal(sorted(rings), [0, 1], "the host has a ring for each vCPU")
    ktap.equal(len(set(rings.values())), 2, "each in a place of its own")
    ktap.equal(stats(guest)["rings"], 2, "the guest counts them")

    online(guest, 1, 0)
    ktap.equal(places(guest), {0: rings[0]}, "a CPU that goes takes its ring away")
    ktap.equal(stats(guest)["rings"], 1, "the guest counts that")
    online(guest, 1, 1)
    ktap.equal(sorted(places(guest)), [0, 1], "a CPU that comes brings a ring")

    # Reports move from CPU to CPU, and wait for rings that go away under them.
    reports = stats(guest)["reports"]
    laps = 0
    statuses: list[int] = []

    def enough() -> bool:
        global laps
        laps += 1
        statuses.append(
            guest.run(
                "dd if=/dev/zero of=/tmp/f bs=1M count=120 2>/dev/null; rm /tmp/f; cd /sys/devices/system/cpu/cpu1 && "
                "echo 0 > online && sleep 0.3 && sleep 1 && echo 1 > online && sleep 1"
            ).status
        )
        return laps >= 6 and stats(guest)["reports"] > reports + 2

    reported = wait_until(enough, pause=0)
    ktap.ok(not any(statuses), "CPUs come and go while pages are reported", statuses)
    ktap.ok(reported, "pages were reported meanwhile", stats(guest))
    ktap.equal(sorted(places(guest)), [0, 1], "all have rings in the end")
    # A last report: whatever a vanished ring has cost is made up for.
    ranges = stats(guest)["ranges"]
    use_memory(guest)
    ktap.ok(wait_until(lambda: stats(guest)["ranges"] > ranges), "and reporting goes on")
    ktap.comment(str(stats(guest)))
    guest.check("rmmod dlh_guest")
    ktap.equal(places(guest), {}, "unloading takes all rings away")
    guest.check("insmod /modules/dlh_guest.ko")
    ktap.equal(sorted(places(guest)), [0, 1], "loading again brings them back")

# Powering off, rebooting and kexec tell drivers in the same way; here the VM is kept to look at it.
with Guest(smp=2, mem="256M", modules=[DRIVER], qemu=["-no-shutdown"]) as guest:
    ktap.equal(sorted(places(guest)), [0, 1], "another guest has its rings")
    guest.begin("poweroff -f")
    wait_until(lambda: guest.qmp("query-status")["status"] == "shutdown")
    ktap.equal(places(guest), {}, "a guest that powers off leaves no ring behind")
remove_host_modules()
ktap.done()
