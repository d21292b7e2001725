#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=3G timeout=240
"""The host's modules go away under a guest that reports, and come back."""

import subprocess
from pathlib import Path

from vm import ktap
from vm.driver import stats, wait_until
from vm.guest import Guest

MODULES = Path("/src/kvm-dlh/build/modules")
DRIVER = MODULES / "dlh_guest.ko"


def host(command: str, name: str) -> None:
    subprocess.run([command, MODULES / f"{name}.ko" if command == "insmod" else name], check=True)


def use_memory(guest: Guest) -> None:
    guest.check("dd if=/dev/zero of=/tmp/f bs=1M count=100 2>/dev/null; rm /tmp/f")


def wait_past(guest: Guest, name: str, value: int) -> dict[str, int]:
    """Uses memory, so that there is something to report, until a counter has passed a value."""
    seen: dict[str, int] = {}

    def past() -> bool:
        use_memory(guest)
        # As long as the guest waits with a report; it is for the guest to say how long that is.
        guest.check("sleep 2.5")
        seen.update(stats(guest))
        return seen[name] > value

    wait_until(past, pause=0)
    return seen


ktap.plan(11)
host("insmod", "kvm_dlh")
host("insmod", "ksm_bridge")
with Guest(mem="384M", modules=[f"{DRIVER} order=4 timeout_ms=300"]) as guest:
    first = wait_past(guest, "ranges", 0)
    ktap.ok(first["ranges"] > 0 and first["failed"] <= first["declined"], "pages are reported", first)

    host("rmmod", "ksm_bridge")
    alone = wait_past(guest, "failed", 0)
    ktap.ok(alone["failed"] > 0 and alone["declined"] > 0, "without ksm_bridge reports fail", alone)
    ktap.equal(alone["lost"], 0, "and no ring is lost")
    host("insmod", "ksm_bridge")
    again = wait_past(guest, "ranges", alone["ranges"])
    ktap.ok(again["ranges"] > alone["ranges"], "with it they succeed again", again)
    ktap.equal(again["setups"], 1, "through the same ring")

    host("rmmod", "ksm_bridge")
    host("rmmod", "kvm_dlh")
    gone = wait_past(guest, "lost", 0)
    ktap.ok(gone["lost"] == 1 and gone["kicks"] >= 1, "without kvm_dlh the guest finds out by a call", gone)
    ktap.equal(gone["rings"], 0, "and has no ring any more")
    later = wait_past(guest, "setups_failed", gone["setups_failed"])
    ktap.ok(later["setups_failed"] > 0, "it tries to get another", later)

    host("insmod", "kvm_dlh")
    host("insmod", "ksm_bridge")
    back = wait_past(guest, "setups", again["setups"])
    ktap.equal((back["rings"], back["setups"]), (1, 2), "it gets one when kvm_dlh is back")
    full = guest.rss_kib()
    back = wait_past(guest, "ranges", later["ranges"])
    ktap.ok(back["ranges"] > later["ranges"], "and reports through it", back)
    ktap.comment(f"RSS {full // 1024} MiB, then {guest.rss_kib() // 1024} MiB; {back}")
    log = [line for line in guest.check("dmesg").splitlines() if "a CPU has no ring" in line]
    ktap.equal(len(log), 1, "the guest's log says once that there was none")
host("rmmod", "ksm_bridge")
host("rmmod", "kvm_dlh")
ktap.done()
