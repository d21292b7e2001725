# SPDX-License-Identifier: GPL-2.0
"""Finds a VMM's VM in debugfs. For use inside L1.

KVM names its directories `<tid>-<fd>`, by the thread that made the VM, which need not be the VMM's first; the
modules take these names over. They also say whose VM it is, as `vmm_pid` in their `stats`, as that thread may have
ended. QEMU's first thread makes its VM; cloud-hypervisor's is made by another.
"""

from __future__ import annotations

from pathlib import Path

DEBUGFS = Path("/sys/kernel/debug")
PROC = Path("/proc")
PF_EXITING = 4


class NoVm(RuntimeError):
    """A VMM that runs has no VM, or not one that is known where it is looked for; the message says what there is."""


def is_running(pid: int) -> bool:
    """Whether a process is there and is not about to end; its VM goes before it is a zombie."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    state, *_, flags = stat.rpartition(")")[2].split()[:7]
    return state not in "ZX" and not int(flags) & PF_EXITING


def threads(pid: int) -> set[str]:
    """The threads of a process by their numbers; its own number in any case."""
    try:
        return {str(pid), *(task.name for task in (PROC / str(pid) / "task").iterdir())}
    except (FileNotFoundError, ProcessLookupError):
        return {str(pid)}


def _owner(directory: Path) -> str | None:
    """The process that a module says a VM belongs to; None if it does not say so, or has forgotten it meanwhile."""
    try:
        lines = (directory / "stats").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[1] for line in lines if line.startswith("vmm_pid ")), None)


def directories(module: str, pid: int) -> list[Path]:
    """The directories that a module, or KVM itself (`kvm`), has for VMs of a process."""
    tids = threads(pid)
    try:
        there = [path for path in (DEBUGFS / module).iterdir() if "-" in path.name]
    except FileNotFoundError:
        there = []
    found = []
    for path in sorted(there):
        owner = None if module == "kvm" else _owner(path)
        if owner == str(pid) or (owner is None and path.name.partition("-")[0] in tids):
            found.append(path)
    if not found and module == "kvm":
        # The thread that made it has ended: the name is known to the module, which knows the process.
        names = {path.name.partition(".")[0] for path in directories("kvm_dlh", pid)}
        found = [path for path in there if path.name in names]
    return found


def directory(module: str, pid: int) -> Path | None:
    """That of the one VM of a process; None if the process has ended, or if ksm_bridge, which meets a VM with its first
    report, has none.

    A process that runs and has no VM there, or several, is an error: nothing would ever come of waiting for it.
    """
    match directories(module, pid):
        case [path]:
            return path
        case []:
            expected = module != "ksm_bridge" or not directories("kvm", pid)
            if expected and is_running(pid):
                raise NoVm(f"{module} knows no VM of process {pid}: {_there(module)}, {_there('kvm')}")
            return None
        case several:
            raise NoVm(f"process {pid} has several VMs: {[path.name for path in several]}")


def _there(module: str) -> str:
    """What there is, for a message."""
    path = DEBUGFS / module
    names = sorted(entry.name for entry in path.iterdir() if "-" in entry.name) if path.exists() else "no directory"
    return f"{path} has {names}"
