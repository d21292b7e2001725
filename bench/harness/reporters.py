# SPDX-License-Identifier: GPL-2.0
"""Who reports a guest's free pages, and from which order on: the variants of a case. For use inside L1."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from vm.driver import CHURN, DRIVER, EAGER
from vm.guest import Guest
from vm.host import MODULES

from .inside import PROFILING

EMPTY = MODULES.parent / "test-modules/empty_reporter.ko"


class Variant(NamedTuple):
    """Who reports, and the order: dlh, balloon, none, or empty, which is handed the blocks and tells nobody. What a
    guest does beside that, if anything: busy."""

    reporter: str
    order: int
    beside: str = ""

    @classmethod
    def parse(cls, name: str) -> Self:
        reporter, order, *beside = name.split("-")
        if reporter not in ("none", "empty", "dlh", "balloon") or not order.isdigit() or beside not in ([], ["busy"]):
            raise ValueError(f"{name} is no variant")
        return cls(reporter, int(order), *beside)

    def guest(self, mib: int, append: str = "") -> Guest:
        """A guest that reports in this way, soon after pages are freed, whoever does it."""
        arguments: dict[str, Any] = {"mem": f"{mib}M", "binaries": [CHURN], "start": EAGER["start"]}
        arguments["append"] = f"{EAGER['append']} {append}"
        if PROFILING:
            arguments["append"] += " nokaslr"
        if self.reporter == "dlh":
            arguments["modules"] = [f"{DRIVER} order={self.order}"]
        if self.reporter == "empty":
            arguments["modules"] = [f"{EMPTY} order={self.order}"]
        if self.reporter == "balloon":
            arguments["free_page_reporting"] = True
            arguments["append"] += f" page_reporting.page_reporting_order={self.order}"
        return Guest(**arguments)
