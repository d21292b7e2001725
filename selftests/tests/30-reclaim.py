#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=4G timeout=300
"""A guest fills its memory and frees it; the host gets it back, and no exit is made for that.

KVM's own counters tell of the exits. A guest makes some anyhow, for its timers: a second guest without
the driver, otherwise the same, does the same in the same host and shows how many.
"""

import time

from vm import ktap
from vm.guest import Guest
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules

FILL_MIB = 320
BINARY = "/src/kvm-dlh/build/bin/dlh-churn"
DRIVER = "/src/kvm-dlh/build/modules/dlh_guest.ko"
# What a call to the host would be counted as: a hypercall, or port or memory-mapped input and output.
CALLS = ("hypercalls", "io_exits", "mmio_exits")
WATCH_SECONDS = 20


def fill_and_free(guest: Guest) -> None:
    guest.check(f"(sleep 3; echo) | dlh-churn fill --mib {FILL_MIB}", timeout=120)


def watch(guest: Guest, goal_kib: float) -> tuple[dict[str, int], float]:
    """What KVM counts in the seconds after freeing, in which nothing is asked of the guest."""
    names = (*CALLS, "exits", "halt_exits")
    before = {name: guest.kvm_stat(name) for name in names}
    start, reached = time.monotonic(), float("inf")
    while time.monotonic() - start < WATCH_SECONDS:
        if guest.rss_kib() <= goal_kib:
            reached = min(reached, time.monotonic() - start)
        time.sleep(0.25)
    return {name: guest.kvm_stat(name) - before[name] for name in names}, reached


ktap.plan(11)
insert_host_modules()
with Guest(mem="512M", binaries=[BINARY]) as control:
    fill_and_free(control)
    full = control.rss_kib()
    usual, _ = watch(control, 0)
    ktap.comment(f"without the driver: RSS stays at {control.rss_kib() // 1024} MiB, {usual}")
    ktap.ok(control.rss_kib() > full * 0.95, "a guest without the driver keeps its footprint")
    known = Dlh(control.pid).all()
    ktap.equal((known["hypercalls"], known["submitted"]), (0, 0), "and has asked nothing of the module")

with Guest(mem="512M", modules=[DRIVER], binaries=[BINARY]) as guest:
    dlh, bridge = Dlh(guest.pid), Bridge(guest.pid)
    dlh.settle()
    before = guest.rss_kib()
    fill_and_free(guest)
    full = guest.status_kib("VmHWM")
    calls, merged = dlh.get("executed"), bridge.get("merged_pages")
    counted, seconds = watch(guest, before * 1.1)
    after = guest.rss_kib()
    calls, merged = dlh.get("executed") - calls, bridge.get("merged_pages") - merged
    ktap.comment(f"RSS before {before // 1024}, full {full // 1024}, after {after // 1024} MiB")
    ktap.comment(f"{calls} deferred calls, {merged // 256} MiB merged, within 10 % after {seconds:.1f} s, {counted}")
    ktap.ok(full > before + FILL_MIB * 1024 * 0.95, "the footprint grew by what was filled")
    ktap.ok(after <= before * 1.1, "the footprint is back within 10 % of what it was", before, after)
    ktap.ok(calls > 0 and merged > (FILL_MIB - 64) * 256 * 0.5, "by deferred calls", calls, merged)
    for name in CALLS:
        ktap.ok(counted[name] <= usual[name], f"KVM counts no {name} more than without", counted[name], usual[name])
    ktap.equal(dlh.get("kicks"), 0, "the guest never had to call")
    extra = counted["exits"] - usual["exits"]
    # Sleeping until the host is done takes a timer: a few exits for each report of up to 32 blocks.
    ktap.ok(extra < 2000, "all exits, timers included, stay near those of a guest without the driver", extra)
    ktap.ok(dlh.check_law(), "submitted = executed + declined + dropped + pending", dlh.all())
remove_host_modules()
ktap.done()
