# SPDX-License-Identifier: GPL-2.0
"""How long to wait for what comes on any machine, or never. No verdict depends on the speed of the machine.

A wait ends when what it is for has come. The time given to it ends a hang, no more, so it is far longer than
anything takes on a machine that has other things to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds for one wait. What is waited for takes a few, at most some tens, on an idle machine.
PATIENCE = 600.0
# Seconds without a sign of life (output, a line in a kernel log) of a host under test that has hung; longer than a wait.
SILENCE = 2 * PATIENCE
# The same before it has booted: it has nothing else to do.
BOOT_SILENCE = 180.0
# A run that goes on for ever, saying this and that, ends after so many times the seconds of its vm line.
FACTOR = 10
# For a kernel's command line: one that a busy machine gives little time is not stuck; one that is says so later.
SLOW = "rcupdate.rcu_cpu_stall_timeout=240 watchdog_thresh=60 workqueue.watchdog_thresh=240"


def wait_until(condition: Callable[[], object], timeout: float = PATIENCE, pause: float = 0.1) -> bool:
    """Waits for a condition; whether it came true. It is looked at once more when the time is up."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return bool(condition())
        if pause:
            time.sleep(pause)
    return True
