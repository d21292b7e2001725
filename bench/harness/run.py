# SPDX-License-Identifier: GPL-2.0
"""Runs the cases, each several times in an L1 that counts instructions: what bench/run runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from vm.beside import Room, run_all
from vm.machine import REPOSITORY, Machine, Options

from . import figures
from .inside import NO_FIGURE
from .profile import Profiler

CASES = REPOSITORY / "bench/cases"
LOGS = REPOSITORY / "build/bench"
RESULTS = REPOSITORY / "bench/results.json"
TIMEOUT_S = 7200
REPEATS = 3
ALL_MINUTES = 60
# Each says how far it is more often, also on a busy machine; a guest that the emulation loses stands still, or spins, for ever.
SILENCE_S = 120
ATTEMPTS = 6
_HEADER = re.compile(r"^# (mem|smp|append|variants): (.*)$", re.MULTILINE)
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
        parts = ("" if self.options.icount else figures.WALL, self.case, self.variant)
        return "/".join(part for part in parts if part)

    @property
    def name(self) -> str:
        return f"{self.key.replace('/', '-')}-{self.repeat}"


def known_cases() -> dict[str, Path]:
    """The cases by their names."""
    return {path.stem: path for path in sorted(CASES.glob("*.py"))}


def plan(names: list[str], repeats: int, wall: bool) -> list[Run]:
    """All runs of the cases that are named, or of all; by the clock as well, if that means something here."""
    known = known_cases()
    if unknown := [name for name in names if name.partition("/")[0] not in known]:
        sys.exit(f"no benchmark {' '.join(unknown)}; there are {' '.join(known)}")
    runs = []
    for case, _, only in (name.partition("/") for name in dict.fromkeys(names or known)):
        header = dict(_HEADER.findall(known[case].read_text()))
        variants = header.get("variants", "").split() or [""]
        if only and only not in variants:
            there_are = " ".join(variants)
            sys.exit(f"{case} has no " + (f"variant {only}; there are {there_are}" if there_are else "variants"))
        counted = Options(
            smp=int(header.get("smp", 1)),
            icount=True,
            mem=header["mem"],
            append=header.get("append", ""),
            timeout=TIMEOUT_S,
            silence=SILENCE_S,
        )
        for options in (counted, replace(counted, icount=False))[: 1 + wall]:
            for repeat in range(repeats):
                runs += [Run(case, variant, repeat, options) for variant in ([only] if only else variants)]
    return list(dict.fromkeys(runs))


def real_virtualisation() -> bool:
    """Whether the host under test runs on a CPU, with guests of its own: only then does time mean something."""
    run = subprocess.run([REPOSITORY / "tools/accel"], check=True, capture_output=True, text=True)
    return run.stdout.strip() == "kvm"


def say(text: str) -> None:
    with _print_lock:
        print(text, flush=True)


def execute(run: Run) -> dict[str, float]:
    """What a run has measured; empty if it failed. One that the emulation has lost a guest of, as it does now and then
    (docs/emulation.md), is begun anew; one that has come to an end with nothing to show is not."""
    for attempt in range(1, ATTEMPTS + 1):
        measured, again = _execute_once(run)
        if measured:
            return {**measured, "attempts": attempt}
        if not again:
            break
    return {}


def command(run: Run) -> str:
    return f"PYTHONPATH=/src/kvm-dlh/selftests:/src/kvm-dlh/bench python3 bench/cases/{run.case}.py {run.variant}"


def _execute_once(run: Run) -> tuple[dict[str, float], bool]:
    """What a run has measured; whether another attempt may go better, if nothing: not if the host's log has something,
    or if the case has found that there is nothing to measure."""
    measured: dict[str, float] = {}

    def line(text: str) -> None:
        words = text.split()
        if len(words) == 3 and words[0] == "figure":
            measured[words[1]] = float(words[2])
        else:
            say(f"{run.name}: {text}")

    machine = Machine(LOGS / run.name, run.options)
    outcome = machine.run(command(run), line)
    if not outcome.good():
        found = [str(finding) for findings in outcome.findings.values() for finding in findings]
        say("\n".join((f"{run.name}: FAILED", outcome.problem, *found, machine.log_tails(10))))
        return {}, outcome.status != NO_FIGURE and machine.kernel_log not in outcome.findings
    say(f"{run.name}: {len(measured)} figures in {outcome.seconds:.0f} s")
    return measured, False


def show_profile(run: Run, millions: int) -> int:
    """Runs what a case has to look at, and says where its instructions go."""
    profiler = Profiler(LOGS / f"profile-{run.name}", replace(run.options, silence=math.inf), millions * 1_000_000)
    outcome = profiler.machine.run(f"BENCH_PROFILE=1 {command(run)}", lambda text: profiler.line(text) or say(text))
    if not outcome.good():
        say(f"FAILED: {outcome.problem}\n{profiler.machine.log_tails(10)}")
        return 1
    say(profiler.report())
    return 0


def environment() -> dict[str, str]:
    """What was measured, and on what."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "safe.directory=*", "-C", REPOSITORY, *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    qemu = subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True).stdout
    # What is only read by people is not what was measured.
    measured = ("--", ".", ":!docs", ":!*.md", ":!*.md.in")
    commit = git("log", "-1", "--format=%h", *measured) + ("-dirty" if git("status", "--porcelain", *measured) else "")
    found = re.search(r"version (\S+)", qemu)
    return {"kernel": os.environ["KREL"], "qemu": found[1] if found else "", "commit": commit}


