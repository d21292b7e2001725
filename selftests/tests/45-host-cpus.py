#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=4G timeout=600 suspend=yes
"""The host's CPUs come and go, and the host is suspended, under two guests that report.

Suspending goes through the levels of /sys/power/pm_test, and then once all the way (S3, until the clock
wakes it). Hibernation goes as far as freezing: in the levels after that it resets the virtio devices that
the host under test has its root from, which the stock kernel's 9p does not outlive, whatever modules there
are.
"""

import re
import time
from pathlib import Path
from typing import Any

from vm import ktap
from vm.driver import CHURN, DRIVER, EAGER, begin_load, end_load, host_log, host_rings, lawful, stats, wait_until
from vm.guest import Guest
from vm.host import Dlh, insert_host_modules, remove_host_modules

POWER = Path("/sys/power")
CPU1 = Path("/sys/devices/system/cpu/cpu1/online")
ALARM = Path("/sys/class/rtc/rtc0/wakealarm")
CPU_LAPS = 5
FREEZES = 40


class Pair:
    """Two guests that use, free and report memory all the time."""

    def __init__(self, guests: list[Guest]) -> None:
        self.guests = guests
        self.dlh = [Dlh(guest.pid) for guest in guests]
        self.rings = self.active()

    def active(self) -> list[dict[int, int]]:
        """Where the active rings of each are, by vCPU."""
        return [{vcpu: ring.gpa for vcpu, ring in host_rings(guest).items() if ring.active} for guest in self.guests]

    def go_on(self) -> bool:
        """Whether the host executes more calls of each, through the rings they have had all the time."""
        before = [dlh.get("executed") for dlh in self.dlh]
        return self.active() == self.rings and wait_until(
            lambda: all(dlh.get("executed") > n for dlh, n in zip(self.dlh, before, strict=True))
        )

    def wait_pending(self) -> int:
        """Waits, without a pause, until a guest has calls pending; how many."""
        pending = 0

        def some() -> bool:
            nonlocal pending
            pending = sum(dlh.get("pending") for dlh in self.dlh)
            return pending > 0

        wait_until(some, pause=0)
        return pending


def suspend(pair: Pair, level: str, state: str = "mem", sleep: float = 0) -> tuple[bool, int, str]:
    """Suspends the host as far as `level`: whether that succeeded, calls pending before, what to say.

    sleep: seconds after which the clock wakes it, if it sleeps: more than it takes to fall asleep.
    """
    (POWER / "pm_test").write_text(level)
    pending, start = pair.wait_pending(), time.monotonic()
    if level == "none":
        # An alarm that is over wakes nobody.
        ALARM.write_text(f"+{sleep:.0f}")
    try:
        # Not buffered: what is buffered would be written once more after a failure.
        with (POWER / "state").open("wb", buffering=0) as file:
            file.write(state.encode())
    except OSError as error:
        return False, pending, f"{error.strerror} after {time.monotonic() - start:.1f} s, {pending} calls pending"
    return True, pending, f"{time.monotonic() - start:.1f} s, {pending} calls were pending"


ktap.plan(1 + 1 + 2 + 5 + 2 + 4 + 2 * 3 + 1)
insert_host_modules()
ARGUMENTS: dict[str, Any] = {
    "mem": "256M",
    "modules": [f"{DRIVER} order=0 timeout_ms=500"],
    "binaries": [CHURN],
    **EAGER,
    # Under QEMU's emulated SVM, a guest with high resolution timers was seen to hang after the host had been
    # suspended dozens of times: in a timer interrupt in the middle of its timekeeping's own update, which it
    # makes with interrupts off. (Its calls were done, its worker idle; see also docs/emulation.md.)
    "append": f"{EAGER['append']} nohz=off highres=off",
}
for kind in ("suspend", "hibernate"):
    Path(f"/sys/module/{kind}/parameters/pm_test_delay").write_text("0")
# What refuses to freeze does so for ever; what is slow does not.
(POWER / "pm_freeze_timeout").write_text("300000")
# Nothing to write anywhere, and so less time between the look at what is pending and freezing.
(POWER / "sync_on_suspend").write_text("0")
with Guest(**ARGUMENTS) as one, Guest(**ARGUMENTS) as two:
    pair = Pair([one, two])
    for guest in pair.guests:
        begin_load(guest)
    ktap.ok(pair.go_on(), "two guests report", pair.rings)

    gone = []
    for _ in range(CPU_LAPS):
        for online in "01":
            CPU1.write_text(online)
            gone.append(pair.go_on())
    ktap.ok(all(gone), f"a CPU of the host goes and comes {CPU_LAPS} times, the rings go on", gone, pair.active())

    results = [suspend(pair, "freezer") for _ in range(FREEZES)]
    failed = [said for good, _, said in results if not good]
    busy = sum(pending > 0 for _, pending, _ in results)
    ktap.comment(f"{busy} of {FREEZES} freezes with calls pending just before")
    ktap.ok(busy > FREEZES // 2 and not failed, "the host can be frozen at any time", busy, *failed)
    ktap.ok(pair.go_on(), "and the rings go on", pair.active())

    Path("/sys/module/suspend/parameters/pm_test_delay").write_text("1")
    Path("/sys/module/hibernate/parameters/pm_test_delay").write_text("1")
    took = 0.0
    for level, state in (*((n, "mem") for n in ("devices", "platform", "processors", "core")), ("platform", "freeze")):
        start = time.monotonic()
        good, _, said = suspend(pair, level, state)
        took = max(took, time.monotonic() - start)
        ktap.comment(f"{state}, {level}: {said}")
        ktap.ok(good and pair.go_on(), f"{state} as far as {level}, and the rings go on", said, pair.active())

    good, _, said = suspend(pair, "none", sleep=8 + 5 * took)
    ktap.comment(f"S3: {said}")
    ktap.ok(good and "Low-level resume complete" in host_log(), "the host sleeps and wakes", said)
    ktap.ok(pair.go_on(), "and the rings go on", pair.active())

    good, _, said = suspend(pair, "freezer", "disk")
    ktap.comment(f"hibernation, freezer: {said}")
    ktap.ok(good and pair.go_on(), "hibernation as far as freezer, and the rings go on", said, pair.active())
    for level in ("devices", "platform", "core"):
        ktap.skip("the root of the host under test does not outlive it", f"hibernation as far as {level}")

    for guest, dlh in zip(pair.guests, pair.dlh, strict=True):
        found, seen = end_load(guest), stats(guest)
        ktap.comment(f"{guest.name}: {found}, {seen}")
        ktap.ok(found.laps > 0 and found.wrong == 0, f"{guest.name}: every word is what was written", found)
        ktap.equal((seen["setups"], seen["lost"]), (1, 0), f"{guest.name}: one ring has done for all of it")
        ktap.ok(lawful(dlh), f"{guest.name}: no call is lost")
    ktap.equal(re.findall(r"Freezing .* (?:failed|aborted).*", host_log()), [], "nothing refused to freeze")
remove_host_modules()
ktap.done()
