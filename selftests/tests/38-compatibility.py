#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=6G timeout=500
"""What becomes of the free pages of guests, by VMM and kind of memory: docs/compatibility.md says just that.

Each guest also runs the data check. The table is written anew to /results/compatibility.md; see tools/compatibility.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vm import ktap
from vm.compatibility import Row, expected, outcome, read, write
from vm.driver import CHURN, DRIVER, EAGER, check_data, wait_above, wait_until
from vm.guest import RESULTS, Guest, write_initramfs
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules
from vm.memory import (
    ANONYMOUS,
    HUGETLBFS_PRIVATE,
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
    HUGETLBFS_SHARED: ",hugepages=on,hugepage_size=2M,shared=on",
    HUGETLBFS_PRIVATE: ",hugepages=on,hugepage_size=2M",
}
# Its guests have no line to the test: they check data all the time, and say so on the console.
ALONE = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module arguments; do insmod "/modules/$module" $arguments; done </modules/order
while true; do dlh-churn check --seconds 3 --mib 24; sleep 1; done >/dev/hvc0 2>&1
"""


def version(binary: str | Path) -> str:
    said = subprocess.run([binary, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else said.split("\n")[0]


QEMU_VERSION = version("qemu-system-x86_64")


def judge(row: Row, known: Sequence[Row], counters: dict[str, int]) -> None:
    """Compares an outcome with what is known: 1 result."""
    what = f"{row.vmm}, {row.memory}"
    ktap.ok(row.outcome == expected(row, known), f"{what}: {row.outcome}", expected(row, known), counters)


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
            bridge = Bridge(guest.pid)
            Dlh(guest.pid).settle(quiet=2)
            before = bridge.all()
            held = hold(guest, HOLD_MIB)
            full = footprint_kib(guest)
            let_go(guest)
            fell = wait_until(lambda: full - footprint_kib(guest) > HOLD_MIB << 9, 6)
            counters = bridge.all()
            row = Row(KERNEL, f"QEMU {machine}", QEMU_VERSION, kind.name, outcome(before, counters))
            judge(row, known, counters)
            agrees = held and fell == (row.outcome == "merged")
            what = f"{row.vmm}, {kind.name}"
            ktap.ok(agrees, f"{what}: its footprint agrees", full, footprint_kib(guest))
            found = check_data(guest, 3)
            ktap.ok(found.laps > 0 and found.wrong == 0, f"{what}: every word is what was written", found)
            ktap.comment(f"{what}: {full >> 10} MiB in use, then {footprint_kib(guest) >> 10}; {found}")
            rows.append(row)
    return rows


def cloud_hypervisor(kind: Kind, options: str, known: Sequence[Row]) -> list[Row]:
    """A guest of cloud-hypervisor: 2 results."""
    directory = Path(tempfile.mkdtemp())
    alone, initramfs = directory / "alone", directory / "initramfs.cpio"
    alone.write_text(ALONE)
    alone.chmod(0o755)
    write_initramfs(initramfs, (str(DRIVER),), (CHURN,), {"alone": alone})
    log = RESULTS / f"guest-cloud-hypervisor-{len(list(RESULTS.glob('guest-cloud*')))}.log"
    log.touch()
    vmm = subprocess.Popen(
        [
            CLOUD_HYPERVISOR,
            *("--kernel", f"/kernel/{KERNEL}/vmlinuz", "--initramfs", initramfs),
            *("--cmdline", f"console=hvc0 panic=-1 oops=panic rdinit=/alone {EAGER['append']}"),
            *("--cpus", "boot=1", "--memory", f"size={MEM}{options}"),
            *("--serial", "off", "--console", f"file={log}"),
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        bridge = Bridge(vmm.pid)
        wait_above(bridge, "reported_pages", HOLD_MIB << 8, 120)
        counters = bridge.all()
        row = Row(KERNEL, "cloud-hypervisor", version(CLOUD_HYPERVISOR), kind.name, outcome({}, counters))
        judge(row, known, counters)
        checks = r"laps [1-9]\d* mib \d+ mismatches (\d+)"
        wait_until(lambda: re.search(checks, log.read_text(errors="replace")))
        wrong = re.findall(checks, log.read_text(errors="replace"))
        ktap.ok(wrong and not any(map(int, wrong)), f"{row.vmm}, {kind.name}: every word is what was written", wrong)
    finally:
        vmm.kill()
        vmm.wait()
    return [row]


ktap.plan(len(KINDS) * 6 + len(CLOUD_HYPERVISOR_KINDS) * 2)
insert_host_modules()
reserve_hugetlb(2 * int(MEM.removesuffix("M")) + 64)
known = read(DOCS.read_text())
rows = [row for kind in KINDS for row in qemu(kind, known)]
for kind, options in CLOUD_HYPERVISOR_KINDS.items():
    if CLOUD_HYPERVISOR.exists():
        rows += cloud_hypervisor(kind, options, known)
    else:
        for what in ("what becomes of free pages", "every word is what was written"):
            ktap.skip("CLOUD_HYPERVISOR names no binary", f"cloud-hypervisor, {kind.name}: {what}")
(RESULTS / "compatibility.md").write_text(write(rows, known))
remove_host_modules()
ktap.done()
