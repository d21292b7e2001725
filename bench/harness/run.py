# SPDX-License-Identifier: GPL-2.0
"""Runs the cases, each several times in an L1 that counts instructions: what bench/run runs."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from vm.beside import Room, run_all
from vm.machine import REPOSITORY, Machine, Options

from . import figures, report

CASES = REPOSITORY / "bench/cases"
LOGS = REPOSITORY / "build/bench"
RESULTS = REPOSITORY / "bench/results.json"
# Far more than any takes; a guest that the emulation loses stands still, or spins, for ever.
TIMEOUT_S = 240
ATTEMPTS = 4
_HEADER = re.compile(r"^# (mem|variants): (.*)$", re.MULTILINE)
_print_lock = threading.Lock()


@dataclass(frozen=True)
class Run:
    """One run of a case, in one of its variants."""

    case: str
    variant: str
    repeat: int
    options: Options

    @property
    def key(self) -> str:
        """Under what its figures are kept."""
        return f"{self.case}/{self.variant}" if self.variant else self.case

    @property
    def name(self) -> str:
        return f"{self.key.replace('/', '-')}-{self.repeat}"


def plan(names: list[str], repeats: int) -> list[Run]:
    """All runs of the cases that are named, or of all."""
    known = {path.stem: path for path in sorted(CASES.glob("*.py"))}
    if unknown := [name for name in names if name.partition("/")[0] not in known]:
        sys.exit(f"no benchmark {' '.join(unknown)}; there are {' '.join(known)}")
    runs = []
    for case, _, only in (name.partition("/") for name in dict.fromkeys(names or known)):
        header = dict(_HEADER.findall(known[case].read_text()))
        options = Options(smp=1, icount=True, mem=header["mem"], timeout=TIMEOUT_S)
        for repeat in range(repeats):
            variants = header.get("variants", "").split() or [""]
            if only and only not in variants:
                sys.exit(f"{case} has no variant {only}; there are {' '.join(variants) or 'none'}")
            variants = [only] if only else variants
            runs += [Run(case, variant, repeat, options) for variant in variants]
    return list(dict.fromkeys(runs))


def say(text: str) -> None:
    with _print_lock:
        print(text, flush=True)


def execute(run: Run) -> dict[str, float]:
    """What a run has measured; empty if it failed, again and again: the emulation loses a Linux guest now and then
    (docs/testing.md)."""
    for _ in range(ATTEMPTS):
        measured, again = _execute_once(run)
        if measured or not again:
            return measured
    return {}


def _execute_once(run: Run) -> tuple[dict[str, float], bool]:
    """What a run has measured; whether another attempt may go better, if nothing: not if the host's log has something."""
    measured: dict[str, float] = {}

    def line(text: str) -> None:
        words = text.split()
        if len(words) == 3 and words[0] == "figure":
            measured[words[1]] = float(words[2])
        else:
            say(f"{run.name}: {text}")

    machine = Machine(LOGS / run.name, run.options)
    path = f"PYTHONPATH=/src/kvm-dlh/selftests:/src/kvm-dlh/bench python3 bench/cases/{run.case}.py {run.variant}"
    outcome = machine.run(path, line)
    if not outcome.good():
        found = [str(finding) for findings in outcome.findings.values() for finding in findings]
        say("\n".join((f"{run.name}: FAILED", outcome.problem, *found, machine.log_tails(10))))
        return {}, machine.kernel_log not in outcome.findings
    say(f"{run.name}: {len(measured)} figures in {outcome.seconds:.0f} s")
    return measured, False


def environment() -> dict[str, str]:
    """What was measured, and on what."""
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True).stdout
    commit = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", REPOSITORY, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    found = re.search(r"version (\S+)", qemu)
    return {"kernel": os.environ["KREL"], "qemu": found[1] if found else "", "commit": commit}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/run", description="Runs the benchmarks.")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is run (3)")
    parser.add_argument("--cpus", type=int, default=0, help="how many processors to use (all)")
    parser.add_argument("case", nargs="*", metavar="name", help="names, as in bench/cases, with or without /variant")
    arguments = parser.parse_args()
    runs = plan(arguments.case, arguments.repeats)
    print(f"{len(runs)} runs; all benchmarks take about 40 minutes on two CPUs", flush=True)
    started = time.monotonic()
    outcomes = run_all(runs, Room.here(arguments.cpus), execute)
    failed = [run.name for run, outcome in zip(runs, outcomes, strict=True) if not outcome]

    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    here = environment()
    raw: dict[str, list[dict[str, float]]] = kept.get("raw", {})
    commits: dict[str, str] = kept.get("commits", {})
    for key in dict.fromkeys(run.key for run in runs):
        # One that failed keeps its place: figures are derived from what belongs together.
        all_repeats = [outcome for run, outcome in zip(runs, outcomes, strict=True) if run.key == key]
        if any(all_repeats):
            raw[key], commits[key] = all_repeats, here["commit"]
    results = {"environment": here, "commits": commits, "figures": {}, "raw": raw}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    derived = figures.derive_all(raw)
    results["figures"] = {name: figure.as_json() for name, figure in derived.items()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, figure in derived.items():
        print(f"{name} {figure}")
    print(f"# {time.monotonic() - started:.0f} s, all of it in {RESULTS.relative_to(REPOSITORY)}")
    if failed:
        print(f"# FAILED: {' '.join(failed)}")
        return 1
    here["repeats"] = str(min(map(len, raw.values())))
    if len(set(commits.values())) > 1:
        print(f"# docs/performance.md is not renewed: measured at different commits, {commits}")
    elif missing := report.write(derived, here):
        print(f"# docs/performance.md is not renewed, missing: {' '.join(missing)}")
    else:
        print("# docs/performance.md and its charts are renewed")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # At once, with what runs.
        os._exit(130)
