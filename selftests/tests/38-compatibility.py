#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=6G timeout=500
"""What becomes of the free pages of guests, by VMM and kind of memory: docs/compatibility.md says just that.

Each guest also runs the data check. The table is written anew to /results/compatibility.md; see tools/compatibility.
"""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vm import ktap
from vm.cloud_hypervisor import CloudHypervisor
from vm.compatibility import Row, expected, judged, outcome, read, write
from vm.driver import CHURN, DRIVER, EAGER, check_data, settle, wait_until
from vm.guest import RESULTS, Guest, Running
from vm.host import Bridge, insert_host_modules, remove_host_modules
from vm.memory import (
    ANONYMOUS,
    HUGETLBFS_SHARED,
    KINDS,
    MEMFD_SHARED,
    Kind,
    footprint_kib,
    hold,
    let_go,
    reserve_hugetlb,
)

MACHINES = ("microvm", "q35")
MEM = "192M"
HOLD_MIB = 64
DOCS = Path("/src/kvm-dlh/docs/compatibility.md")
KERNEL = os.environ["KREL"]
# selftests/run puts it there.
CLOUD_HYPERVISOR = Path("/src/kvm-dlh/build/bin/cloud-hypervisor")
# The kinds that it can give a guest, by its command line.
CLOUD_HYPERVISOR_KINDS = {
    ANONYMOUS: "",
    MEMFD_SHARED: ",shared=on",
    # Whether or not it is told that it is shared.
    HUGETLBFS_SHARED: ",hugepages=on,hugepage_size=2M",
}


def version(binary: str | Path) -> str:
    said = subprocess.run([binary, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\d+(\.\d+)+(-\d+)?", said)
    return found[0] if found else said.split("\n")[0]


QEMU_VERSION = version("qemu-system-x86_64")


def judge(row: Row, known: Sequence[Row], counters: dict[str, int]) -> None:
    """Compares an outcome with what is known: 1 result."""
    what = f"{row.vmm}, {row.memory}"
    ktap.ok(row.outcome == expected(row, known), f"{what}: {row.outcome}", expected(row, known), counters)


def try_out(guest: Running, vmm: str, vmm_version: str, kind: Kind, known: Sequence[Row]) -> Row:
    """What becomes of a guest's free pages: 3 results."""
    what = f"{vmm}, {kind.name}"
    bridge = Bridge(guest.pid)
    settle(guest)
    before = bridge.all()
    held = hold(guest, HOLD_MIB)
    full = footprint_kib(guest)
    let_go(guest)
    # Until the host has seen most of it, whatever it has done with it.
    wait_until(lambda: sum(judged(before, bridge.all()).values()) > HOLD_MIB << 7)
    counters = bridge.all()
    row = Row(KERNEL, vmm, vmm_version, kind.name, outcome(before, counters))
    judge(row, known, counters)

    def fell() -> bool:
        return full - footprint_kib(guest) > HOLD_MIB << 9

    agrees = wait_until(fell) if row.outcome == "merged" else not fell()
    ktap.ok(held and agrees, f"{what}: its footprint agrees", full, footprint_kib(guest))
    found = check_data(guest)
    ktap.ok(found.laps > 0 and found.wrong == 0, f"{what}: every word is what was written", found)
    ktap.comment(f"{what}: {full >> 10} MiB in use, then {footprint_kib(guest) >> 10}; {found}")
    return row


def qemu(kind: Kind, known: Sequence[Row]) -> list[Row]:
    """A guest on each of QEMU's machines, both at a time: 2 * 3 results."""
    guests = [
        Guest(
            machine=machine,
            mem=MEM,
            memory_backend=kind.backend,
            modules=[DRIVER],
            binaries=[CHURN],
            qemu=kind.qemu,
            **EAGER,
        )
        for machine in MACHINES
    ]
    rows = []
    for machine, guest in zip(MACHINES, guests, strict=True):
        with guest:
            rows.append(try_out(guest, f"QEMU {machine}", QEMU_VERSION, kind, known))
    return rows


def cloud_hypervisor(kind: Kind, options: str, known: Sequence[Row]) -> list[Row]:
    """A guest of cloud-hypervisor: 3 results."""
    with CloudHypervisor(CLOUD_HYPERVISOR, memory=f"size={MEM}{options}", modules=[DRIVER], binaries=[CHURN], **EAGER) as guest:
        return [try_out(guest, "cloud-hypervisor", version(CLOUD_HYPERVISOR), kind, known)]


ktap.plan(len(KINDS) * 6 + len(CLOUD_HYPERVISOR_KINDS) * 3)
insert_host_modules()
Path("/sys/module/ksm_bridge/parameters/allow").write_text("all,hugetlb")
reserve_hugetlb(2 * int(MEM.removesuffix("M")) + 64)
known = read(DOCS.read_text())
rows = [row for kind in KINDS for row in qemu(kind, known)]
for kind, options in CLOUD_HYPERVISOR_KINDS.items():
    if CLOUD_HYPERVISOR.exists():
        rows += cloud_hypervisor(kind, options, known)
    else:
        for what in ("what becomes of free pages", "its footprint agrees", "every word is what was written"):
            ktap.skip("CLOUD_HYPERVISOR names no binary", f"cloud-hypervisor, {kind.name}: {what}")
(RESULTS / "compatibility.md").write_text(write(rows, known))
remove_host_modules()
ktap.done()
