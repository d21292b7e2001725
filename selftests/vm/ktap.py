# SPDX-License-Identifier: GPL-2.0
"""Prints test results as KTAP. For test authors:

    import vm.ktap as ktap

    ktap.plan(2)
    ktap.ok(1 + 1 == 2, "adds up")
    ktap.skip("needs 1 GiB pages", "maps a huge page")
    ktap.done()
"""

from __future__ import annotations

import sys
from typing import NoReturn

_planned = 0
_results = 0
_failures = 0


def plan(count: int) -> None:
    """Says how many results will follow. Comes first."""
    global _planned
    _planned = count
    print(f"KTAP version 1\n1..{count}", flush=True)


def skip_all(reason: str) -> NoReturn:
    """In place of a plan: nothing here can be tested on this machine."""
    print(f"KTAP version 1\n1..0 # SKIP {reason}", flush=True)
    sys.exit(0)


def ok(condition: object, name: str, *details: object) -> bool:
    """A result; where it is a failure, the details say what was seen."""
    global _results, _failures
    _results += 1
    if not condition:
        _failures += 1
        for detail in details:
            comment(str(detail))
    print(f"{'ok' if condition else 'not ok'} {_results} - {name}", flush=True)
    return bool(condition)


def equal(seen: object, expected: object, name: str) -> bool:
    """A result: two values are equal."""
    return ok(seen == expected, name, f"expected {expected!r}", f"seen     {seen!r}")


def skip(reason: str, name: str) -> None:
    """A result that cannot be had on this machine."""
    global _results
    _results += 1
    print(f"ok {_results} - {name} # SKIP {reason}", flush=True)


def comment(text: str) -> None:
    """A line for the reader of the log."""
    for line in text.splitlines() or [""]:
        print(f"# {line}", flush=True)


def done() -> NoReturn:
    """Ends the test. The exit status repeats the verdict."""
    if _results != _planned:
        comment(f"planned {_planned} results, gave {_results}")
    sys.exit(0 if _results == _planned and not _failures else 1)
