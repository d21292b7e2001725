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
    begin_load,
    end_load,
    host_rings,
    lawful,
    most_failures,
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
ARGUMENTS: dict[str, Any] = {
    "mem": "256M",
    "smp": 2,
    "modules": [f"{DRIVER} order=0 timeout_ms=300"],
    "binaries": [CHURN],
    **EAGER,
}
WATCH_SECONDS = 15
# A CPU of the guest without a ring asks for one so often.
RING_SECONDS = 5
# After so many failures the pauses are not shorter than that.
FAILURES, PAUSE = 7, 6.4


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
    seen, seconds = wait_more(guest, "setups", setups)
    ktap.ok(
        seen["setups"] > setups and seen["lost"] > lost,
        f"{what}: the driver loses a ring and sets up another",
        seconds,
        seen,
    )
    ranges = seen["ranges"]
    seen, more = wait_more(guest, "ranges", ranges)
    rings = host_rings(guest)
    ktap.ok(seen["ranges"] > ranges and any(ring.active for ring in rings.values()), f"{what}: it reports", seen, rings)
    found = end_load(guest)
    ktap.ok(found.laps > 0 and found.wrong == 0, f"{what}: the data check of before finds every word", found)
    ktap.ok(lawful(dlh), f"{what}: no call is lost", dlh.all())
    ktap.comment(f"{what}: new ring after {seconds:.1f} s, reports {more:.1f} s later; {found}; {seen}")


ktap.plan(1 + 2 * 6 + 2 + 4 + 5 + 4)
insert_host_modules()
with Guest(**ARGUMENTS) as guest:
    dlh = Dlh(guest.pid)
    make_disk(guest)
    begin_load(guest)
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

    begin_load(guest)
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
    start = time.monotonic()
    seen, seconds = wait_more(other, "lost", saved["lost"])
    once = (seen["lost"], seen["rings"]) == (saved["lost"] + 1, 0)
    ktap.ok(once, "a host without the modules: with the first ring it loses the driver gives back all", seconds, seen)

    def has_failed() -> bool:
        use_memory(other)
        return stats(other)["failed"] >= seen["failed"] + FAILURES

    wait_until(has_failed, pause=0)
    later = stats(other)
    # Longer than what is counted took: a busy machine makes it longer still, and allows no more.
    took = time.monotonic() - start
    calls, reports = (later[name] - seen[name] for name in ("hypercalls", "reports"))
    # A report makes one call, and each CPU asks for a ring now and then.
    asked = 2 * (1 + took // RING_SECONDS)
    ktap.ok(calls <= 2 * reports + asked, "a host without the modules: it goes quiet", calls, reports, took)
    most = most_failures(took)
    ktap.ok(reports <= most, "a host without the modules: however much is freed", reports, most)
    same = (later["ranges"], later["waits"]) == (seen["ranges"], seen["waits"])
    ktap.ok(same, "a host without the modules: it reports nothing, and keeps no page waiting", seen, later)
    # The data check goes on when it is over.
    other.check("killall -STOP dlh-churn")
    start, before = time.monotonic(), other.kvm_stat("hypercalls")
    time.sleep(WATCH_SECONDS)
    idle, watched = other.kvm_stat("hypercalls") - before, time.monotonic() - start
    other.check("killall -CONT dlh-churn")
    # For a ring and for a call.
    most = 2 * (1 + watched // PAUSE)
    ktap.ok(idle <= most, f"a host without the modules: it asks {idle} times in {watched:.0f} s when the guest is idle")
    ktap.comment(f"lost after {seconds:.1f} s; {calls} calls and {reports} reports in {took:.0f} s; {later}")
    insert_host_modules()
    recover(other, Dlh(other.pid), "the modules come back", saved["lost"], later["setups"])
remove_host_modules()
ktap.done()
