# SPDX-License-Identifier: GPL-2.0
"""Runs of L1 beside each other, as many as this machine has room for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .machine import Options


class Job(Protocol):
    """A run of L1, with a name of its own."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> Options: ...


@dataclass(frozen=True)
class Room:
    """What machines that run at the same time take, or may take, of this one."""

    cpus: int
    mib: int

    @classmethod
    def here(cls, cpus: int) -> Room:
        """What there is: `cpus` processors, or all if 0, and the memory that is available."""
        available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        return cls(cpus or os.process_cpu_count() or 1, int(available[1]) >> 10 if available else 0)

    @classmethod
    def of(cls, options: Options) -> Room:
        """What an L1 takes. Only the processors that its own are emulated on count."""
        one = options.icount or options.one_thread
        return cls(1 if one else options.smp, mebibytes(options.mem))

    def without(self, others: Iterable[Room]) -> Room:
        """What is left beside others."""
        taken = list(others)
        return Room(self.cpus - sum(room.cpus for room in taken), self.mib - sum(room.mib for room in taken))

    def holds(self, room: Room) -> bool:
        return room.cpus <= self.cpus and room.mib <= self.mib


def mebibytes(size: str) -> int:
    """A size as QEMU takes it, such as 6G or 512M."""
    return int(size[:-1]) * {"M": 1, "G": 1024}[size[-1]]


def run_all[J: Job, R](jobs: Sequence[J], here: Room, run: Callable[[J], R]) -> list[R]:
    """Runs jobs beside each other while there is room: the next in order that fits, or any if none runs."""
    waiting = list(jobs)
    running: dict[Future[R], J] = {}
    results: dict[str, R] = {}
    # Not as a context: an interrupted run does not wait for those that run.
    pool = ThreadPoolExecutor(max(1, len(jobs)))
    while waiting or running:
        left = here.without(Room.of(job.options) for job in running.values())
        fits = (job for job in waiting if not running or left.holds(Room.of(job.options)))
        if job := next(fits, None):
            waiting.remove(job)
            running[pool.submit(run, job)] = job
            continue
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            results[running.pop(future).name] = future.result()
    pool.shutdown()
    return [results[job.name] for job in jobs]
