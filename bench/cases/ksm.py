# SPDX-License-Identifier: GPL-2.0
# mem: 3G
"""What KSM needs to find that free memory is zeroes: a guest with init_on_free=1, use_zero_pages."""

import time
from pathlib import Path

from harness.inside import executed, figure, no_figure, quiet
from harness.reporters import Variant
from vm.memory import hold, let_go

KSM = Path("/sys/kernel/mm/ksm")
MIB = 128


def ksmd() -> int:
    """KSM's thread."""
    return next(int(comm.parent.name) for comm in Path("/proc").glob("[0-9]*/comm") if comm.read_text() == "ksmd\n")


with Variant.parse("none-0").guest(256, "init_on_free=1") as guest:
    quiet(guest)
    if not hold(guest, MIB):
        raise RuntimeError(f"the guest has no {MIB} MiB")
    quiet(guest, 1)
    let_go(guest)
    quiet(guest)
    full, before, begin = guest.rss_kib(), executed(ksmd()), time.monotonic()
    settings = {"use_zero_pages": 1, "pages_to_scan": 1000, "sleep_millisecs": 20, "smart_scan": 0, "run": 1}
    for name, value in settings.items():
        (KSM / name).write_text(str(value))
    goal = full - MIB * 1024 * 95 // 100
    while guest.rss_kib() > goal:
        if time.monotonic() > begin + 300:
            no_figure(f"KSM has not found the free memory: {full} KiB, then {guest.rss_kib()}")
        time.sleep(0.1)
    back = (full - guest.rss_kib()) / (1 << 20)
    figure("zero_insns_per_gib", (executed(ksmd()) - before) / back)
    figure("zero_seconds_per_gib", (time.monotonic() - begin) / back)
    (KSM / "run").write_text("0")
