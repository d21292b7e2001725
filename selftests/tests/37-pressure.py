#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=6G timeout=700
"""The data check where memory is short: in the guest, which swaps, and in the host, which swaps the guest.

The guest has two CPUs and reports at order 0. stress-ng keeps its allocator busy in ways of its own, and verifies
its memory too. Then two guests have equal pages, which the host's KSM has merged; those pages are reported.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vm import ktap
from vm.driver import (
    CHURN,
    DRIVER,
    EAGER,
    Check,
    begin_load,
    check_command,
    check_result,
    end_load,
    lawful,
    stats,
    wait_until,
)
from vm.guest import Guest
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules
from vm.memory import MemoryCgroup, hold, host_vmstat, let_go, make_ram_disks, swap_on

# What a guest needs for stress-ng, by its paths there.
STRESS_NG = CHURN.parents[1] / "stress-ng"
KSM = Path("/sys/kernel/mm/ksm")
CHECK = check_command(12, threads=3, mib=24)
STRESS = (
    "stress-ng --timeout 12 --verify --oomable --temp-path /tmp --vm 1 --vm-bytes 48M "
    "--malloc 1 --malloc-bytes 32M --memfd 1 --memfd-bytes 16M --mmap 1 --mmap-bytes 24M --fork 1"
)
# What the data check and stress-ng find available in the guest: less than they use.
SPARE_MIB = 40
FILL_MIB = 128
EQUAL_MIB = 8
ARGUMENTS: dict[str, Any] = {
    "smp": 2,
    "binaries": [CHURN],
    "modules": [f"{DRIVER} order=0 timeout_ms=300", "virtio_blk"],
    # A guest that its host swaps stands still now and then.
    "append": f"{EAGER['append']} nowatchdog rcupdate.rcu_cpu_stall_suppress=1",
}


def vmstat(guest: Guest, *names: str) -> int:
    """Counters of the guest's /proc/vmstat whose names begin so, summed."""
    lines = guest.check("cat /proc/vmstat").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(names))


def racing(guest: Guest, what: str, stress: bool, is_short: Callable[[], bool]) -> None:
    """Memory is used, reported, merged and verified at the same time, until it has been short: 4 results."""
    dlh, bridge = Dlh(guest.pid), Bridge(guest.pid)
    beside = f"({STRESS} > /tmp/stress 2>&1; echo $? > /tmp/stressed) & " if stress else ""
    begun = bridge.get("merged_pages")
    found = check_result(guest.run(f"{beside}{CHECK}; status=$?; wait; exit $status").output)

    def enough() -> bool:
        """Until memory has been used, merged, and short, whoever has been fast or slow."""
        nonlocal found
        if bridge.get("merged_pages") - begun > 1024 and is_short():
            return True
        found = Check(*map(sum, zip(found, check_result(guest.run(CHECK).output), strict=True)))
        return False

    wait_until(enough, pause=0)
    merged = bridge.get("merged_pages") - begun
    ktap.comment(f"{what}: {found}, {merged >> 8} MiB merged meanwhile; driver {stats(guest)}")
    ktap.ok(found.laps > 4 and merged > 1024, f"{what}: memory is used and merged at the same time", found, merged)
    ktap.equal(found.wrong, 0, f"{what}: every word is what was written")
    if stress:
        right = guest.check("cat /tmp/stressed") == "0\n"
        said = guest.check("tail -n 20 /tmp/stress")
        ktap.ok(right and "failed: 0" in said, f"{what}: stress-ng finds its memory right, too", said)
    else:
        ktap.skip("no build/stress-ng (make stress-ng)", f"{what}: stress-ng finds its memory right, too")
    ktap.ok(lawful(dlh), f"{what}: no call is lost", dlh.all())


