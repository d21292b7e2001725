# SPDX-License-Identifier: GPL-2.0
"""Runs test files, each in an L1 of its own: what selftests/run runs."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from .beside import Room, run_all
from .ktap_parser import KtapParser
from .machine import REPOSITORY, Machine, Options
from .patience import FACTOR

TESTS = REPOSITORY / "selftests/tests"
RESULTS = REPOSITORY / "build/results"
TIMINGS = RESULTS / "timings.json"
_VM_LINE = re.compile(r"^# vm:\s*(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Test:
    """A test file and the L1 it asks for."""

    path: Path
    options: Options

    @property
    def name(self) -> str:
        return self.path.stem

    @classmethod
    def read(cls, path: Path) -> Test:
        """Reads the `# vm:` lines, such as `# vm: smp=2 mem=4G icount=no timeout=300 append="..."`.

        timeout: seconds that an idle machine does not need; many times that end a test that never comes to an end.
        """
        options = Options()
        for words in _VM_LINE.findall(path.read_text()[:4096]):
            for word in shlex.split(words):
                key, _, value = word.partition("=")
                match key:
                    case "smp":
                        options = replace(options, smp=int(value))
                    case "mem":
                        options = replace(options, mem=value)
                    case "append":
                        options = replace(options, append=value)
                    case "timeout":
                        options = replace(options, timeout=FACTOR * float(value))
                    case "icount" | "one_thread" | "suspend" if value in ("yes", "no"):
                        options = replace(options, **{key: value == "yes"})
                    case "qemu":
                        options = replace(options, qemu=tuple(shlex.split(value)))
                    case _:
                        sys.exit(f"{path.name}: what is {word!r} in its vm line?")
        return cls(path, options)


# What a test file came to, and how many seconds that took.
type Result = tuple[KtapParser, float]


class Console:
    """Lines from several tests at a time, each line whole."""

    def __init__(self, prefixes: bool) -> None:
        self._lock = threading.Lock()
        self._prefixes = prefixes

    def say(self, test: Test, text: str) -> None:
        prefix = f"{test.name}: " if self._prefixes else ""
        with self._lock:
            print("\n".join(prefix + line for line in text.splitlines() or [""]), flush=True)


def run_test(test: Test, console: Console, expected: float | None) -> Result:
    """Runs one test file and judges all of it: what it printed, how it ended, what the kernels said."""
    about = f", about {expected:.0f} s" if expected else ""
    console.say(test, f"# {test.path.name} starts{about}")
    parser = KtapParser()
    if not os.access(test.path, os.X_OK):
        parser.failures.append("is not executable")
        parser.failed += 1
        console.say(test, f"# {test.path.name} is not executable")
        return parser, 0.0

    def line(text: str) -> None:
        parser.line(text)
        console.say(test, text)

    machine = Machine(RESULTS / test.name, test.options)
    outcome = machine.run(f"exec {test.path}", line)
    if outcome.boots > 1:
        console.say(test, f"# the host under test was booted {outcome.boots} times: it hung before the test began")
    parser.end(outcome.status)
    if outcome.problem:
        parser.failed += 1
        parser.failures.append(outcome.problem)
    for path, findings in outcome.findings.items():
        parser.failed += 1
        parser.failures.append(f"{len(findings)} finding(s) in {path.relative_to(REPOSITORY)}")
        console.say(test, "\n".join((f"# in {path.relative_to(REPOSITORY)}:", *map(str, findings))))
    if outcome.problem:
        console.say(test, machine.log_tails())
    verdict = "FAILED: " + "; ".join(parser.failures) if parser.failures else "passed"
    console.say(test, f"# {test.path.name} {verdict} ({outcome.seconds:.0f} s)")
    return parser, outcome.seconds


def select(patterns: list[str]) -> list[Test]:
    """The test files whose names match any of the patterns (parts of names, or globs)."""
    paths = [p for p in sorted(TESTS.glob("[0-9][0-9]-*")) if p.suffix in (".py", ".sh")]
    wanted = [
        path
        for path in paths
        if not patterns
        or any(pattern in path.name or fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
    ]
    return [Test.read(path) for path in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="selftests/run", description="Runs the tests, each file in a host of its own."
    )
    parser.add_argument("--list", action="store_true", help="only list the test files")
    parser.add_argument("--cpus", type=int, default=0, help="how many processors to use (all)")
    parser.add_argument("pattern", nargs="*", help="part of a test file's name, or a glob")
    arguments = parser.parse_args()

    tests = select(arguments.pattern)
    if not tests:
        print(f"no test file matches {' '.join(arguments.pattern) or 'selftests/tests/NN-*'}", file=sys.stderr)
    timings: dict[str, float] = json.loads(TIMINGS.read_text()) if TIMINGS.exists() else {}
    if arguments.list:
        for test in tests:
            last = f"{timings[test.name]:.0f} s" if test.name in timings else "never ran here"
            print(f"{test.name:30} {last}")
        return 0

    RESULTS.mkdir(parents=True, exist_ok=True)
    console = Console(prefixes=len(tests) > 1)
    started = time.monotonic()
    here = Room.here(arguments.cpus)
    outcomes = run_all(tests, here, lambda test: run_test(test, console, timings.get(test.name)))
    for test, (_, seconds) in zip(tests, outcomes, strict=True):
        if seconds:
            timings[test.name] = round(seconds, 1)
    TIMINGS.write_text(json.dumps(timings, indent=1, sort_keys=True) + "\n")

    print(f"# {len(tests)} test file(s) in {time.monotonic() - started:.0f} s, logs in build/results")
    for test, (result, _) in zip(tests, outcomes, strict=True):
        for failure in result.failures:
            print(f"# FAILED {test.name}: {failure}")
    passed, failed, skipped = (
        sum(getattr(result, what) for result, _ in outcomes) for what in ("passed", "failed", "skipped")
    )
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # At once, without waiting for the threads: the machines end with this process.
        os._exit(130)
