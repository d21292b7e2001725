#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# Not part of make test, see docs/emulation.md:
#     tools/l1 --mem 6G --timeout 500 --append nokaslr -- selftests/soak/emulation.py
"""Whose fault it is when a guest ends without a word: guests report single pages until some of them do.

By default virtio-balloon reports, under the stock kernel without any module of ours; `--reporter dlh` is the same
load with our modules. For each guest that ends in a triple fault this looks up where its page tables lie: the CPU
found an address not present. If memory says that it is, by the guest's tables and by the host's, then the CPU was
wrong.

What is read from the VMCB is where AMD's manual puts it (volume 2, appendix B); KVM resets it right after the exit, so
a probe reads it before. Needs nokaslr in L1's command line: the host's memory is found at its fixed place.
"""

import argparse
import re
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vm.driver import CHURN, DRIVER, EAGER
from vm.guest import Guest
from vm.host import insert_host_modules

TRACING = Path("/sys/kernel/tracing")
DIRECT_MAP = 0xFFFF_8880_0000_0000
ADDRESS = 0x000F_FFFF_FFFF_F000
MIB = 256
# Of what the probe reads, the offsets in the VMCB.
FIELDS = {"ncr3": 0xB0, "intinfo": 0x88, "cr3": 0x550, "rip": 0x578, "cr2": 0x640}
LOAD = (
    "while true; do dlh-churn fill --mib 96 < /dev/null; dlh-churn check --seconds 2 --threads 1 --mib 24; done"
)


class Memory:
    """The host's memory, by physical address."""

    def __init__(self) -> None:
        self._file = Path("/proc/kcore").open("rb", buffering=0)
        header = self._file.read(64)
        begin, count = struct.unpack_from("<Q", header, 32)[0], struct.unpack_from("<H", header, 56)[0]
        self._file.seek(begin)
        headers = struct.iter_unpack("<IIQQQQQQ", self._file.read(56 * count))
        self._segments = [(virtual, size, at) for kind, _, at, virtual, _, size, _, _ in headers if kind == 1]

    def word(self, physical: int) -> int:
        where = DIRECT_MAP + physical
        for begin, size, at in self._segments:
            if begin <= where < begin + size:
                self._file.seek(at + where - begin)
                return int(struct.unpack("<Q", self._file.read(8))[0])
        raise LookupError(f"no memory at {physical:#x}")


def begin_probing() -> None:
    """Has the trace say where a guest was that ends in a triple fault."""
    layout = subprocess.run(
        ["pahole", "-C", "vcpu_svm", "/sys/kernel/btf/kvm_amd"], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"struct vmcb \*\s+vmcb;\s+/\*\s+(\d+)", layout)
    if not found:
        raise RuntimeError("no vmcb in struct vcpu_svm")
    fields = " ".join(f"{name}=+{at}(+{found[1]}(%di)):x64" for name, at in FIELDS.items())
    (TRACING / "kprobe_events").write_text(f"p:lost kvm_amd:shutdown_interception {fields}\n")
    (TRACING / "events/kprobes/lost/enable").write_text("1")


def walk(memory: Memory, root: int, address: int, host: int | None) -> Iterator[tuple[int, int]]:
    """The entries on the way to an address: where each lies, and what it is. `host` has the tables of the guest's."""
    table = root & ADDRESS
    for shift in (39, 30, 21, 12):
        place = table + 8 * (address >> shift & 511)
        entry = memory.word(place if host is None else translate(memory, host, place))
        yield place, entry
        if not entry & 1 or shift == 12 or entry & 0x80:
            return
        table = entry & ADDRESS


def translate(memory: Memory, root: int, address: int) -> int:
    """Where the host keeps an address of the guest."""
    level = 39
    for _, entry in walk(memory, root, address, None):
        if not entry & 1:
            raise LookupError(f"the host has nothing mapped at {address:#x} of the guest")
        last, level = level, level - 9
    size = 1 << last
    return entry & ADDRESS & -size | address & size - 1


def in_place(seen: dict[str, int]) -> str:
    """What is wrong with the tables of what the CPU found not present; nothing if they are in place."""
    memory = Memory()
    for name in ("rip", "cr2"):
        try:
            for place, entry in walk(memory, seen["cr3"], seen[name], seen["ncr3"]):
                if not entry & 1:
                    return f"{name}={seen[name]:#x} is not present: {entry:#x} at {place:#x} of the guest"
        except LookupError as error:
            return f"{name}={seen[name]:#x}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reporter", choices=("balloon", "dlh"), default="balloon")
    parser.add_argument("--guests", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--append", default="", help="more of the guests' kernel command line")
    parser.add_argument("--cpu", default="host", help="the guests' CPU, as QEMU's -cpu takes it")
    options = parser.parse_args()
    begin_probing()
    arguments: dict[str, Any] = {"free_page_reporting": True, "append": f"{EAGER['append']} "}
    arguments["append"] += "page_reporting.page_reporting_order=0"
    if options.reporter == "dlh":
        insert_host_modules()
        arguments = {"modules": [f"{DRIVER} order=0 timeout_ms=300"], "append": EAGER["append"]}
    arguments["append"] += f" {options.append}"
    arguments |= {"mem": f"{MIB}M", "cpu": options.cpu, "qemu": ["-no-shutdown"]}
    arguments |= {"binaries": [CHURN], "start": EAGER["start"]}
    guests = [Guest(**arguments) for _ in range(options.guests)]
    for guest in guests:
        guest.wait_ready()
    for guest in guests:
        guest.begin(LOAD)
    begin = time.monotonic()
    lost = wrong = 0
    while guests and time.monotonic() < begin + options.seconds:
        time.sleep(1)
        for guest in [guest for guest in guests if guest.qmp("query-status")["status"] == "shutdown"]:
            if "Kernel panic" in guest.console():
                raise RuntimeError(f"{guest.name} has panicked, and says why")
            threads = "|".join(task.name for task in Path(f"/proc/{guest.pid}/task").iterdir())
            mine = re.compile(rf"-({threads}) .* lost: ")
            line = [line for line in (TRACING / "trace").read_text().splitlines() if mine.search(line)][-1]
            seen = {name: int(value, 16) for name, value in re.findall(r"(\w+)=0x([0-9a-f]+)", line)}
            what = in_place(seen)
            lost, wrong = lost + 1, wrong + bool(what)
            print(f"{guest.name} is lost after {time.monotonic() - begin:.0f} s:", line.split(" lost: ")[1])
            print("  ", what or "all is in place: the CPU was wrong", flush=True)
            guest.kill()
            guests.remove(guest)
    for guest in guests:
        guest.kill()
    print(f"{lost} of {options.guests} guests lost; of {wrong} the tables are not in place")


main()
