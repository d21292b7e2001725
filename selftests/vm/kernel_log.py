# SPDX-License-Identifier: GPL-2.0
"""Finds what must not be in a kernel log."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# A line that matches any of these fails the run.
PATTERNS = (
    r"\bBUG:",
    r"kernel BUG at",
    r"\bWARNING:",
    r"\bOops\b",
    r"Kernel panic",
    r"general protection fault",
    r"unable to handle",
    r"Call Trace:",
    r"\bKASAN\b",
    r"\bKCSAN\b",
    r"\bKFENCE\b.*:.*\bin\b",
    r"\bUBSAN\b",
    r"refcount_t:",
    r"list_(add|del) corruption",
    r"Bad page (state|map)",
    r"Bad rss-counter state",
    r"non-zero pgtables_bytes",
    r"possible circular locking",
    r"possible recursive locking",
    r"inconsistent lock state",
    r"inconsistent \{.*\} usage",
    r"suspicious RCU usage",
    r"held lock freed",
    r"lock held when returning to user space",
    r"sleeping function called from invalid context",
    r"scheduling while atomic",
    r"\brcu\w*\b.*\bstalls?\b",
    r"\bsoft lockup\b",
    r"\bhard LOCKUP\b",
    r"blocked for more than",
    r"\bhung_task\b",
    r"stack-protector:",
    r"segfault at",
    r"rust_kernel: panicked",
    r"unchecked MSR access",
)
TROUBLE = re.compile("|".join(PATTERNS))

# Whole lines, without time stamps, that match TROUBLE and have nothing to do with us. Each needs a
# comment saying where it comes from and why it is harmless.
KNOWN_UNRELATED: frozenset[str] = frozenset()

# What the kernel only repeats from its command line is no report.
_ECHO = re.compile(r"(Kernel command line|Command line|Unknown kernel command line parameters)")
_TIME_STAMP = re.compile(r"^(<\d+>)?\[\s*\d+\.\d+\](\[\s*[TC]\d+\])?\s?")


@dataclass(frozen=True)
class Finding:
    """A line of a kernel log that must not be there, with the lines around it."""

    line_number: int
    line: str
    context: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((f"line {self.line_number}: {self.line}", *(f"  | {c}" for c in self.context)))


def scan(text: str, before: int = 3, after: int = 25) -> list[Finding]:
    """The findings in a log. Those within the context of an earlier one are part of it."""
    lines = [line.rstrip("\r") for line in text.splitlines()]
    findings: list[Finding] = []
    covered = 0
    for index, line in enumerate(lines):
        if index < covered or not TROUBLE.search(line) or _ECHO.search(line):
            continue
        if _TIME_STAMP.sub("", line) in KNOWN_UNRELATED:
            continue
        covered = index + after
        findings.append(Finding(index + 1, line, tuple(lines[max(0, index - before) : covered])))
    return findings


def scan_file(path: Path) -> list[Finding]:
    """The findings in a log file. A log that is not there has none."""
    if not path.exists():
        return []
    return scan(path.read_text(errors="replace"))
