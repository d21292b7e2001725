#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=3G timeout=300
"""What the driver's parameters promise is kept: order, batch and pace; and what is declined is retried.

An operation of the tests takes ksm_bridge's place: to keep reports pending, so that it is seen how much the guest has
lent and what waiting costs, and to decline for want of room.
"""

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vm import ktap
from vm.driver import (
    CHURN,
    DRIVER,
    EAGER,
    fill,
    free_mib,
    lawful,
    most_failures,
    settle,
    stats,
    use_memory,
    wait_above,
    wait_until,
)
from vm.guest import Guest
from vm.host import MODULES, Bridge, Dlh, insert_host_modules, remove_host_modules

PAGE = 4096
ORDERS = range(9, -1, -1)
BATCHES = (1, 5, 32)
ODD_OPERATION = MODULES.parent / "test-modules/odd_operation.ko"
# FREE_PAGES, with its feature bit.
FREE_PAGES = ("number=1", "feature=4")
# Declined with KVM_DLH_EBUSY.
BUSY = "status=-1109"
TRACE = "/sys/kernel/tracing"
# Sizes of the ranges that the driver looks at, counted in the guest.
PROBE = f"""
mount -t tracefs tracefs {TRACE}
echo 'p:dlh dlh_guest:dlh_guest_sg_bytes bytes=+0xc(%di):u32' > {TRACE}/kprobe_events
echo 'hist:keys=bytes' > {TRACE}/events/kprobes/dlh/trigger
echo 1 > {TRACE}/events/kprobes/dlh/enable
"""
WATCH_SECONDS = 5
# The longest there is.
TIMEOUT_MS = 60_000
FILL_MIB = 128
# The rest is in smaller blocks, or still with the CPU that freed it.
MOST_MIB = FILL_MIB * 0.6
PACE_MIB = 16
# By these the guest tells how much time it really gets, in seconds; and so many are a long time without a report.
TICK = 0.25
QUIET_TICKS = 8


def insert(guest: Guest, arguments: str) -> None:
    guest.check(f"insmod /dlh_guest.ko {arguments}")


def remove(guest: Guest) -> None:
    guest.check("rmmod dlh_guest")


def host(*command: str | Path) -> None:
    subprocess.run(command, check=True)


@contextmanager
def stalled() -> Iterator[None]:
    """Has the host take reports and not come to an end with them."""
    host("rmmod", "ksm_bridge")
    host("insmod", ODD_OPERATION, *FREE_PAGES, "hold=1")
    try:
        yield
    finally:
        Path("/sys/module/odd_operation/parameters/hold").write_text("0")
        host("rmmod", "odd_operation")
        host("insmod", MODULES / "ksm_bridge.ko")


def sizes(guest: Guest) -> dict[int, int]:
    """How often the driver has looked at ranges of each size since the last time, by pages."""
    text = guest.check(f"cd {TRACE}/events/kprobes/dlh && cat hist && echo 'hist:keys=bytes:clear' >> trigger")
    found = re.findall(r"bytes: +(\d+) \} hitcount: +(\d+)", text)
    return {int(size) // PAGE: int(count) for size, count in found}


def orders(guest: Guest, dlh: Dlh) -> None:
    """Each order is what is said and done: 10 results."""
    guest.check(PROBE)
    for order in ORDERS:
        seen: dict[int, int] = {}
        sizes(guest)

        def reported(order: int = order, seen: dict[int, int] = seen) -> bool:
            # As long as the guest waits with a report, and then some: by its own clock.
            guest.check("sleep 0.5")
            seen.update(sizes(guest))
            return 1 << order in seen

        insert(guest, f"order={order}")
        # What was reported before is not reported again: the smaller blocks come to light.
        while not (found := reported()) and stats(guest)["reports"] < 50:
            use_memory(guest, 1)
        says = f"reporting free blocks of order {order}, 32 at a time" in guest.check("dmesg | tail -n 3")
        counted = stats(guest)
        right = found and min(seen) == 1 << order and counted["ranges"] > 0 and counted["failed"] <= counted["declined"]
        ktap.ok(says and right, f"order {order}: blocks from {1 << order} pages on are reported", seen, counted)
        remove(guest)
    ktap.comment(f"order 0, ranges by pages: {seen}")


def run_ns(guest: Guest) -> int:
    """What the host's CPUs have run of the guest's, in nanoseconds."""
    tasks = Path(f"/proc/{guest.pid}/task")
    vcpus = [task for task in tasks.iterdir() if (task / "comm").read_text().startswith("CPU ")]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in vcpus)


def idle_cost(guest: Guest) -> tuple[float, float]:
    """How often a second the guest's vCPUs wake up, and milliseconds that they run, when nothing is asked of it."""
    time.sleep(1)
    start, halts, run = time.monotonic(), guest.kvm_stat("halt_exits"), run_ns(guest)
    time.sleep(WATCH_SECONDS)
    halts, run, took = guest.kvm_stat("halt_exits") - halts, run_ns(guest) - run, time.monotonic() - start
    return halts / took, run / took / 1e6


