# SPDX-License-Identifier: GPL-2.0
"""Where the instructions of a case go: QEMU logs each that L1 executes, by function. What bench/run --profile runs."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from pathlib import Path

from vm.machine import Machine, Options

# Of the flags that QEMU logs with each instruction: user mode, and inside a guest.
_USER, _GUEST = 0x3, 1 << 21
_LINE = re.compile(rb"^Trace \d+: 0x[0-9a-f]+ \[[0-9a-f]+/([0-9a-f]+/[0-9a-f]+)/", re.MULTILINE)
_SHOWN = 40


class Symbols:
    """A kernel's functions, from its /proc/kallsyms."""

    def __init__(self, kallsyms: str) -> None:
        lines = (line.split() for line in kallsyms.splitlines())
        known = sorted((int(line[0], 16), " ".join(line[2:])) for line in lines if line[1] in "tTwW")
        self._starts = [start for start, _ in known]
        self._names = [name for _, name in known]

    def name(self, address: int) -> str:
        """The function at an address."""
        index = bisect_right(self._starts, address)
        return self._names[index - 1] if index else f"{address:#x}"


class Profiler:
    """Logs instructions of a machine while one of its lines says so: `profile begin`, `profile end`."""

    def __init__(self, results: Path, options: Options, most: int) -> None:
        results.parent.mkdir(parents=True, exist_ok=True)
        # Not in the results: these are made anew for each boot.
        self._monitor, self._log = (results.with_name(f".{results.name}.{what}") for what in ("monitor", "log"))
        for path in (self._monitor, self._log):
            path.unlink(missing_ok=True)
        os.mkfifo(self._log)
        self._counts: Counter[bytes] = Counter()
        self._most = most
        self._reader = threading.Thread(target=self._read, daemon=True)
        qemu = ("-monitor", f"unix:{self._monitor},server=on,wait=off")
        self.machine = Machine(results, replace(options, qemu=qemu))

    def line(self, text: str) -> bool:
        """Takes a line of the machine's output; whether it was for the profiler."""
        if text == "profile begin":
            self._reader.start()
            self._command(f"logfile {self._log}", "one-insn-per-tb on", "log exec,nochain")
            (self.machine.share / "profiling").touch()
        elif text == "profile end":
            self._stop()
        return text.startswith("profile ")

    def report(self) -> str:
        """What was executed, by function, the most first. All of it is left in the results, as `profile`."""
        host, guest = (self.machine.share / name for name in ("kallsyms", "kallsyms.guest"))
        symbols = {"host": Symbols(host.read_text()), "guest": Symbols(guest.read_text() if guest.exists() else "")}
        places: Counter[str] = Counter()
        for place, count in self._counts.items():
            address, flags = (int(part, 16) for part in place.split(b"/"))
            where = "guest" if flags & _GUEST else "host"
            if flags & _USER == _USER:
                places[f"{where}: user mode"] += count
            elif address >> 63:
                places[f"{where}: {symbols[where].name(address)}"] += count
            else:
                places[f"{where}: low addresses"] += count
        total = places.total()
        lines = [f"{count:12,} {100 * count / total:5.1f} %  {name}\n" for name, count in places.most_common()]
        # It knows Rust's names as well.
        shown = subprocess.run(["c++filt"], input="".join(lines), check=True, stdout=subprocess.PIPE, text=True).stdout
        (self.machine.results / "profile").write_text(shown)
        return "\n".join([f"{total:12,} instructions", *shown.splitlines()[:_SHOWN]])

    def _read(self) -> None:
        with self._log.open("rb") as log:
            rest, enough = b"", False
            while chunk := log.read(1 << 20):
                *lines, rest = (rest + chunk).rpartition(b"\n")
                self._counts.update(_LINE.findall(lines[0]))
                if not enough and self._counts.total() > self._most:
                    enough = True
                    # Not from here: QEMU may have to wait until more of its log is read.
                    threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        self._command("log none", "one-insn-per-tb off")

    def _command(self, *commands: str) -> None:
        """Runs commands of QEMU's monitor, and waits until they are done."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self._monitor))
            for command in commands:
                monitor.sendall(f"{command}\n".encode())
            seen = b""
            while seen.count(b"(qemu)") <= len(commands):
                seen += monitor.recv(4096)
