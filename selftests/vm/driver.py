# SPDX-License-Identifier: GPL-2.0
"""dlh_guest.ko in a guest, and what the host has of it. For use inside L1.

Where memory is used or checked, dlh-churn has to be among the guest's binaries.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .guest import Guest
from .host import DEBUGFS, MODULES, Bridge, Dlh

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


def host_rings(guest: Guest) -> dict[int, Ring]:
    """The rings the host has of a guest, by vCPU."""
    rings = {}
    for path in (DEBUGFS / "kvm_dlh").glob(f"{guest.pid}-*/rings"):
        for line in path.read_text().splitlines():
            found = re.match(r"(\d+) gpa=(0x\w+) .*done=(\d+) .*(active|detached)$", line)
            if not found:
                raise ValueError(f"{path} says {line!r}")
            rings[int(found[1])] = Ring(int(found[2], 16), int(found[3]), found[4] == "active")
    return rings


def stats(guest: Guest) -> dict[str, int]:
    """The driver's own counters."""
    lines = guest.check(f"cat {_STATS}").splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def use_memory(guest: Guest, mib: int = 16) -> None:
    """Takes memory and gives it back, on each CPU in turn, so that there is something to report."""
    guest.check(
        "for cpu in $(seq 0 $(($(nproc) - 1))); do "
        f"taskset $(printf %x $((1 << cpu))) dlh-churn fill --mib {mib} || exit; done"
    )


def fill(guest: Guest, mib: int) -> None:
    """Takes memory and gives it back, once."""
    guest.check(f"dlh-churn fill --mib {mib}", timeout=120)


def free_mib(guest: Guest) -> float:
    """What the guest's page allocator has."""
    return int(guest.check("awk '/^MemFree/ { print $2 }' /proc/meminfo")) / 1024


@contextmanager
def stalled(guest: Guest) -> Iterator[None]:
    """Has the host's worker that releases the guest's pages stand still; it must be there already."""
    group = Path("/sys/fs/cgroup") / f"stalled-{guest.pid}"
    group.mkdir()
    (group / "cgroup.type").write_text("threaded")
    try:
        (worker,) = (
            task.name
            for task in Path(f"/proc/{guest.pid}/task").iterdir()
            if (task / "comm").read_text().strip() == "ksm_bridge"
        )
        (group / "cgroup.threads").write_text(worker)
        (group / "cgroup.freeze").write_text("1")
        if not wait_until(lambda: "frozen 1" in (group / "cgroup.events").read_text()):
            raise RuntimeError(f"the worker of {guest.name} does not stop")
        yield
    finally:
        (group / "cgroup.freeze").write_text("0")
        for thread in (group / "cgroup.threads").read_text().split():
            (group.parent / "cgroup.threads").write_text(thread)
        group.rmdir()


def wait_more(guest: Guest, name: str, than: int, timeout: float = 30) -> tuple[dict[str, int], float]:
    """Uses memory until one of the driver's counters is past a value, or the time is up.

    Returns the counters, and how many seconds that took.
    """
    start = time.monotonic()
    while True:
        use_memory(guest)
        seen, seconds = stats(guest), time.monotonic() - start
        if seen[name] > than or seconds > timeout:
            return seen, seconds
        time.sleep(0.2)


def wait_until(condition: Callable[[], object], timeout: float = 30) -> bool:
    """Waits for a condition; whether it came true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def wait_above(counters: Dlh | Bridge, name: str, value: int, timeout: float = 30) -> bool:
    """Waits for a counter of the host to be past a value; whether it was in time."""
    return wait_until(lambda: counters.get(name) > value, timeout)


def lawful(dlh: Dlh, timeout: float = 30) -> bool:
    """Whether the law holds with nothing pending, which comes true at some time if no call is lost."""
    return wait_until(lambda: dlh.all() and dlh.get("pending") == 0 and dlh.check_law(), timeout)


def check_command(seconds: int, threads: int = 2, mib: int = 16) -> str:
    """The data check: it writes memory, waits, and verifies it, for some seconds."""
    return f"dlh-churn check --seconds {seconds} --threads {threads} --mib {mib}"


def check_result(output: str) -> Check:
    """What the data check came to."""
    found = re.fullmatch(r"laps (\d+) mib (\d+) mismatches (\d+)\n", output)
    if not found:
        raise RuntimeError(f"dlh-churn said {output!r}")
    return Check(*map(int, found.groups()))


def check_data(guest: Guest, seconds: int = 5) -> Check:
    """Runs the data check in a guest."""
    return check_result(guest.run(check_command(seconds), timeout=seconds + 60).output)


def begin_load(guest: Guest) -> None:
    """Has the guest check data all the time, until `end_load`."""
    command = check_command(5)
    guest.check(f"(while ! test -e /tmp/stop; do {command} || break; done > /tmp/load 2>&1; touch /tmp/over) &")


def end_load(guest: Guest, timeout: float = 60) -> Check:
    """Ends what `begin_load` started; the sum of what it came to."""
    guest.check("touch /tmp/stop")
    if not wait_until(lambda: guest.run("test -e /tmp/over").status == 0, timeout):
        raise RuntimeError(f"{guest.name}: the load does not end")
    checks = [check_result(line) for line in guest.check("cat /tmp/load").splitlines(keepends=True)]
    return Check(*map(sum, zip(*checks, strict=True)))


def begin_check(guest: Guest, seconds: int) -> None:
    """Starts the data check behind the guest's shell, which stays free; see `end_check`."""
    guest.check(f"(rm -f /tmp/checked; {check_command(seconds)} > /tmp/check 2>&1; mv /tmp/check /tmp/checked) &")


def end_check(guest: Guest, timeout: float = 120) -> Check:
    """Waits for the data check that `begin_check` started."""
    if not wait_until(lambda: guest.run("test -e /tmp/checked").status == 0, timeout):
        raise RuntimeError(f"{guest.name}: the data check does not end")
    return check_result(guest.check("cat /tmp/checked"))


def host_log() -> str:
    """The host's kernel log."""
    return subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
