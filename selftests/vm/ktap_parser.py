# SPDX-License-Identifier: GPL-2.0
"""Reads KTAP strictly: what a test did not say counts as a failure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_VERSION = re.compile(r"^(KTAP version 1|TAP version 1[34])$")
_PLAN = re.compile(r"^1\.\.(\d+)(?:\s*#\s*SKIP\b\s*(.*))?$")
_RESULT = re.compile(r"^(ok|not ok)\b\s*(\d+)?(?:\s+-)?\s*([^#]*?)\s*(?:#\s*(\w+)\b\s*(.*))?$")


@dataclass
class KtapParser:
    """Takes the lines of one test file and counts its results."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    """What failed: the names of results, and what was wrong with the file as a whole."""
    _version: bool = False
    _planned: int | None = None
    _results: int = 0

    def line(self, text: str) -> None:
        """Takes one line. Indented lines belong to subtests, whose parent's result counts."""
        text = text.rstrip("\r\n")
        if _VERSION.match(text):
            self._version = True
        elif match := _PLAN.match(text):
            self._plan(int(match[1]), match[2])
        elif match := _RESULT.match(text):
            self._result(*match.groups())
        elif text.startswith("Bail out!"):
            self._fail(text)

    def end(self, status: int | None) -> None:
        """The test file has ended; None where its exit status is not known."""
        if not self._version:
            self._fail("no KTAP version line")
        if self._planned is None:
            self._fail("no plan")
        elif self._results < self._planned:
            self._fail(f"ended after {self._results} of {self._planned} results")
        # A status that only repeats failures already counted says nothing new.
        if status and not self.failed:
            self._fail(f"exit status {status}")

    def _plan(self, count: int, skip_reason: str | None) -> None:
        if self._planned is not None:
            self._fail("a second plan")
        elif self._results:
            self._fail("the plan comes after results")
        elif count == 0 and skip_reason is None:
            self._fail("an empty plan without a reason")
        elif count == 0:
            self.skipped += 1
        self._planned = count

    def _result(
        self, verdict: str, number: str | None, name: str, directive: str | None, _reason: str | None
    ) -> None:
        self._results += 1
        name = f"{number or '?'} {name}".strip()
        if self._planned is None:
            self._fail(f"a result before the plan: {name}")
        elif self._results > self._planned:
            self._fail(f"a result more than planned: {name}")
        elif number is None or int(number) != self._results:
            self._fail(f"out of order, expected number {self._results}: {name}")
        elif verdict == "not ok":
            self._fail(name)
        elif (directive or "").upper() == "SKIP":
            self.skipped += 1
        elif (directive or "").upper() in ("TODO", "XFAIL", "TIMEOUT", "ERROR"):
            self._fail(f"{name} # {directive}")
        else:
            self.passed += 1

    def _fail(self, what: str) -> None:
        self.failed += 1
        self.failures.append(what)
