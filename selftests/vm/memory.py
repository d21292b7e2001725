# SPDX-License-Identifier: GPL-2.0
"""Memory of guests: the kinds that QEMU can give them, and a host that runs short of it. For use inside L1."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple, Self

from .patience import wait_until
from .running import Running

HUGETLBFS = Path("/dev/hugepages")


class Kind(NamedTuple):
    """A kind of guest memory."""

    name: str
    backend: str = ""
    """The object for `Guest(memory_backend=...)`; QEMU's default without."""
    qemu: tuple[str, ...] = ()
    """More of QEMU's arguments."""


ANONYMOUS = Kind("private anonymous")
MEMFD_SHARED = Kind("memfd, shared", "memory-backend-memfd,share=on")
MEMFD_PRIVATE = Kind("memfd, private", "memory-backend-memfd,share=off")
HUGETLBFS_SHARED = Kind("hugetlbfs 2 MiB, shared", f"memory-backend-file,mem-path={HUGETLBFS},share=on")
HUGETLBFS_PRIVATE = Kind("hugetlbfs 2 MiB, private", f"memory-backend-file,mem-path={HUGETLBFS},share=off")
LOCKED = Kind("private anonymous, locked", qemu=("-overcommit", "mem-lock=on"))
KINDS = (ANONYMOUS, MEMFD_SHARED, MEMFD_PRIVATE, HUGETLBFS_SHARED, HUGETLBFS_PRIVATE, LOCKED)


def hold(guest: Running, mib: int, how: str = "fill") -> bool:
    """Has a process of the guest use memory until `let_go`; whether it has all of it. Needs dlh-churn there.

    how: its command, without the amount; `holes` keeps half of it even then.
    """
    guest.check("rm -f /tmp/go /tmp/filled && mkfifo /tmp/go")
    guest.check(f"cat /tmp/go | dlh-churn {how} --mib {mib} > /tmp/filled &")
    return wait_until(lambda: guest.run("test -s /tmp/filled").status == 0)


def let_go(guest: Running) -> None:
    """Ends what `hold` began."""
    guest.check(": > /tmp/go")


def footprint_kib(guest: Running) -> int:
    """What the host has in memory for a guest, huge pages included."""
    return guest.rss_kib() + guest.status_kib("HugetlbPages")


def reserve_hugetlb(mib: int) -> None:
    """Sets 2 MiB pages aside in the host and mounts hugetlbfs; less than asked for is an error."""
    pages = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    pages.write_text(str(mib // 2))
    if int(pages.read_text()) < mib // 2:
        raise RuntimeError(f"the host has no {mib} MiB of huge pages")
    if not HUGETLBFS.is_mount():
        HUGETLBFS.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "hugetlbfs", HUGETLBFS], check=True)


def make_ram_disks(count: int, mib: int) -> list[Path]:
    """Block devices in the host's memory, which nobody's cgroup is charged for."""
    subprocess.run(["modprobe", "brd", f"rd_nr={count}", f"rd_size={mib << 10}"], check=True)
    return [Path(f"/dev/ram{number}") for number in range(count)]


def swap_on(disk: Path) -> None:
    """Has the host swap to a disk."""
    subprocess.run(["mkswap", "--quiet", disk], check=True)
    subprocess.run(["swapon", disk], check=True)


def host_vmstat(name: str) -> int:
    """A counter of the host's /proc/vmstat."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return int(dict(line.split() for line in lines)[name])


class MemoryCgroup:
    """A memory cgroup of the host; processes made inside of `with` are in it."""

    _ROOT = Path("/sys/fs/cgroup")

    def __init__(self, name: str) -> None:
        (self._ROOT / "cgroup.subtree_control").write_text("+memory")
        self._path = self._ROOT / name
        self._path.mkdir()

    def limit(self, mib: int) -> None:
        """Lets it have so much memory in use; what is more is swapped out now."""
        (self._path / "memory.max").write_text(str(mib << 20))

    def mib(self, what: str) -> int:
        """`current` or `swap.current`, in MiB."""
        return int((self._path / f"memory.{what}").read_text()) >> 20

    def remove(self) -> None:
        """Removes it, after its processes."""
        self._path.rmdir()

    def __enter__(self) -> Self:
        (self._path / "cgroup.procs").write_text("0")
        return self

    def __exit__(self, *_: object) -> None:
        (self._ROOT / "cgroup.procs").write_text("0")
