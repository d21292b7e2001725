#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=4G timeout=300
"""A guest fills its memory and frees it; the host gets it back, and no exit is made for that.

KVM's own counters tell of the exits. A guest makes some anyhow, for its timers: a second guest without
the driver, otherwise the same, does the same in the same host, for as long, and shows how many.
"""

import time
from collections.abc import Callable

from vm import ktap
from vm.driver import fill, lawful, settle, stats
from vm.guest import Guest
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules
from vm.patience import wait_until

FILL_MIB = 320
BINARY = "/src/kvm-dlh/build/bin/dlh-churn"
DRIVER = "/src/kvm-dlh/build/modules/dlh_guest.ko"
# What a call to the host would be counted as: a hypercall, or port or memory-mapped input and output.
CALLS = ("hypercalls", "io_exits", "mmio_exits")
# How long the memory that is to be freed is still kept when the guest is asked for nothing more.
KEPT_SECONDS = 5
# Freeing that has begun before anyone looked is done again.
ATTEMPTS = 5


def free_alone(guest: Guest) -> None:
    """Has the guest free memory a while after this has returned, so that nothing is asked of it then."""
    guest.check(
        "rm -f /tmp/filled; "
        f"((while ! test -s /tmp/filled; do sleep 0.2; done; sleep {KEPT_SECONDS}) | "
        f"dlh-churn fill --mib {FILL_MIB} > /tmp/filled; touch /tmp/freed) & "
        "while ! test -s /tmp/filled; do sleep 0.1; done"
    )


def watch(guest: Guest, until: Callable[[], bool], seconds: float) -> tuple[dict[str, int], float]:
    """What KVM counts until something has come true, and for so many seconds at least; and how many those were."""

    def exits() -> dict[str, int]:
        counted = {name: guest.kvm_stat(name) for name in (*CALLS, "exits", "irq_exits")}
        # An interrupt of the host's ends the guest's turn: how often depends on how long the guest takes.
        counted["own exits"] = counted["exits"] - counted["irq_exits"]
        return counted

    before, start = exits(), time.monotonic()
    wait_until(until, pause=0.25)
    time.sleep(max(0.0, start + seconds - time.monotonic()))
    after, took = exits(), time.monotonic() - start
    return {name: count - before[name] for name, count in after.items()}, took


ktap.plan(11)
insert_host_modules()
with Guest(mem="512M", modules=[DRIVER], binaries=[BINARY]) as guest:
    dlh, bridge = Dlh(guest.pid), Bridge(guest.pid)
    settle(guest)
    before = guest.rss_kib()
    calls, merged = dlh.get("executed"), bridge.get("merged_pages")
    for _ in range(ATTEMPTS):
        free_alone(guest)
        seen = dlh.get("executed")
        counted, took = watch(guest, lambda: dlh.get("executed") > seen and guest.rss_kib() <= before * 1.1, 10)
        # Else most of it was over before: the machine is busy.
        if watched := dlh.get("executed") - seen >= FILL_MIB // 8:
            break
    after, full = guest.rss_kib(), guest.status_kib("VmHWM")
    calls, merged = dlh.get("executed") - calls, bridge.get("merged_pages") - merged
    ktap.comment(f"RSS before {before // 1024}, full {full // 1024}, after {after // 1024} MiB")
    ktap.comment(f"{calls} deferred calls, {merged // 256} MiB merged, watched for {took:.1f} s, {counted}")
    ktap.ok(full > before + FILL_MIB * 1024 * 0.95, "the footprint grew by what was filled")
    ktap.ok(after <= before * 1.1, "the footprint is back within 10 % of what it was", before, after)
    enough = calls > 0 and merged > (FILL_MIB - 64) * 256 * 0.5
    ktap.ok(enough and watched, "by deferred calls", calls, merged, watched)
    ktap.equal(dlh.get("kicks"), 0, "the guest never had to call")
    reports = stats(guest)["reports"]
    ktap.ok(lawful(dlh), "submitted = executed + declined + dropped + pending", dlh.all())

with Guest(mem="512M", binaries=[BINARY]) as control:
    # Memory that it has used once is in the footprint for good.
    fill(control, FILL_MIB)
    free_alone(control)
    full = control.rss_kib()
    usual, _ = watch(control, lambda: True, took)
    ktap.comment(f"without the driver: RSS stays at {control.rss_kib() // 1024} MiB, {usual}")
    ktap.ok(control.rss_kib() > full * 0.95, "a guest without the driver keeps its footprint")
    known = Dlh(control.pid).all()
    ktap.equal((known["hypercalls"], known["submitted"]), (0, 0), "and has asked nothing of the module")
for name in CALLS:
    ktap.ok(counted[name] <= usual[name], f"KVM counts no {name} more than without", counted[name], usual[name])
extra = counted["own exits"] - usual["own exits"]
# Sleeping until the host is done takes a timer: a few exits for each report of up to 32 blocks.
most = 50 * reports + 500
ktap.ok(extra < most, "all exits, timers included, stay near those of a guest without the driver", extra, most)
remove_host_modules()
ktap.done()
