# SPDX-License-Identifier: GPL-2.0
# mem: 3G
# variants: none-9 none-4 none-0 empty-9 empty-4 empty-0 dlh-9 dlh-4 dlh-0 balloon-9 balloon-4 balloon-0 none-0-busy dlh-0-busy balloon-0-busy
"""A Linux guest frees memory, which comes back to the host: exits, instructions of host and guest, and how soon.

What is freed lies in pieces of about the order that is reported, between as many that stay in use. What is printed is
all that happens in a window of fixed length, in which the guest frees memory and is idle then; `none` says what that
takes without reports, `empty` what the page allocator needs for reports that nobody is told of. Exits and instructions
of the guest are counted in a second window, as that costs some. A busy guest computes all the time, beside that.
"""

import subprocess
import sys
import time

from harness.inside import (
    BINARIES,
    PROFILING,
    GuestInstructions,
    executed,
    figure,
    insert,
    no_figure,
    profiled,
    quiet,
    sample,
)
from harness.reporters import Variant
from vm.guest import Guest
from vm.memory import hold, let_go

# A guest's tmpfs takes half of its memory.
GUEST_MIB = 640
MIB = 32 if PROFILING else 256
WINDOW_S = 4 if PROFILING else 20
# Computing takes the emulation longer than being idle.
BUSY_WINDOW_S = 10
# KiB that are free and in use by turns. Blocks are aligned, runs need not be.
RUN_KIB = {9: 8192, 4: 256, 0: 4}
FILE = "/tmp/held"


def free_some(guest: Guest, window_s: float = WINDOW_S) -> list[tuple[float, float]]:
    """The guest frees half of what it holds; (seconds, footprint in MiB) until the end of the window."""
    footprint: list[tuple[float, float]] = []
    begin = time.monotonic()
    let_go(guest)
    while (passed := time.monotonic() - begin) < window_s:
        # No longer than this is the harness to hear nothing.
        end = begin + passed + window_s / 4
        piece = sample(lambda: guest.rss_kib() / 1024, lambda: time.monotonic() > end, 0.05)
        footprint += [(passed + seconds, mib) for seconds, mib in piece]
        print(f"{footprint[-1][1]:.0f} MiB after {footprint[-1][0]:.0f} s", flush=True)
    return footprint


def hold_some(guest: Guest, variant: Variant) -> float:
    """The guest holds memory, and nothing is left over of what was before. Returns its footprint in MiB. From now on a
    busy guest computes all the time."""
    guest.check(f"rm -f {FILE}")
    quiet(guest)
    if not hold(guest, MIB, f"holes {FILE} --run-kib {RUN_KIB[variant.order]}"):
        raise RuntimeError(f"the guest has no {MIB} MiB")
    quiet(guest, 1)
    print(f"{MIB} MiB are in use", flush=True)
    footprint = guest.rss_kib() / 1024
    if variant.beside == "busy":
        guest.check("while :; do :; done > /dev/null 2>&1 &")
    return footprint


def empty_reported_mib(guest: Guest) -> float:
    """What has been handed to a reporter that tells nobody."""
    return int(guest.check("cat /sys/module/empty_reporter/parameters/bytes")) / (1 << 20)


def entry_insns() -> float:
    """How much is counted for an entry of a guest that does next to nothing between two exits."""
    command = [BINARIES / "dlh-vmm", "measure", "--exits", "20000"]
    counted, entries = 0, 0
    with GuestInstructions() as counter:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
            while run.poll() is None:
                counted, entries = counter.count(run.pid)
                time.sleep(0.01)
    return counted / entries


def measure_all(guest: Guest, variant: Variant) -> None:
    """What all of it takes, and how soon memory is back."""
    full = hold_some(guest, variant)
    exits, interrupts, before_ns = guest.kvm_stat("exits"), guest.kvm_stat("irq_exits"), executed(guest.pid)
    footprint = free_some(guest, BUSY_WINDOW_S if variant.beside else WINDOW_S)
    figure("all_insns", executed(guest.pid) - before_ns)
    figure("all_exits", guest.kvm_stat("exits") - exits)
    figure("interrupt_exits", guest.kvm_stat("irq_exits") - interrupts)
    back = full - footprint[-1][1]
    figure("back_mib", back)
    if variant.reporter in ("dlh", "balloon"):
        if back < MIB / 4:
            no_figure(f"only {back:.0f} MiB of {MIB // 2} have come back")
        for percent in (50, 99):
            goal = full - back * percent / 100
            figure(f"seconds_p{percent}", next(seconds for seconds, mib in footprint if mib <= goal))


def measure_guest(guest: Guest, variant: Variant) -> None:
    """The guest's part of it."""
    full = hold_some(guest, variant)
    reported = empty_reported_mib(guest) if variant.reporter == "empty" else 0
    with GuestInstructions() as counter:

        def counts() -> tuple[int, int, int]:
            return (*counter.count(guest.pid), counter.asked(guest.pid) + guest.kvm_stat("hypercalls"))

        before = counts()
        footprint = free_some(guest)
        after = counts()
    back = full - footprint[-1][1]
    if variant.reporter == "empty":
        back = empty_reported_mib(guest) - reported
        figure("counted_reported_mib", back)
    else:
        figure("counted_back_mib", back)
    if variant.reporter != "none" and back < MIB / 8:
        no_figure(f"only {back:.0f} MiB of {MIB // 2} were counted")
    for name, old, new in zip(("guest_insns", "guest_entries", "asked_exits"), before, after, strict=True):
        figure(name, new - old)


variant = Variant.parse(sys.argv[1])
if variant.reporter == "dlh":
    insert()
if not PROFILING:
    figure("entry_insns", entry_insns())
with variant.guest(GUEST_MIB) as guest:
    print("the guest is up", flush=True)
    if PROFILING:
        hold_some(guest, variant)
        with profiled(guest):
            free_some(guest)
        sys.exit()
    measure_all(guest, variant)
    if not variant.beside:
        measure_guest(guest, variant)
