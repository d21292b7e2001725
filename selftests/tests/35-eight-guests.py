#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=6G timeout=400
"""Eight guests share a host: four report their free pages, two have no driver, two are killed in the middle.

Of the killed ones, one is filling its memory and the other one has calls pending. The first four get their
footprint back, and their processes find what they wrote; the plain guests keep theirs, and what is in it.
"""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vm import ktap
from vm.driver import CHURN, DRIVER, EAGER, check_command, check_result, lawful, stats, wait_until
from vm.guest import Guest
from vm.host import DEBUGFS, Bridge, Dlh, insert_host_modules, remove_host_modules

FILL_MIB = 96
KEPT_MIB = 48
CHECK_SECONDS = 15
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


def settle(guests: Sequence[Guest], quiet: float = 4, timeout: float = 60) -> None:
    """Waits until none of them has had a call executed for some seconds."""
    deadline, last, since = time.monotonic() + timeout, [-1], time.monotonic()
    while time.monotonic() - since < quiet and time.monotonic() < deadline:
        now = [Dlh(guest.pid).get("executed") for guest in guests]
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.5)


def kill_filling(guest: Guest) -> str:
    """Kills a VMM whose guest has filled some of what it is about to."""
    before = guest.rss_kib()
    guest.begin(f"dlh-churn fill --mib {FILL_MIB}")
    # Looked at often: on a host with one CPU the guest fills a lot between two looks.
    deadline = time.monotonic() + 60
    while not (some := guest.rss_kib() > before + FILL_MIB * 256) and time.monotonic() < deadline:
        time.sleep(0.005)
    grown = guest.rss_kib() - before
    guest.process.kill()
    return f"filling: {grown >> 10} of {FILL_MIB} MiB" if some and grown < FILL_MIB * 1024 else ""


def kill_reporting(guest: Guest) -> str:
    """Kills a VMM in the middle of reports: calls are pending."""
    dlh = Dlh(guest.pid)
    executed = dlh.get("executed")
    guest.begin("while true; do dlh-churn check --seconds 1000 --threads 1 --mib 24; done")
    wait_until(lambda: dlh.get("executed") > executed + 100, 30)
    # No pause in between: calls do not stay pending for long, and on one CPU this has to interrupt the worker.
    deadline = time.monotonic() + 40
    while not (pending := dlh.get("pending")) and time.monotonic() < deadline:
        pass
    guest.process.kill()
    return f"reporting: {pending} calls pending" if pending else ""


def forgotten(guest: Guest) -> bool:
    """Whether neither KVM nor the modules know a VMM's VM any more."""
    return wait_until(lambda: not any(DEBUGFS.glob(f"k*/{guest.pid}-*")))


def workers(guest: Guest) -> int:
    """How many threads of the bridge a VMM has."""
    ps = subprocess.run(["ps", "-L", "-o", "comm=", "-p", str(guest.pid)], capture_output=True, text=True)
    return sum(name.startswith("ksm_bridge") for name in ps.stdout.splitlines())


def keep(guest: Guest) -> str:
    """Fills a file in the guest's memory with what nobody could guess; returns its digest."""
    return guest.check(f"head -c {KEPT_MIB << 20} /dev/urandom > /tmp/kept && md5sum /tmp/kept", timeout=120)


ktap.plan(6 + 4 * 5 + 2 * 3 + 1)
insert_host_modules()
drivers = [{**PLAIN, "modules": [f"{DRIVER} order={order} timeout_ms=300"]} for order in (*ORDERS, 0, 0)]
start = time.monotonic()
eight = boot([PLAIN, PLAIN, *drivers])
plain, four, killed = eight[:2], eight[2:6], eight[6:]
ktap.comment(f"eight guests booted in {time.monotonic() - start:.0f} s")
digests = [keep(guest) for guest in plain]
settle(four)
before = {guest: guest.rss_kib() for guest in eight}
merged = {guest: Bridge(guest.pid).get("merged_pages") for guest in four}

