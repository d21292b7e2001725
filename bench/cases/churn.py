# SPDX-License-Identifier: GPL-2.0
# mem: 3G
# variants: none-0 dlh-9 dlh-4 dlh-0 balloon-9 balloon-4 balloon-0
"""What being taken back costs a workload that uses the memory again, and how much of it the host has meanwhile."""

import sys
import threading
import time

from harness.inside import PROFILING, figure, insert, profiled, sample
from harness.reporters import Variant
from vm.guest import Guest

# Page faults and little else: fresh memory, touched and freed.
FAULTS = "dlh-churn laps 4 96"
# As a build does: many short processes, pipes, files that come and go, and one that takes much memory. In the end
# there is nothing to do for a while, which is not counted.
PAUSE_S = 0.5
BUILD = (
    "mkdir -p /tmp/build && cd /tmp/build && { "
    "for j in 1 2 3 4; do cat /bin/busybox > o$j; gzip -1 < o$j > z$j; gunzip < z$j | md5sum; done; "
    f"cat o* z* | md5sum; dlh-churn laps 2 96; rm o* z*; sleep {PAUSE_S}; }} > /dev/null"
)
# Before each: in this time most of what is free has been reported.
SETTLE_S = 8
ROUNDS = 1 if PROFILING else 6


def run(guest: Guest, name: str, command: str, paused_s: float = 0) -> None:
    """Runs a load several times, and says how long that took, without its pauses, and the mean footprint meanwhile."""
    over = threading.Event()
    footprint: list[tuple[float, float]] = []
    sampler = threading.Thread(
        target=lambda: footprint.extend(sample(lambda: float(guest.rss_kib()), over.is_set, 0.1))
    )
    sampler.start()
    begin = time.monotonic()
    try:
        for number in range(1, ROUNDS + 1):
            guest.check(command, timeout=900)
            print(f"{name}: {number} of {ROUNDS}", flush=True)
    finally:
        seconds = time.monotonic() - begin
        over.set()
        sampler.join()
    figure(f"{name}_s", seconds - ROUNDS * paused_s)
    figure(f"{name}_rss_mib", sum(kib for _, kib in footprint) / len(footprint) / 1024)


variant = Variant.parse(sys.argv[1])
if variant.reporter == "dlh":
    insert()
with variant.guest(384) as guest:
    # Once without being measured: the guest has used all of its memory by then.
    guest.check("dlh-churn laps 1 256")
    print("the guest is up", flush=True)
    time.sleep(SETTLE_S)
    with profiled(guest):
        run(guest, "faults", FAULTS)
    if not PROFILING:
        time.sleep(SETTLE_S)
        run(guest, "build", BUILD, PAUSE_S)
