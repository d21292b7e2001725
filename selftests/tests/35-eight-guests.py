#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=6G timeout=400
"""Eight guests share a host: four report their free pages, two have no driver, two are killed in the middle.

Of the killed ones, one is filling its memory and the other one has calls pending. The first four get their
footprint back, and their processes find what they wrote; the plain guests keep theirs, and what is in it.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vm import ktap
from vm.driver import (
    CHURN,
    DRIVER,
    EAGER,
    check_command,
    check_result,
    forgotten,
    lawful,
    settle,
    stats,
    wait_above,
    wait_until,
)
from vm.find import DEBUGFS, directories
from vm.guest import Guest
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules, workers

FILL_MIB = 96
KEPT_MIB = 48
CHECK_LAPS = 8
PLAIN: dict[str, Any] = {"mem": "256M", "binaries": [CHURN], **EAGER}
# The orders that the four report from; the two that are killed report at order 0.
ORDERS = (9, 9, 0, 0)


def boot(arguments: Sequence[dict[str, Any]]) -> list[Guest]:
    """Boots guests, two at a time."""
    guests: list[Guest] = []
    for first in range(0, len(arguments), 2):
        pair = [Guest(**these) for these in arguments[first : first + 2]]
        guests += pair
        for guest in pair:
            guest.wait_ready()
    return guests


def kill_filling(guest: Guest) -> str:
    """Kills a VMM whose guest has filled some of what it is about to."""
    before = guest.rss_kib()
    # Over and over: on a host with one CPU all of it may be filled between two looks.
    guest.begin(f"while dlh-churn fill --mib {FILL_MIB} < /dev/null; do true; done")
    grown = 0

    def some() -> bool:
        nonlocal grown
        grown = guest.rss_kib() - before
        return FILL_MIB << 8 < grown < FILL_MIB << 10

    seen = wait_until(some, pause=0.005)
    guest.process.kill()
    return f"filling: {grown >> 10} of {FILL_MIB} MiB" if seen else ""


def kill_reporting(guest: Guest) -> str:
    """Kills a VMM in the middle of reports: calls are pending."""
    dlh = Dlh(guest.pid)
    executed = dlh.get("executed")
    guest.begin(check_command(1, threads=1, mib=24, until="/never"))
    wait_above(dlh, "executed", executed + 100)
    pending = 0

    def some() -> bool:
        nonlocal pending
        pending = dlh.get("pending")
        return pending > 0

    # No pause in between: calls do not stay pending for long, and on one CPU this has to interrupt the worker.
    wait_until(some, pause=0)
    guest.process.kill()
    return f"reporting: {pending} calls pending" if pending else ""


def keep(guest: Guest) -> str:
    """Fills a file in the guest's memory with what nobody could guess; returns its digest."""
    return guest.check(f"head -c {KEPT_MIB << 20} /dev/urandom > /tmp/kept && md5sum /tmp/kept")


ktap.plan(6 + 4 * 5 + 2 * 3 + 1)
insert_host_modules()
drivers = [{**PLAIN, "modules": [f"{DRIVER} order={order} timeout_ms=300"]} for order in (*ORDERS, 0, 0)]
start = time.monotonic()
eight = boot([PLAIN, PLAIN, *drivers])
plain, four, killed = eight[:2], eight[2:6], eight[6:]
ktap.comment(f"eight guests booted in {time.monotonic() - start:.0f} s")
digests = [keep(guest) for guest in plain]
for guest in four:
    settle(guest)
before = {guest: guest.rss_kib() for guest in eight}
merged = {guest: Bridge(guest.pid).get("merged_pages") for guest in four}

