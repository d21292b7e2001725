#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=180
"""The host's modules are inserted and removed, say what they do then, and say so clearly when they cannot be.

Parameters behave as those of modules in C: they can be read, the last one counts, what is out of range is named.
"""

import subprocess
from pathlib import Path

from vm import ktap

MODULES = Path("/src/kvm-dlh/build/modules")
# Parameters that root may write later.
CHANGEABLE = {"allow"}
# Of each: the default, all that modinfo says of its range and default, values at the ends, and what is refused with
# which words.
RANGES = {
    "kvm_dlh": {
        "budget_entries": ("512", "(1 to 65536; default 512)", ("1", "65536"), ("0", "65537", "-1", "x", "4294967297")),
        "budget_us": ("50", "(1 to 1000000; default 50)", ("1", "1000000"), ("0", "1000001", "1.5")),
        "max_defer_us": (
            "10000",
            "(100 to 1000000, or 0: for ever; default 10000)",
            ("0", "100", "1000000"),
            ("1", "99", "1000001", "-1"),
        ),
    },
    "ksm_bridge": {
        "worker_cpu_percent": ("100", "(1 to 100; default 100)", ("1", "100"), ("0", "101", "")),
        "merge": ("release", "default release)", ("share", "release"), ("both", "")),
        "allow": ("all", "default all)", ("none", "uid=64055,107,cgroup=/machine.slice;hugetlb"), ("both", "", "uid=")),
    },
    "dlh_guest": {
        "ring_entries": ("256", "(a power of two, 64 to 65536; default 256)", (), ()),
        "order": ("-1", "(0 to 10, or -1: page_reporting.page_reporting_order, or else 9; default -1)", (), ()),
        "batch": ("32", "(1 to 32; default 32)", (), ()),
        "pace_mib": ("0", "(0 to 1048576; default 0)", (), ()),
        "timeout_ms": ("1000", "(1 to 60000; default 1000)", (), ()),
    },
}


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)


def insert(module: str, *arguments: str) -> int:
    folder = MODULES if module in RANGES else MODULES.parent / "test-modules"
    return run("insmod", folder / f"{module}.ko", *arguments).returncode


def remove(module: str) -> int:
    return run("rmmod", module).returncode


def says(module: str) -> list[str]:
    """What a module has said since the last call; neither that it taints the kernel nor the kernel's own refusal."""
    lines = run("dmesg", "-c").stdout.splitlines()
    own = [line.split("] ", 1)[-1] for line in lines if f"{module}: " in line]
    return [line for line in own if "taint" not in line and "invalid for parameter" not in line]


def parameters(module: str) -> dict[str, str]:
    """Those that a loaded module has, as everybody may read them."""
    directory = Path("/sys/module", module, "parameters")
    return {path.name: path.read_text().rstrip("\n") for path in directory.iterdir()}


def modes(module: str) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in Path("/sys/module", module, "parameters").iterdir()}


def check_modinfo(module: str) -> None:
    """1 result."""
    described = run("modinfo", "-F", "parm", MODULES / f"{module}.ko").stdout.splitlines()
    wrong = [name for name, (_, text, *_) in RANGES[module].items() if not any(f"{name}:" in d and text in d for d in described)]
    ktap.ok(len(described) == len(RANGES[module]) and not wrong, f"{module}: modinfo shows ranges and defaults", described)


def check_parameters(module: str) -> None:
    """5 results."""
    insert(module)
    defaults = {name: default for name, (default, *_) in RANGES[module].items()}
    expected = {name: 0o644 if name in CHANGEABLE else 0o444 for name in defaults}
    words = f"{module}: all can be read, and written only where that changes anything"
    ktap.equal((parameters(module), modes(module)), (defaults, expected), words)
    remove(module)
    says(module)
    wrong = []
    for name, (_, _, accepted, _) in RANGES[module].items():
        for value in accepted:
            # The last one counts: a value of modprobe.d and one of the command line.
            first = accepted[0] if value != accepted[0] else accepted[-1]
            status = insert(module, f"{name}={first}", f"{name}={value}")
            seen = parameters(module)[name] if status == 0 else None
            if (status, seen, remove(module)) != (0, value, 0):
                wrong.append((name, first, value, status, seen))
    ktap.equal(wrong, [], f"{module}: of a parameter that is given twice the last counts")
    says(module)
    for name, (_, _, _, refused) in RANGES[module].items():
        for value in refused:
            status, said = insert(module, f"{name}={value}"), says(module)
            # Parameter, value and range.
            if status == 0 or len(said) != 1 or f"{module}: {name}={value} is n" not in said[0]:
                wrong.append((name, value, status, said))
    ktap.equal(wrong, [], f"{module}: what is out of range is refused, with one line that names it")
    name, (_, _, accepted, refused) = next(iter(RANGES[module].items()))
    status = insert(module, f"{name}={refused[0]}", f"{name}={accepted[0]}")
    ktap.ok(status != 0, f"{module}: it is refused even where a good value follows")
    ktap.ok(not Path("/sys/module", module).exists(), f"{module}: and nothing is loaded")


def check_words(module: str, words: str) -> None:
    """1 result."""
    says(module)
    insert(module)
    said = says(module)
    version = Path("/sys/module", module, "version").read_text().rstrip()
    described = run("modinfo", "-F", "version", MODULES / f"{module}.ko").stdout.rstrip()
    right = len(said) == 1 and f"{module}: version {version}: " in said[0] and words in said[0]
    ktap.ok(right and version == described, f"{module}: one line says that it is there, with its version and what is on", *said)


ktap.plan(3 + 3 + 2 + 1 + 2 * 5)
for lap in range(3):
    ktap.equal((insert("kvm_dlh"), remove("kvm_dlh")), (0, 0), f"inserted and removed, lap {lap}")
check_words("kvm_dlh", "a drain has 512 entries or 50 us; an entry waits 10000 us at most")
check_words("ksm_bridge", "allow=all, merge=release, worker_cpu_percent=100")
remove("ksm_bridge")
insert("odd_operation", "number=1")
says("ksm_bridge")
refused_status, reasons = insert("ksm_bridge"), says("ksm_bridge")
taken = reasons == ["ksm_bridge: cannot start, another module takes FREE_PAGES"]
ktap.ok(refused_status != 0 and taken, "ksm_bridge: one line says why it cannot be", *reasons)
remove("odd_operation")
remove("kvm_dlh")
for every in RANGES:
    check_modinfo(every)
check_parameters("kvm_dlh")
insert("kvm_dlh")
check_parameters("ksm_bridge")
remove("kvm_dlh")
ktap.done()
