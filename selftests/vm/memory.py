# SPDX-License-Identifier: GPL-2.0
"""The kinds of memory that a guest can be given, by QEMU's command line. For use inside L1."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

HUGETLBFS = Path("/dev/hugepages")


class Kind(NamedTuple):
    """A kind of guest memory."""

    name: str
    backend: str = ""
    """The object for `Guest(memory_backend=...)`; QEMU's default without."""
    page_kib: int = 4
    """The smallest piece that the host can release."""


ANONYMOUS = Kind("private anonymous")
MEMFD_SHARED = Kind("memfd, shared", "memory-backend-memfd,share=on")
MEMFD_PRIVATE = Kind("memfd, private", "memory-backend-memfd,share=off")
HUGETLBFS_SHARED = Kind("hugetlbfs 2 MiB, shared", f"memory-backend-file,mem-path={HUGETLBFS},share=on", 2048)
HUGETLBFS_PRIVATE = Kind("hugetlbfs 2 MiB, private", f"memory-backend-file,mem-path={HUGETLBFS},share=off", 2048)
KINDS = (ANONYMOUS, MEMFD_SHARED, MEMFD_PRIVATE, HUGETLBFS_SHARED, HUGETLBFS_PRIVATE)


def reserve_hugetlb(mib: int) -> None:
    """Sets 2 MiB pages aside in the host and mounts hugetlbfs; less than asked for is an error."""
    pages = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    pages.write_text(str(mib // 2))
    if int(pages.read_text()) < mib // 2:
        raise RuntimeError(f"the host has no {mib} MiB of huge pages")
    if not HUGETLBFS.is_mount():
        HUGETLBFS.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "hugetlbfs", HUGETLBFS], check=True)