class Results:
    """bench/results.json: what was measured, and now or before, and what is derived from it."""

    def __init__(self, runs: list[Run]) -> None:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        known = {run.key for run in plan([], 1, wall=True)}
        self._environment = environment()
        self._raw = {key: value for key, value in kept.get("raw", {}).items() if key in known}
        # Of each the environment that it was measured in.
        self._measured_in = {key: kept.get("measured_in", {}).get(key, {}) for key in self._raw}
        self._repeats = Counter(run.key for run in runs)
        self._lock = threading.Lock()

    def add(self, run: Run, measured: dict[str, float]) -> None:
        """Keeps what a run has measured, in place of what there was from before. Also if that is nothing: figures
        are derived from what belongs together."""
        with self._lock:
            if run.key in self._repeats:
                self._raw[run.key] = [{} for _ in range(self._repeats.pop(run.key))]
                self._measured_in[run.key] = self._environment
            self._raw[run.key][run.repeat] = measured
            self._write()

    def _write(self) -> None:
        derived = {name: figure.as_json() for name, figure in self.figures().items()}
        what = {"measured_in": self._measured_in, "figures": derived, "raw": self._raw}
        RESULTS.write_text(json.dumps(what, indent=1) + "\n")

    def figures(self) -> dict[str, figures.Figure]:
        return figures.derive_all(self._raw)

    def report(self) -> str:
        """Renews docs/performance.md, if everything is there; says whether it was."""
        page = "docs/performance.md"
        keys_by_environment: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for key, where in self._measured_in.items():
            keys_by_environment.setdefault(tuple(sorted(where.items())), []).append(key)
        if not keys_by_environment:
            return f"{page} is not renewed: nothing is measured yet"
        if len(keys_by_environment) > 1:
            parts = "; ".join(f"{' '.join(keys)} at {dict(where)}" for where, keys in keys_by_environment.items())
            return f"{page} is not renewed, as not all was measured at one commit and in one environment: {parts}"
        here = dict(*keys_by_environment)
        if here.get("commit", "-dirty").endswith("-dirty"):
            return f"{page} is not renewed: it is not known what was measured, there are changes that are not committed"
        good = [run for runs in self._raw.values() for run in runs if run]
        lost = sum(int(run["attempts"]) - 1 for run in good)
        if absent := [run.key for run in plan([], 1, wall=False) if run.key not in self._raw]:
            return f"{page} is not renewed, not yet run at {here['commit']}: {' '.join(absent)}"
        # Only here, as it needs pygal, which make bench brings.
        from . import report

        if missing := report.write(self.figures(), {**here, "runs": str(len(good)), "lost": str(lost)}):
            return f"{page} is not renewed, missing: {' '.join(missing)}"
        return f"{page} and its charts are renewed"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/run", description="Runs the benchmarks.")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"how often each is run ({REPEATS})")
    parser.add_argument("--cpus", type=int, default=0, help="how many processors to use (all)")
    parser.add_argument("--wall", action="store_true", help="by the clock, too: the default where KVM is real")
    parser.add_argument("--profile", action="store_true", help="show where the instructions of a case go, instead")
    parser.add_argument("--millions", type=int, default=50, help="of instructions to look at at most (50)")
    parser.add_argument("--report", action="store_true", help="measure nothing: only write docs/performance.md anew")
    parser.add_argument("case", nargs="*", metavar="name", help=f"{' '.join(known_cases())}, with or without /variant; all")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats is 1 or more")
    if arguments.report:
        print(Results([]).report())
        return 0
    wall = not arguments.profile and (arguments.wall or real_virtualisation())
    runs = plan(arguments.case, arguments.repeats, wall)
    if arguments.profile:
        if len({run.key for run in runs}) != 1:
            parser.error("--profile takes one benchmark, and one of its variants")
        if "profiled(" not in known_cases()[runs[0].case].read_text():
            parser.error(f"{runs[0].case} has no part that is profiled")
        say(f"profiling {runs[0].key}, some minutes; all of it is in {LOGS.relative_to(REPOSITORY)}/profile-*/profile")
        return show_profile(runs[0], arguments.millions)
    whole = len(plan([], REPEATS, wall=False))
    print(f"{len(runs)} runs; all {whole} take about {ALL_MINUTES} minutes on two CPUs", flush=True)
    started = time.monotonic()
    results = Results(runs)
    failed: list[str] = []
    left = len(runs)

    def measure(run: Run) -> None:
        nonlocal left
        measured = execute(run)
        results.add(run, measured)
        if not measured:
            failed.append(run.name)
        with _print_lock:
            left -= 1
        say(f"# {time.monotonic() - started:.0f} s, {left} of {len(runs)} runs left")

    run_all([run for run in runs if run.options.icount], Room.here(arguments.cpus), measure)
    # One at a time: the others would be in their time.
    run_all([run for run in runs if not run.options.icount], Room.here(1), measure)
    for name, figure in results.figures().items():
        print(f"{name} {figure}")
    print(f"# {time.monotonic() - started:.0f} s, all of it in {RESULTS.relative_to(REPOSITORY)}")
    if failed:
        print(f"# FAILED: {' '.join(failed)}")
        return 1
    print(f"# {results.report()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # At once, with what runs.
        os._exit(130)
