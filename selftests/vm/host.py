# SPDX-License-Identifier: GPL-2.0
"""The modules in the host under test: inserting them, and what they tell in debugfs. For use inside L1."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

MODULES = Path("/src/kvm-dlh/build/modules")
DEBUGFS = Path("/sys/kernel/debug")


def insert_host_modules() -> None:
    """Inserts kvm_dlh.ko and ksm_bridge.ko."""
    for name in ("kvm_dlh", "ksm_bridge"):
        subprocess.run(["insmod", MODULES / f"{name}.ko"], check=True)


def remove_host_modules() -> None:
    """Removes both."""
    subprocess.run(["rmmod", "ksm_bridge", "kvm_dlh"], check=True)


class _Statistics:
    """The `name value` lines of the one VM of a VMM; nothing there yet reads as 0."""

    module = ""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def all(self) -> dict[str, int]:
        """All counters; empty if the module does not know the VM."""
        for directory in (DEBUGFS / self.module).glob(f"{self.pid}-*"):
            lines = (directory / "stats").read_text().splitlines()
            return {name: int(value) for name, value in (line.split() for line in lines)}
        return {}

    def get(self, name: str) -> int:
        """One counter."""
        counters = self.all()
        if counters and name not in counters:
            raise KeyError(name)
        return counters.get(name, 0)


class Bridge(_Statistics):
    """ksm_bridge's view of a VM."""

    module = "ksm_bridge"

    def again(self) -> None:
        """Has the guest report all that is free once more, as the operator does."""
        (directory,) = (DEBUGFS / self.module).glob(f"{self.pid}-*")
        (directory / "again").write_text("1")


class Dlh(_Statistics):
    """kvm_dlh's view of a VM."""

    module = "kvm_dlh"

    def check_law(self) -> bool:
        """Whether submitted = executed + declined + dropped + pending."""
        s = self.all()
        return s["submitted"] == s["executed"] + s["declined"] + s["dropped"] + s["pending"]

    def settle(self, quiet: float = 5, timeout: float = 90) -> None:
        """Waits until no call has been executed for `quiet` seconds: everything free is reported."""
        deadline, last, since = time.monotonic() + timeout, -1, time.monotonic()
        while time.monotonic() - since < quiet:
            now = self.get("executed")
            if now != last:
                last, since = now, time.monotonic()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the guest of {self.pid} still reports pages after {timeout} s")
            time.sleep(0.5)