# What fills the memory of the four goes on after the others are killed.
loads = [
    guest.begin(f"(sleep 4; echo) | dlh-churn fill --mib {FILL_MIB} >&2; {check_command(CHECK_SECONDS, 1)}")
    for guest in four
]
for action, guest in zip((kill_filling, kill_reporting), killed, strict=True):
    what = action(guest)
    ktap.ok(what, f"a VMM is killed, {action.__name__.removeprefix('kill_')}")
    ktap.comment(what)
    guest.kill()
    ktap.ok(forgotten(guest), "neither KVM nor the modules know its VM any more", [*DEBUGFS.glob("k*/*-*")])
ktap.equal([*map(workers, killed + four)], [0, 0, 1, 1, 1, 1], "their workers are gone, the others have one each")
known = {path.name.split("-")[0] for path in (DEBUGFS / "ksm_bridge").glob("*-*")}
ktap.equal(known, {str(guest.pid) for guest in four}, "the bridge knows the guests that report, and no others")
halfway = {guest: Bridge(guest.pid).get("merged_pages") for guest in four}

for guest, order, load in zip(four, ORDERS, loads, strict=True):
    output = guest.finish(load, timeout=CHECK_SECONDS + 90).output
    found = check_result(output.removeprefix(f"filled {FILL_MIB} MiB\n"))
    ktap.ok(found.laps > 0 and found.wrong == 0, f"{guest.name}: every word is what was written", found)
    ktap.comment(f"{guest.name} (order {order}): {found}")
# On a slow host all that may have been over before the others were killed: what comes now is not.
again = f"dlh-churn fill --mib {FILL_MIB} < /dev/null >&2 && {check_command(4, 1)}"
for guest, load in zip(four, [guest.begin(again) for guest in four], strict=True):
    output = guest.finish(load, timeout=120).output.removeprefix(f"filled {FILL_MIB} MiB\n")
    if wrong := check_result(output).wrong:
        raise RuntimeError(f"{guest.name}: {wrong} wrong words")
settle(four)
for guest, order in zip(four, ORDERS, strict=True):
    old, full, now = before[guest], guest.status_kib("VmHWM"), guest.rss_kib()
    pages = Bridge(guest.pid).get("merged_pages") - merged[guest]
    ktap.comment(f"{guest.name}: RSS {old >> 10}, full {full >> 10}, after {now >> 10} MiB; {pages >> 8} MiB merged")
    ktap.ok(full > old + FILL_MIB * 1024 * 0.8, f"{guest.name}: its footprint grew", old, full)
    ktap.ok(now <= old + (full - old) // 4, f"{guest.name}: three quarters of that, and more, came back", old, full, now)
    seen = stats(guest)
    later = pages + merged[guest] - halfway[guest]
    right = pages > FILL_MIB << 7 and later > 0 and seen["failed"] == seen["lost"] == 0
    ktap.ok(right, f"{guest.name}: by reports, which go on after the others were killed", pages, later, seen)
    ktap.ok(lawful(Dlh(guest.pid)), f"{guest.name}: no call is lost", Dlh(guest.pid).all())

for guest, digest in zip(plain, digests, strict=True):
    old, now = before[guest], guest.rss_kib()
    ktap.comment(f"{guest.name}, without the driver: RSS {old >> 10}, then {now >> 10} MiB")
    # Its kernel uses a page now and then that it has not used yet.
    ktap.ok(old <= now <= old + 4096, f"{guest.name}, without the driver: its footprint has not changed", old, now)
    ktap.equal(guest.check("md5sum /tmp/kept", timeout=120), digest, f"{guest.name}: nor has what is in it")
    calls = Dlh(guest.pid).all()
    ktap.equal((calls["submitted"], calls["executed"]), (0, 0), f"{guest.name}: and the host has done nothing for it")
for guest in plain + four:
    guest.kill()
remove_host_modules()
ktap.ok(not Path("/sys/module/kvm_dlh").exists(), "the host's modules go")
ktap.done()