def swapping(guest: Guest, cgroup: MemoryCgroup, stress: bool) -> None:
    """The guest is short of memory, then the host: 2 * 5 + 3 results."""
    names = ("pswpout", "allocstall", "oom_kill")
    before = [vmstat(guest, name) for name in names]
    available = int(guest.check("awk '/^MemAvailable/ { print $2 }' /proc/meminfo")) >> 10
    filled = hold(guest, available - SPARE_MIB)

    def counted() -> list[int]:
        return [vmstat(guest, name) - old for name, old in zip(names, before, strict=True)]

    def guest_is_short() -> bool:
        swapped, stalled, _ = counted()
        return swapped > 1000 and stalled > 10

    racing(guest, "a guest that swaps", stress, guest_is_short)
    let_go(guest)
    swapped, stalled, killed = counted()
    ktap.comment(f"{swapped} pages swapped out by the guest, {stalled} allocations reclaimed for themselves")
    short = filled and swapped > 1000 and stalled > 10 and not killed
    ktap.ok(short, "a guest that swaps: it was short of memory", swapped, stalled, killed)

    size = cgroup.mib("current")
    out = host_vmstat("pswpout")
    cgroup.limit(size // 2)
    racing(guest, "a host that swaps", stress, lambda: host_vmstat("pswpout") - out > 1000)
    out = host_vmstat("pswpout") - out
    ktap.comment(f"{size // 2} of {size} MiB allowed, {cgroup.mib('swap.current')} MiB in swap, {out} pages written")
    ktap.ok(out > 1000, "a host that swaps: it was short of memory", out)

    # Pages that the host has swapped out are freed by the guest, which does not touch them for that.
    cgroup.limit(1024)
    filled = hold(guest, FILL_MIB)
    cgroup.limit(cgroup.mib("current") - FILL_MIB)
    swap, into = cgroup.mib("swap.current"), host_vmstat("pswpin")
    let_go(guest)
    freed = wait_until(lambda: cgroup.mib("swap.current") < swap - FILL_MIB // 2)
    left, into = cgroup.mib("swap.current"), host_vmstat("pswpin") - into
    ktap.comment(f"{swap} MiB in swap, {left} after the guest freed {FILL_MIB}; {into >> 8} MiB read meanwhile")
    ktap.ok(filled and freed, "what the host has swapped out is freed when it is reported", swap, left)
    ktap.ok(into < (swap - left) << 6, "and not read in for that", into)
    ktap.ok(lawful(Dlh(guest.pid)), "no call is lost", Dlh(guest.pid).all())


def ksm(name: str) -> int:
    """One of KSM's numbers."""
    return int((KSM / name).read_text())


def digests(guest: Guest) -> set[str]:
    """Those of a guest's files that are equal; one if they are."""
    return {line.split()[0] for line in guest.check("md5sum /equal /tmp/equal").splitlines()}


def merged_by_ksm(pair: list[Guest]) -> None:
    """Guests with equal pages report some of them: 4 + 2 * 2 results."""
    pages = EQUAL_MIB << 8
    for name, value in (("sleep_millisecs", 10), ("pages_to_scan", 1000), ("smart_scan", 0), ("run", 1)):
        (KSM / name).write_text(str(value))
    first, second = pair
    for guest in pair:
        guest.check("cp /equal /tmp/equal")
    scans = ksm("full_scans")
    # Pages are merged when a scan finds them as the one before did.
    wait_until(lambda: ksm("full_scans") > scans + 3 and ksm("pages_sharing") > 3 * pages)
    full = ksm("pages_sharing")
    # There are four copies of each page.
    ktap.ok(full > 3 * pages, "KSM merges pages of two guests", full)
    merged = {guest: Bridge(guest.pid).get("merged_pages") for guest in pair}
    for guest in pair:
        begin_load(guest)
    second.check("rm /tmp/equal")
    fallen = wait_until(lambda: ksm("pages_sharing") < full - pages // 2)
    low = ksm("pages_sharing")
    ktap.ok(fallen, "it has fewer when one of them reports its own free", full, low)
    ktap.equal(len(digests(first)), 1, "which the other one keeps")
    second.check("cp /equal /tmp/equal")
    more = wait_until(lambda: ksm("pages_sharing") > low + pages // 2)
    ktap.comment(f"pages KSM saves: {full}, then {low}, then {ksm('pages_sharing')}; {pages} are in a file")
    ktap.ok(more and len(digests(second)) == 1, "and it goes on merging", low, ksm("pages_sharing"))
    for guest in pair:
        found = end_load(guest)
        done = Bridge(guest.pid).get("merged_pages") - merged[guest]
        ktap.comment(f"{guest.name}: {found}, {done >> 8} MiB merged meanwhile")
        ktap.ok(found.laps > 4 and done > 1024, f"{guest.name}: memory is used, and merged by both", found, done)
        ktap.equal(found.wrong, 0, f"{guest.name}: every word is what was written")
    (KSM / "run").write_text("0")


ktap.plan(13 + 8)
insert_host_modules()
host_swap, guest_swap = make_ram_disks(2, 512)
swap_on(host_swap)
stress_files = {str(path.relative_to(STRESS_NG)): path for path in STRESS_NG.rglob("*") if path.is_file()}
cgroup = MemoryCgroup("guest")
with cgroup:
    guest = Guest(
        mem="288M",
        files=stress_files,
        start=f"{EAGER['start']}; mkswap /dev/vda && swapon /dev/vda",
        qemu=[
            *("-blockdev", f"host_device,node-name=swap,filename={guest_swap},cache.direct=on"),
            *("-device", "virtio-blk-pci,drive=swap"),
        ],
        **ARGUMENTS,
    )
with guest:
    swapping(guest, cgroup, bool(stress_files))
cgroup.remove()
equal = Path("/tmp/equal")
equal.write_bytes(os.urandom(EQUAL_MIB << 20))
pair = [Guest(mem="160M", files={"equal": equal}, start=EAGER["start"], **ARGUMENTS) for _ in range(2)]
with pair[0], pair[1]:
    merged_by_ksm(pair)
remove_host_modules()
ktap.done()
