# SPDX-License-Identifier: GPL-2.0
"""Boots L1 for one command: what tools/l1 runs."""

from __future__ import annotations

import argparse
import shlex
import sys

from .machine import REPOSITORY, Machine, Options


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/l1",
        description="Runs a command in the host under test, as root, in the repository, which is all that is seen "
        "there of this machine. Give its own options after --. Logs are in build/results/l1, of which share/ is "
        "/results inside.",
    )
    parser.add_argument("--smp", type=int, help=f"CPUs ({Options.smp}; 1 with --icount)")
    parser.add_argument("--mem", default=Options.mem, help=f"its memory ({Options.mem})")
    parser.add_argument("--icount", action="store_true", help="count instructions as time")
    parser.add_argument("--timeout", type=float, default=Options.timeout, metavar="SECONDS", help=f"({Options.timeout:.0f})")
    parser.add_argument("--one-thread", action="store_true", help="emulate all CPUs in one thread")
    parser.add_argument("--suspend", action="store_true", help="devices that outlive being suspended")
    parser.add_argument("--append", default="", help="more kernel command line")
    parser.add_argument("--qemu", default="", help="more QEMU arguments")
    parser.add_argument("--results", default="l1", metavar="NAME", help="logs go to build/results/NAME")
    parser.add_argument("command", nargs="+", help="command; a single argument is a shell script")
    arguments = parser.parse_args()
    options = Options(
        smp=arguments.smp or (1 if arguments.icount else Options.smp),
        mem=arguments.mem,
        icount=arguments.icount,
        timeout=arguments.timeout,
        one_thread=arguments.one_thread,
        suspend=arguments.suspend,
        append=arguments.append,
        qemu=tuple(shlex.split(arguments.qemu)),
    )
    command = arguments.command
    script = command[0] if len(command) == 1 else shlex.join(command)
    machine = Machine(REPOSITORY / "build/results" / arguments.results, options)
    outcome = machine.run(script, lambda line: print(line, flush=True))
    for path, findings in outcome.findings.items():
        print(f"l1: in {path.relative_to(REPOSITORY)}:", *findings, sep="\n", file=sys.stderr)
    if outcome.problem:
        print(f"{machine.log_tails()}\nl1: {outcome.problem}", file=sys.stderr)
    status = "no exit status" if outcome.status is None else f"exit status {outcome.status}"
    print(f"l1: {outcome.seconds:.1f} s, {status}", file=sys.stderr)
    if outcome.status == 0 and not outcome.good():
        return 1
    return 1 if outcome.status is None else outcome.status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
