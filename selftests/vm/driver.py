# SPDX-License-Identifier: GPL-2.0
"""dlh_guest.ko in a guest, and what the host has of it. For use inside L1.

Where memory is used or checked, dlh-churn has to be among the guest's binaries.
"""

from __future__ import annotations

import re
import subprocess
import time
from typing import NamedTuple

from .find import directories
from .host import MODULES, Bridge, Dlh
from .patience import wait_until as wait_until
from .running import Running

DRIVER = MODULES / "dlh_guest.ko"
CHURN = MODULES.parent / "bin/dlh-churn"
# Arguments for a guest that reports soon after pages are freed, and whose CPUs keep few of them back: in
# the stock kernel's way a load can go on for long without a report.
EAGER = {
    "append": "page_reporting.page_reporting_delay_ms=100",
    "start": "echo 1000 > /proc/sys/vm/percpu_pagelist_high_fraction",
}
_STATS = "/sys/kernel/debug/dlh_guest/stats"


class Ring(NamedTuple):
    """A ring as the host knows it."""

    gpa: int
    done: int
    active: bool


class Check(NamedTuple):
    """What dlh-churn says of its data check."""

    laps: int
    mib: int
    wrong: int


def host_rings(guest: Running) -> dict[int, Ring]:
    """The rings the host has of a guest, by vCPU."""
    rings: dict[int, Ring] = {}
    if not (directory := Dlh(guest.pid).directory()):
        return rings
    for line in (directory / "rings").read_text().splitlines():
        found = re.match(r"(\d+) gpa=(0x\w+) .*done=(\d+) .*(active|detached)$", line)
        if not found:
            raise ValueError(f"{directory}/rings says {line!r}")
        rings[int(found[1])] = Ring(int(found[2], 16), int(found[3]), found[4] == "active")
    return rings


def stats(guest: Running) -> dict[str, int]:
    """The driver's own counters."""
    lines = guest.check(f"cat {_STATS}").splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def use_memory(guest: Running, mib: int = 16) -> None:
    """Takes memory and gives it back, on each CPU in turn, so that there is something to report."""
    guest.check(
        "for cpu in $(seq 0 $(($(nproc) - 1))); do "
        f"taskset $(printf %x $((1 << cpu))) dlh-churn fill --mib {mib} || exit; done"
    )


def fill(guest: Running, mib: int) -> None:
    """Takes memory and gives it back, once."""
    guest.check(f"dlh-churn fill --mib {mib}")


def free_mib(guest: Running) -> float:
    """What the guest's page allocator has."""
    return int(guest.check("awk '/^MemFree/ { print $2 }' /proc/meminfo")) / 1024


def freed_mib(guest: Running) -> float:
    """What the guest's page allocator has ever got back."""
    return int(guest.check("awk '/^pgfree / { print $2 }' /proc/vmstat")) / 256


# Seconds of the first pause after a report that failed; each that follows is twice as long, to the longest one.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0


def most_failures(seconds: float) -> int:
    """How many reports in a row may fail in so many seconds, the first one at once."""
    count, pause = 1, _FIRST_PAUSE
    while seconds > pause:
        count, seconds, pause = count + 1, seconds - pause, min(2 * pause, _LONGEST_PAUSE)
    return count


def settle(guest: Running, seconds: float = 4) -> None:
    """Waits until the guest has reported what it has free, but for single pages.

    How long is quiet enough is for the guest to say: one that gets little of the machine's time sleeps longer, and
    reports later.
    """
    bridge = Bridge(guest.pid)

    def quiet() -> bool:
        before = bridge.get("reported_pages")
        guest.check(f"sleep {seconds}")
        # The smallest blocks that are worth anything have so many; the command itself frees less.
        return bridge.get("reported_pages") - before < 512

    if not wait_until(quiet, pause=0):
        raise RuntimeError(f"{guest.name} does not stop reporting: {bridge.all()}")


def wait_more(guest: Running, name: str, than: int) -> tuple[dict[str, int], float]:
    """Uses memory until one of the driver's counters is past a value.

    Returns the counters, and how many seconds that took.
    """
    start = time.monotonic()
    seen: dict[str, int] = {}

    def more() -> bool:
        use_memory(guest)
        seen.update(stats(guest))
        return seen[name] > than

    wait_until(more, pause=0.2)
    return seen, time.monotonic() - start


def wait_above(counters: Dlh | Bridge, name: str, value: int) -> bool:
    """Waits for a counter of the host to be past a value; whether it is."""
    return wait_until(lambda: counters.get(name) > value)


def lawful(dlh: Dlh) -> bool:
    """Whether the law holds with nothing pending, which comes true at some time if no call is lost."""
    return wait_until(lambda: dlh.all() and dlh.get("pending") == 0 and dlh.check_law())


def check_command(laps: int, threads: int = 2, mib: int = 16, until: str = "") -> str:
    """The data check: it writes memory, waits, and verifies it, so often and until there is a file, if any."""
    return f"dlh-churn check --laps {laps} --threads {threads} --mib {mib}" + (f" --until {until}" if until else "")


def check_result(output: str) -> Check:
    """What the data check came to."""
    found = re.fullmatch(r"laps (\d+) mib (\d+) mismatches (\d+)\n", output)
    if not found:
        raise RuntimeError(f"dlh-churn said {output!r}")
    return Check(*map(int, found.groups()))


def check_data(guest: Running, laps: int = 10) -> Check:
    """Runs the data check in a guest."""
    return check_result(guest.run(check_command(laps)).output)


def begin_load(guest: Running, laps: int = 10, threads: int = 2) -> None:
    """Has the guest check data behind its shell, which stays free, until `end_load`, and for so many laps at least."""
    command = check_command(laps, threads, until="/tmp/stop")
    guest.check(f"rm -f /tmp/stop /tmp/over; ({command} > /tmp/load 2>&1; mv /tmp/load /tmp/over) &")


def end_load(guest: Running) -> Check:
    """Ends what `begin_load` started; what it came to."""
    guest.check("touch /tmp/stop")
    if not wait_until(lambda: guest.run("test -e /tmp/over").status == 0):
        raise RuntimeError(f"{guest.name}: the load does not end")
    return check_result(guest.check("cat /tmp/over"))


def forgotten(pid: int) -> bool:
    """Waits until neither KVM nor the modules know a VM of a VMM that has ended; whether that comes."""
    return wait_until(lambda: not any(directories(module, pid) for module in ("kvm", "kvm_dlh", "ksm_bridge")))


def host_log() -> str:
    """The host's kernel log."""
    return subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
