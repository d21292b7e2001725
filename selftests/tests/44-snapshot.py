#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=5G timeout=600
"""A guest goes back to what it was, in the same VM and in another one, with rings that the host has no more.

Each time it was in the middle of a data check that goes on after the restore. Its driver finds out by a
call, after its time-out, that the host knows no such ring, and sets up another one; on a host without the
modules it gives up all rings and goes quiet.
"""

import time
from pathlib import Path
from typing import Any

from vm import ktap
from vm.driver import (
    CHURN,
    DRIVER,
    EAGER,
    begin_check,
    end_check,
    host_rings,
    lawful,
    stats,
    use_memory,
    wait_above,
    wait_more,
    wait_until,
)
from vm.guest import Guest
from vm.host import Dlh, insert_host_modules, remove_host_modules

DISK = Path("/tmp/disk.qcow2")
STATE = Path("/tmp/state")
CHECK_SECONDS = 10
ARGUMENTS: dict[str, Any] = {
    "mem": "256M",
    "smp": 2,
    "modules": [f"{DRIVER} order=0 timeout_ms=300"],
    "binaries": [CHURN],
    **EAGER,
}
# The time-out, at most 5 s until another ring is tried, and what an emulated host takes.
BOUND = 40.0
WATCH_SECONDS = 15


def make_disk(guest: Guest) -> None:
    """Gives the VMM a qcow2 image to save states in. It makes it itself: the root has no qemu-img."""
    DISK.touch()
    file = {"driver": "file", "filename": str(DISK)}
    guest.qmp("blockdev-create", job_id="create", options={"driver": "qcow2", "file": file, "size": 1 << 20})

    def concluded() -> bool:
        (job,) = guest.qmp("query-jobs")
        if job.get("error"):
            raise RuntimeError(f"no disk: {job['error']}")
        return str(job["status"]) == "concluded"

    wait_until(concluded)
    guest.qmp("job-dismiss", id="create")
    guest.qmp("blockdev-add", driver="qcow2", node_name="disk", file=file)


def progress(guest: Guest, dlh: Dlh) -> bool:
    """Whether the host goes on executing calls of the guest."""
    executed = dlh.get("executed")
    use_memory(guest)
    return wait_above(dlh, "executed", executed)


def recover(guest: Guest, dlh: Dlh, what: str, lost: int, setups: int) -> None:
    """The driver finds out and reports through a new ring, and nothing is lost meanwhile: 4 results."""
    seen, seconds = wait_more(guest, "setups", setups, BOUND)
    ktap.ok(
        seen["setups"] > setups and seen["lost"] > lost and seconds < BOUND,
        f"{what}: the driver loses a ring and sets up another, within {BOUND:.0f} s",
        seconds,
        seen,
    )
    ranges = seen["ranges"]
    seen, more = wait_more(guest, "ranges", ranges, BOUND)
    rings = host_rings(guest)
    ktap.ok(seen["ranges"] > ranges and any(ring.active for ring in rings.values()), f"{what}: it reports", seen, rings)
    found = end_check(guest)
    ktap.ok(found.laps > 0 and found.wrong == 0, f"{what}: the data check of before finds every word", found)
    ktap.ok(lawful(dlh), f"{what}: no call is lost", dlh.all())
    ktap.comment(f"{what}: new ring after {seconds:.1f} s, reports {more:.1f} s later; {found}; {seen}")


ktap.plan(1 + 2 * 6 + 2 + 4 + 5 + 4)
insert_host_modules()
with Guest(**ARGUMENTS) as guest:
    dlh = Dlh(guest.pid)
    make_disk(guest)
    begin_check(guest, CHECK_SECONDS)
    ktap.ok(progress(guest, dlh), "a guest reports pages in the middle of a data check")
    saved = stats(guest)
    start = time.monotonic()
    guest.hmp("savevm one")
    ktap.comment(f"saved in {time.monotonic() - start:.1f} s")
    for lap in ("loadvm", "loadvm again"):
        # The first time the rings are the same, but further; the second time the host has another one.
        ktap.ok(progress(guest, dlh), f"{lap}: the guest goes on first")
        before = host_rings(guest)
        broken, executed = dlh.get("rings_broken"), dlh.get("executed")
        guest.hmp("loadvm one")
        ktap.ok(
            wait_above(dlh, "rings_broken", broken),
            f"{lap}: the host detaches the ring that the guest's memory does not agree with",
            before,
            host_rings(guest),
        )
        ktap.comment(f"{lap}: {before}, then {host_rings(guest)}; {dlh.get('executed') - executed} executed")
        recover(guest, dlh, lap, saved["lost"], saved["setups"])

    begin_check(guest, CHECK_SECONDS)
    ktap.ok(progress(guest, dlh), "another data check")
    saved = stats(guest)
    guest.save(STATE)
    size = STATE.stat().st_size >> 20
    ktap.ok(lawful(dlh), f"no call is lost by saving {size} MiB", dlh.all())

    guest.kill()

with Guest(**ARGUMENTS, incoming=STATE) as other:
    recover(other, Dlh(other.pid), "another VMM", saved["lost"], saved["setups"])

remove_host_modules()
with Guest(**ARGUMENTS, incoming=STATE) as other:
    seen, seconds = wait_more(other, "lost", saved["lost"], BOUND)
    once = (seen["lost"], seen["rings"]) == (saved["lost"] + 1, 0)
    ktap.ok(once, "a host without the modules: with the first ring it loses the driver gives back all", seconds, seen)
    start = time.monotonic()
    while time.monotonic() - start < 10:
        use_memory(other)
    later = stats(other)
    calls, reports = (later[name] - seen[name] for name in ("hypercalls", "reports"))
    # A report makes one call, and every 5 s a CPU asks for a ring.
    ktap.ok(calls <= 2 * reports + 4, "a host without the modules: it goes quiet", calls, reports)
    # 0.1, 0.2, ... 6.4 s after each other, while much is freed.
    ktap.ok(reports <= 8, "a host without the modules: however much is freed", reports)
    same = (later["ranges"], later["waits"]) == (seen["ranges"], seen["waits"])
    ktap.ok(same, "a host without the modules: it reports nothing, and keeps no page waiting", seen, later)
    before = other.kvm_stat("hypercalls")
    time.sleep(WATCH_SECONDS)
    idle = other.kvm_stat("hypercalls") - before
    # Every 6.4 s, and then every 10 s, for a ring and for a call.
    ktap.ok(idle <= 6, f"a host without the modules: it asks {idle} times in {WATCH_SECONDS} s when the guest is idle")
    ktap.comment(f"lost after {seconds:.1f} s; {calls} calls and {reports} reports in 10 s; {later}")
    insert_host_modules()
    recover(other, Dlh(other.pid), "the modules come back", saved["lost"], later["setups"])
remove_host_modules()
ktap.done()
