#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=4G
"""What a guest has given back comes back when somebody reads all of its memory, and goes again.

A shared memfd gets a page where a hole is read: by a dump, a migration, a restore. Nobody uses the guest meanwhile,
so nothing but the driver's own question leads to another report.
"""

from pathlib import Path
from typing import Any

from vm import ktap
from vm.driver import CHURN, DRIVER, EAGER, begin_load, end_load, fill, free_mib, lawful, settle, stats
from vm.guest import Guest
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules
from vm.memory import ANONYMOUS, MEMFD_SHARED
from vm.patience import wait_until

STATE = Path("/tmp/state")
MIB_USED = 100
ARGUMENTS: dict[str, Any] = {"mem": "256M", "binaries": [CHURN], **EAGER}


def settled(guest: Guest) -> int:
    """Has the guest use memory and give it back; its footprint then, in MiB."""
    settle(guest)
    fill(guest, MIB_USED)
    settle(guest)
    return guest.rss_kib() >> 10


def goes(guest: Guest, before: int, what: str) -> None:
    """The footprint is what it was, at some time: one result."""
    small = wait_until(lambda: guest.rss_kib() >> 10 <= before * 1.2)
    now, bridge = guest.rss_kib() >> 10, Bridge(guest.pid).all()
    ktap.ok(small, f"{what}: the footprint comes back", before, now, bridge, stats(guest))
    ktap.comment(f"{what}: {before} MiB before, {now} now, {free_mib(guest):.0f} free in the guest; {stats(guest)}")


def dump(guest: Guest) -> None:
    """Has the VMM read all of the memory of a guest that stands still."""
    guest.qmp("dump-guest-memory", paging=False, protocol="file:/tmp/dump")
    Path("/tmp/dump").unlink()


def told(guest: Guest, than: int) -> bool:
    """Whether the host tells the guest to report once more, at some time, and it does.

    The host has told it once more than it has done so: before its first report.
    """
    bridge = Bridge(guest.pid)
    return wait_until(lambda: bridge.get("asked_again") > than and stats(guest)["again"] >= than)


ktap.plan(1 + 4 + 1 + 1 + 5 + 3)
insert_host_modules()
arguments = {**ARGUMENTS, "memory_backend": MEMFD_SHARED.backend, "modules": [f"{DRIVER} timeout_ms=300 order=0"]}
with Guest(**arguments) as guest:
    bridge = Bridge(guest.pid)
    before = settled(guest)
    seen = stats(guest)
    # The driver asks before it reports for the first time; then it is going to report all anyhow.
    ktap.equal((seen["unmarked"], seen["again"]), (0, 0), "a guest that has booted reports what is free once")

    guest.qmp("stop")
    merged = bridge.get("map_merged")
    dump(guest)
    filled, refilled = guest.rss_kib() >> 10, bridge.get("map_refilled")
    ktap.ok(filled > before * 1.5, "a dump fills the memory", before, filled)
    ktap.ok(refilled > merged // 2, "and map_refilled says so", merged, refilled)
    guest.qmp("cont")
    goes(guest, before, "a dump")
    ktap.ok(bridge.get("map_refilled") < refilled // 4, "map_refilled falls", bridge.all())

    other = Guest(**arguments, incoming="live")
    guest.begin_migration(other, max_bandwidth=2048 << 20)
    guest.wait_migrated()
    other.wait_migrated()
    guest.kill()
    with other:
        goes(other, before, "a migration")
        other.save(STATE)
with Guest(**arguments, incoming=STATE) as guest:
    goes(guest, before, "a restore")

arguments = {**ARGUMENTS, "memory_backend": ANONYMOUS.backend, "modules": [f"{DRIVER} timeout_ms=300 order=4"]}
with Guest(**arguments, files={"dlh_guest.ko": DRIVER}) as guest:
    bridge = Bridge(guest.pid)
    settled(guest)
    before = bridge.get("asked_again")
    merged, free = bridge.get("merged_pages"), free_mib(guest)
    bridge.again()
    ktap.ok(told(guest, before), "the operator has a guest report once more", bridge.all(), stats(guest))
    # What is in small pieces is not reported, nor is what the guest holds in reserve.
    enough = wait_until(lambda: (bridge.get("merged_pages") - merged) >> 8 > free / 2)
    ktap.ok(enough, "and it reports what is free", free, merged, bridge.all())

    begin_load(guest)
    rounds = 3
    for _ in range(rounds):
        asked = bridge.get("asked_again")
        bridge.again()
        told(guest, asked)
    found = end_load(guest)
    ktap.equal(bridge.get("asked_again"), before + 1 + rounds, "the guest is told in the middle of a data check")
    ktap.ok(found.laps > 0 and found.wrong == 0, "every word is what was written", found)
    ktap.ok(lawful(Dlh(guest.pid)), "no call is lost", Dlh(guest.pid).all())

    # It may be at that.
    bridge.again()
    guest.check("rmmod dlh_guest")
    bridge.again()
    guest.check("insmod /dlh_guest.ko order=4 timeout_ms=300")
    seen = stats(guest)
    ktap.ok(seen["unmarked"] > 0, "a driver that is loaded later takes off the marks of the one before", seen)
    settle(guest)
    guest.check("rmmod dlh_guest; insmod /dlh_guest.ko order=4 timeout_ms=300")
    seen = stats(guest)
    ktap.equal((seen["asked"], seen["unmarked"]), (1, 0), "one that the host wants nothing of leaves them")
    ktap.ok(lawful(Dlh(guest.pid)), "no call is lost", Dlh(guest.pid).all())
remove_host_modules()
ktap.done()
