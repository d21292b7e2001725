# SPDX-License-Identifier: GPL-2.0
"""Many small VMs, and what the kernel has allocated for them. For use inside L1."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from .host import MODULES

VMM = MODULES.parent / "bin/dlh-vmm"


class Herd:
    """A number of VMs, in one process; with `rings`, the first call of each sets up its ring."""

    def __init__(self, count: int, rings: bool = False) -> None:
        command = [VMM, "herd", *(["--rings"] if rings else []), str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.microseconds = self._ready()

    def _ready(self) -> float:
        assert self.process.stdout
        line = self.process.stdout.readline().decode()
        if not line.startswith("ready "):
            raise RuntimeError(f"dlh-vmm herd said {line!r}")
        return float(line.split()[1])

    def call(self) -> float:
        """Has each VM make a call; returns the microseconds it took each."""
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self._ready()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def kernel_kib() -> int:
    """What the kernel has allocated for itself."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    time.sleep(1)
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    fields = {name: int(value) for name, value, *_ in lines}
    return sum(fields[f"{name}:"] for name in ("Slab", "VmallocUsed", "Percpu", "KernelStack", "PageTables"))
