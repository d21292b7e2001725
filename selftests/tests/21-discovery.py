#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=240
"""What guests are told about the host, as modules come and go."""

import subprocess
from pathlib import Path

from vm import ktap

REPOSITORY = Path("/src/kvm-dlh")
OWN = 1 | 2 | 8 | 16  # rings, CALL, CALLS, TRACE
# FREE_PAGES, FREE_ANY, FREE_ASK
FREE_PAGES = 4 | 32 | 64


def discovery(name: str, *arguments: str) -> None:
    """Runs the subject; its own results are shown indented, as the subtest they are."""
    run = subprocess.run(
        [REPOSITORY / "build/bin/dlh-vmm", "ktap", "discovery", *arguments], stdout=subprocess.PIPE, text=True
    )
    for line in run.stdout.splitlines():
        print(f"    {line}")
    ktap.equal(run.returncode, 0, name)


def module(command: str, name: str) -> None:
    argument = str(REPOSITORY / f"build/modules/{name}.ko") if command == "insmod" else name
    ktap.equal(subprocess.run([command, argument]).returncode, 0, f"{command} {name}")


ktap.plan(11)
discovery("a stock host", "--expect-absent")
module("insmod", "kvm_dlh")
discovery("with kvm_dlh", f"--expect-features={OWN}")
module("insmod", "ksm_bridge")
discovery("with kvm_dlh and ksm_bridge", f"--expect-features={OWN | FREE_PAGES}")
module("rmmod", "ksm_bridge")
discovery("without ksm_bridge again", f"--expect-features={OWN}")
module("rmmod", "kvm_dlh")
discovery("without kvm_dlh again", "--expect-absent")
module("insmod", "kvm_dlh")
discovery("with kvm_dlh once more", f"--expect-features={OWN}")
ktap.done()