def fragment(guest: Guest) -> None:
    """Frees pages that have no free neighbours."""
    guest.check("cd /tmp; for i in $(seq 400); do echo > page$i; done; rm page*[13579]")


def batches(guest: Guest, dlh: Dlh) -> None:
    """No more is lent than a batch: 3 * 2 results."""
    for batch in BATCHES:
        fragment(guest)
        with stalled():
            start = time.monotonic()
            insert(guest, f"order=0 batch={batch} timeout_ms={TIMEOUT_MS}")
            wait_until(lambda batch=batch: dlh.get("pending") >= batch)
            pending = set()
            for _ in range(20):
                pending.add(dlh.get("pending"))
                time.sleep(0.05)
        ktap.equal(pending, {batch}, f"batch {batch}: so many calls wait while the host stands still")
        took = time.monotonic() - start
        wait_until(lambda: stats(guest)["ranges"] > 0)
        lawful(dlh)
        seen = stats(guest)
        # The counters are not read all at the same time.
        kept = 0 < seen["ranges"] <= batch * (seen["reports"] + 1)
        ktap.ok(kept and seen["kicks"] <= took * 1000 // TIMEOUT_MS, f"batch {batch}: it is kept by every report", seen)
        remove(guest)


def waiting(guest: Guest, dlh: Dlh) -> None:
    """Waiting keeps a batch from the guest and costs it no CPU: 4 results."""
    fill(guest, 96)
    before = free_mib(guest)
    idle = idle_cost(guest)
    with stalled():
        insert(guest, f"order=9 batch=8 timeout_ms={TIMEOUT_MS}")
        ktap.ok(wait_until(lambda: dlh.get("pending") == 8), "8 blocks of 2 MiB and more are lent")
        held = before - free_mib(guest)
        cost = idle_cost(guest)
        still = dlh.get("pending")
    back = wait_until(lambda: before - free_mib(guest) < 5)
    after = free_mib(guest)
    ktap.comment(f"{before:.0f} MiB free, {held:.1f} MiB less while 8 blocks are lent, {after:.0f} MiB free after")
    ktap.ok(still == 8 and 15 < held < 36, "and no more", still, held)
    ktap.ok(back, "they come back when the host is done", before, after)
    ktap.comment(f"wake-ups and ms of CPU a second: {idle} when idle, {cost} when waiting")
    # A look every 16 ms makes 60 wake-ups a second more. One that does not sleep makes none, and has the CPU all the time:
    # a busy machine, on which everything takes longer, makes less of the difference, but does not turn it round.
    ktap.ok(cost[0] < idle[0] + 20 and cost[1] < idle[1] + 500, "waiting takes no CPU", idle, cost)
    remove(guest)


class Look(NamedTuple):
    """What was seen, some time between two times."""

    since: float
    mib: float
    until: float


def look(bridge: Bridge) -> Look:
    """How many MiB have been merged."""
    since = time.monotonic()
    mib = bridge.get("merged_pages") / 256
    return Look(since, mib, time.monotonic())


def ticks(guest: Guest) -> int:
    """How often the process that `paced` starts has been woken."""
    return int(guest.check("cat /tmp/ticks 2>/dev/null | wc -l"))


def follow(guest: Guest) -> list[Look]:
    """How many MiB are merged at what time, until nothing more is reported."""
    bridge = Bridge(guest.pid)
    seen = [look(bridge)]
    quiet = 0
    while quiet < QUIET_TICKS:
        begin = ticks(guest)
        for _ in range(5):
            time.sleep(0.05)
            if (now := look(bridge)).mib != seen[-1].mib:
                seen.append(now)
                quiet = 0
        quiet += ticks(guest) - begin
    return seen


def paced(guest: Guest, mib: int) -> tuple[float, list[Look]]:
    """Inserts the driver when there is much to report; MiB a second of the guest's own, and the curve."""
    fill(guest, FILL_MIB)
    # A process that is woken as often, and gets as little of a busy machine's time, as the driver.
    guest.check(f"rm -f /tmp/ticks /tmp/ticked; (while ! test -e /tmp/ticked; do sleep {TICK}; echo >> /tmp/ticks; done) &")
    begin = ticks(guest)
    # Blocks of 4 MiB at most, one at a time.
    insert(guest, f"order=9 batch=1 pace_mib={mib}")
    curve = follow(guest)
    seconds = (ticks(guest) - begin - QUIET_TICKS) * TICK
    guest.check(f"touch /tmp/ticked; sleep {2 * TICK}")
    merged = curve[-1].mib - curve[0].mib
    ktap.comment(f"pace {mib}: {merged:.0f} MiB in {curve[-1].until - curve[0].since:.1f} s, {seconds:.1f} s of the guest")
    return merged / max(seconds, TICK), curve


def pace(guest: Guest) -> None:
    """No more is reported in a second than was said, all in the end, and then there is peace: 4 results."""
    _, curve = paced(guest, 0)
    put_off = stats(guest)["paced"]
    ktap.ok(curve[-1].mib - curve[0].mib > MOST_MIB and not put_off, "without a pace no report is put off", put_off, curve)
    remove(guest)
    average, curve = paced(guest, PACE_MIB)
    # What is saved up in a second, and a block. Between two looks is the longest time that may lie between them.
    excess = max(
        later.mib - sooner.mib - PACE_MIB * (later.until - sooner.since + 1) - 4
        for i, sooner in enumerate(curve)
        for later in curve[i:]
    )
    kept = excess <= PACE_MIB * 0.1 and average > PACE_MIB * 0.5
    ktap.ok(kept, f"at most {PACE_MIB} MiB are reported in a second, and not much less", excess, average, curve)
    before = after = stats(guest)

    def quiet() -> bool:
        nonlocal before, after
        before = stats(guest)
        guest.check("sleep 4")
        after = stats(guest)
        return after["reports"] - before["reports"] <= 1 and after["paced"] == before["paced"]

    peace = wait_until(quiet, pause=0)
    ktap.comment(f"{after['paced']} reports put off, {after['reports']} made, {after['failed']} failed")
    ktap.ok(peace and after["paced"] > 3, "in the end nothing is tried any more", before, after)
    remove(guest)
    insert(guest, "order=9")
    guest.check("sleep 2")
    # Of what the guest frees by itself meanwhile a page makes a whole block count as new, with its neighbours.
    rest = stats(guest)
    all_mib = curve[-1].mib - curve[0].mib
    ktap.ok(rest["pages"] / 256 < all_mib / 4, "since all was reported", all_mib, rest)
    remove(guest)


def come_back(guest: Guest, what: str) -> None:
    """The host takes pages again, and nothing is asked of the guest: 1 result."""
    bridge, start = Bridge(guest.pid), time.monotonic()
    before = guest.rss_kib()
    found = wait_until(lambda: bridge.get("merged_pages") > MOST_MIB * 256)
    ktap.comment(
        f"{what}: {bridge.get('merged_pages') // 256} MiB after {time.monotonic() - start:.1f} s, "
        f"RSS {before // 1024} MiB, then {guest.rss_kib() // 1024} MiB"
    )
    ktap.ok(found, f"{what}: after its end all is reported, without anything being freed", bridge.all())


def retries(guest: Guest, dlh: Dlh) -> None:
    """What the host declines, or nobody is there to take, is reported later: 2 + 2 + 1 results."""
    insert(guest, "order=9 timeout_ms=300")
    settle(guest, 1)
    start = time.monotonic()
    host("rmmod", "ksm_bridge")
    host("insmod", ODD_OPERATION, *FREE_PAGES, BUSY)
    declined = dlh.get("declined")
    fill(guest, FILL_MIB)
    wait_above(dlh, "declined", declined)
    # The guest's own memory that is freed meanwhile does not matter.
    use_memory(guest, 8)
    wait_until(lambda: stats(guest)["failed"] >= 5)
    seen, took = stats(guest), time.monotonic() - start
    tries = seen["failed"]
    # The pauses get longer. A busy machine takes longer, too, and allows no more.
    most = 1 + most_failures(took)
    ktap.comment(f"no room: {dlh.get('declined') - declined} calls declined in {took:.1f} s, {seen}")
    right = 5 <= tries <= most and seen["lost"] == 0
    ktap.ok(right, "no room: it is tried again, less and less often", most, seen)
    host("rmmod", "odd_operation")
    host("insmod", MODULES / "ksm_bridge.ko")
    come_back(guest, "no room")

    remove_host_modules()
    fill(guest, FILL_MIB)
    wait_until(lambda: stats(guest)["failed"] > tries + 2)
    seen = stats(guest)
    ktap.equal((seen["lost"], seen["rings"]), (1, 0), "no host: all rings are given back with the first that is lost")
    insert_host_modules()
    come_back(guest, "no host")
    ktap.ok(lawful(dlh), "no call is lost", dlh.all())


ktap.plan(10 + 6 + 4 + 4 + 5)
insert_host_modules()
with Guest(mem="384M", smp=2, files={"dlh_guest.ko": DRIVER}, binaries=[CHURN], **EAGER) as machine:
    calls = Dlh(machine.pid)
    orders(machine, calls)
    batches(machine, calls)
    waiting(machine, calls)
    pace(machine)
    retries(machine, calls)
remove_host_modules()
ktap.done()
