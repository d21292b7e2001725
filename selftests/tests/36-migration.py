#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=5G timeout=400
"""A guest moves to another VMM while it reports pages and its processes verify what they write.

By precopy pages are merged while KVM logs what is dirty; by postcopy nothing is merged in the destination as long
as it waits for pages. In the destination the driver finds out that the host has no ring of it, and gets one.
"""

from typing import Any

from vm import ktap
from vm.driver import CHURN, DRIVER, EAGER, begin_load, end_load, lawful, stats, wait_above, wait_until
from vm.guest import Guest
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules
from vm.memory import ANONYMOUS, MEMFD_SHARED

KINDS = (ANONYMOUS, MEMFD_SHARED)
MIB = 1 << 20
# With no time to stand still in, a guest in use does not arrive before it may go faster; over a line that does next to
# nothing it never does. The line brings what a guest waits for at once, whatever its limit.
SLOW = {"max_bandwidth": 24 * MIB, "max_postcopy_bandwidth": 1 << 16, "downtime_limit": 0}
STOPPED = {"max_bandwidth": 1 << 16}
FAST = {"max_bandwidth": 2048 * MIB, "max_postcopy_bandwidth": 2048 * MIB, "downtime_limit": 2000}
ARGUMENTS: dict[str, Any] = {
    "mem": "256M",
    "smp": 2,
    "modules": [f"{DRIVER} order=0 timeout_ms=300"],
    "binaries": [CHURN],
    **EAGER,
}


def merges(bridge: Bridge) -> bool:
    """Whether pages go on being merged."""
    return wait_above(bridge, "merged_pages", bridge.get("merged_pages") + 256)


def moved(source: Guest, destination: Guest, setups: int, what: str) -> None:
    """The guest has arrived and goes on as before: 6 results."""
    for vmm in (source, destination):
        vmm.wait_migrated()
    ktap.ok(lawful(Dlh(source.pid)), f"{what}: no call is lost in the source", Dlh(source.pid).all())
    source.kill()
    dlh, bridge = Dlh(destination.pid), Bridge(destination.pid)
    ktap.ok(merges(bridge), f"{what}: pages are merged in the destination", bridge.all(), dlh.all())
    found, seen = end_load(destination), stats(destination)
    ktap.comment(f"{what}: {found}; driver {seen}")
    ktap.comment(f"{what}: bridge {bridge.all()}")
    ktap.ok(found.laps > 4, f"{what}: memory was used all the time", found)
    ktap.equal(found.wrong, 0, f"{what}: every word is what was written")
    # A report fails whose ring is lost, or of which a range was declined, as all are while userfaultfd is armed.
    renewed = seen["setups"] > setups and seen["failed"] <= seen["lost"] + seen["declined"]
    ktap.ok(renewed, f"{what}: the driver has got new rings", setups, seen)
    ktap.ok(lawful(dlh), f"{what}: no call is lost in the destination", dlh.all())


def precopy(source: Guest, arguments: dict[str, Any], what: str) -> Guest:
    """Moves the guest by precopy: 1 + 6 results."""
    bridge, setups = Bridge(source.pid), stats(source)["setups"]
    destination = Guest(**arguments, incoming="live")
    begin_load(source)
    merges(bridge)
    source.begin_migration(destination, **SLOW)
    # From the second round on what is merged may have been sent before.
    again = wait_until(lambda: source.qmp("query-migrate").get("ram", {}).get("dirty-sync-count", 0) > 1)
    source.qmp("migrate-set-parameters", **STOPPED)
    merged = bridge.get("merged_pages")
    logging = again and merges(bridge) and source.migration() == "active"
    ktap.ok(logging, f"{what}: pages are merged while dirty pages are logged", bridge.all())
    ram = source.qmp("query-migrate")["ram"]
    ktap.comment(f"{what}: {bridge.get('merged_pages') - merged} pages merged in round {ram['dirty-sync-count']}")
    source.qmp("migrate-set-parameters", **FAST)
    moved(source, destination, setups, what)
    return destination


def postcopy(source: Guest, arguments: dict[str, Any], what: str) -> Guest:
    """Moves the guest by postcopy: 3 + 6 results."""
    setups = stats(source)["setups"]
    destination = Guest(**arguments, incoming="live")
    bridge = Bridge(destination.pid)
    begin_load(source)
    merges(Bridge(source.pid))
    source.begin_migration(destination, "postcopy-ram", **SLOW)
    wait_until(lambda: source.migration() == "active")
    source.qmp("migrate-start-postcopy")
    armed = wait_until(lambda: destination.migration() == "postcopy-active")
    skipped = armed and wait_above(bridge, "skipped_uffd", 1024)
    # In this order: what was merged was merged while it was active.
    counters, state = bridge.all(), destination.migration()
    left = source.qmp("query-migrate")["ram"]["remaining"]
    ktap.comment(f"{what}: {left >> 20} MiB still to come, bridge {counters}")
    ktap.equal(state, "postcopy-active", f"{what}: the guest runs before all of its memory is there")
    ktap.ok(skipped, f"{what}: pages reported meanwhile are kept, because they are armed for userfaultfd", counters)
    ktap.equal(counters["merged_pages"], 0, f"{what}: none is merged")
    source.qmp("migrate-set-parameters", **FAST)
    moved(source, destination, setups, what)
    return destination


ktap.plan(len(KINDS) * (7 + 9))
insert_host_modules()
for kind in KINDS:
    arguments = {**ARGUMENTS, "memory_backend": kind.backend}
    guest = Guest(**arguments)
    guest.wait_ready()
    for move in (precopy, postcopy):
        guest = move(guest, arguments, f"{kind.name}, {move.__name__}")
    guest.kill()
remove_host_modules()
ktap.done()