# What fills the memory of the four goes on after the others are killed.
loads = [
    guest.begin(f"(sleep 4; echo) | dlh-churn fill --mib {FILL_MIB} >&2; {check_command(CHECK_LAPS, 1)}")
    for guest in four
]
for action, guest in zip((kill_filling, kill_reporting), killed, strict=True):
    what = action(guest)
    ktap.ok(what, f"a VMM is killed, {action.__name__.removeprefix('kill_')}")
    ktap.comment(what)
    guest.kill()
    ktap.ok(forgotten(guest.pid), "neither KVM nor the modules know its VM any more", [*DEBUGFS.glob("k*/*-*")])
wait_until(lambda: not any(workers(guest.pid) for guest in killed))
found = [len(workers(guest.pid)) for guest in killed + four]
ktap.equal(found, [0, 0, 1, 1, 1, 1], "their workers are gone, the others have one each")
known = sorted(path.name for path in (DEBUGFS / "ksm_bridge").glob("*-*"))
theirs = sorted(path.name for guest in four for path in directories("ksm_bridge", guest.pid))
ktap.ok(len(theirs) == 4 and known == theirs, "the bridge knows the guests that report, and no others", known, theirs)
halfway = {guest: Bridge(guest.pid).get("merged_pages") for guest in four}

for guest, order, load in zip(four, ORDERS, loads, strict=True):
    output = guest.finish(load).output
    found = check_result(output.removeprefix(f"filled {FILL_MIB} MiB\n"))
    ktap.ok(found.laps > 0 and found.wrong == 0, f"{guest.name}: every word is what was written", found)
    ktap.comment(f"{guest.name} (order {order}): {found}")
# On a slow host all that may have been over before the others were killed: what comes now is not.
again = f"dlh-churn fill --mib {FILL_MIB} < /dev/null >&2 && {check_command(4, 1)}"
for guest, load in zip(four, [guest.begin(again) for guest in four], strict=True):
    output = guest.finish(load).output.removeprefix(f"filled {FILL_MIB} MiB\n")
    if wrong := check_result(output).wrong:
        raise RuntimeError(f"{guest.name}: {wrong} wrong words")
for guest, order in zip(four, ORDERS, strict=True):
    old, full = before[guest], guest.status_kib("VmHWM")
    wait_until(lambda guest=guest, most=old + (full - old) // 4: guest.rss_kib() <= most)
    now = guest.rss_kib()
    pages = Bridge(guest.pid).get("merged_pages") - merged[guest]
    ktap.comment(f"{guest.name}: RSS {old >> 10}, full {full >> 10}, after {now >> 10} MiB; {pages >> 8} MiB merged")
    ktap.ok(full > old + FILL_MIB * 1024 * 0.8, f"{guest.name}: its footprint grew", old, full)
    ktap.ok(now <= old + (full - old) // 4, f"{guest.name}: three quarters of that, and more, came back", old, full, now)
    seen = stats(guest)
    later = pages + merged[guest] - halfway[guest]
    right = pages > FILL_MIB << 7 and later > 0 and seen["failed"] <= seen["declined"] and seen["lost"] == 0
    ktap.ok(right, f"{guest.name}: by reports, which go on after the others were killed", pages, later, seen)
    ktap.ok(lawful(Dlh(guest.pid)), f"{guest.name}: no call is lost", Dlh(guest.pid).all())

for guest, digest in zip(plain, digests, strict=True):
    old, now = before[guest], guest.rss_kib()
    ktap.comment(f"{guest.name}, without the driver: RSS {old >> 10}, then {now >> 10} MiB")
    # Its kernel uses a page now and then that it has not used yet.
    ktap.ok(old <= now <= old + 4096, f"{guest.name}, without the driver: its footprint has not changed", old, now)
    ktap.equal(guest.check("md5sum /tmp/kept"), digest, f"{guest.name}: nor has what is in it")
    calls = Dlh(guest.pid).all()
    ktap.equal((calls["submitted"], calls["executed"]), (0, 0), f"{guest.name}: and the host has done nothing for it")
for guest in plain + four:
    guest.kill()
remove_host_modules()
ktap.ok(not Path("/sys/module/kvm_dlh").exists(), "the host's modules go")
ktap.done()
