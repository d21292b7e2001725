# SPDX-License-Identifier: GPL-2.0
"""The modules in the host under test: inserting them, and what they tell in debugfs. For use inside L1."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .find import DEBUGFS as DEBUGFS
from .find import NoVm, directory
from .patience import wait_until

# Where ksm_bridge has a directory for each VM that has reported something.
CONTROL = Path("/sys/kernel/ksm_bridge")
MODULES = Path("/src/kvm-dlh/build/modules")


def insert_host_modules() -> None:
    """Inserts kvm_dlh.ko and ksm_bridge.ko."""
    for name in ("kvm_dlh", "ksm_bridge"):
        subprocess.run(["insmod", MODULES / f"{name}.ko"], check=True)


def remove_host_modules() -> None:
    """Removes both."""
    subprocess.run(["rmmod", "ksm_bridge", "kvm_dlh"], check=True)


def workers(pid: int) -> list[int]:
    """The kernel threads that release pages for a VMM's VMs. KVM tells the thread that made a VM, not the process."""
    try:
        threads = {task.name for task in Path(f"/proc/{pid}/task").iterdir()}
    except FileNotFoundError:
        threads = {str(pid)}
    return [worker for worker, thread in all_workers() if thread in threads]


def all_workers() -> list[tuple[int, str]]:
    """All such threads, with the thread of a VMM that each is named after."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith("ksm_bridge/"):
            found.append((int(process.name), name.removeprefix("ksm_bridge/")))
    return found


class _Statistics:
    """The `name value` lines of the one VM of a VMM.

    One that has ended reads as 0; one that runs and is not known is an error (`NoVm`).
    """

    module = ""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._directory: Path | None = None

    def directory(self) -> Path | None:
        """Where the module shows the VM; None if it does not know it."""
        if self._directory is None or not self._directory.exists():
            self._directory = directory(self.module, self.pid)
        return self._directory

    def all(self) -> dict[str, int]:
        """All counters; empty if the module does not know the VM."""
        path = self.directory()
        try:
            lines = (path / "stats").read_text().splitlines() if path else []
        except OSError:
            if path and path.exists():
                raise
            # The VM has ended meanwhile.
            lines = []
        return {name: int(value) for name, value in (line.split() for line in lines)}

    def get(self, name: str) -> int:
        """One counter."""
        counters = self.all()
        if counters and name not in counters:
            raise KeyError(name)
        return counters.get(name, 0)


class Bridge(_Statistics):
    """ksm_bridge's view of a VM, which it meets with its first report: until then it reads as 0."""

    module = "ksm_bridge"

    def again(self) -> None:
        """Has the guest report all that is free once more, as the operator does."""
        debugfs = self.directory()
        if debugfs is None:
            raise NoVm(f"process {self.pid} has not reported anything")
        directory = CONTROL / debugfs.name
        # It comes a moment after the other one.
        wait_until(directory.exists)
        (directory / "again").write_text("1")


class Dlh(_Statistics):
    """kvm_dlh's view of a VM, which it knows from its beginning; if it came later itself, from the VM's first call on."""

    module = "kvm_dlh"

    def check_law(self) -> bool:
        """Whether submitted = executed + declined + dropped + pending."""
        s = self.all()
        return s["submitted"] == s["executed"] + s["declined"] + s["dropped"] + s["pending"]
