# SPDX-License-Identifier: GPL-2.0
"""A guest that runs: what does not depend on its VMM. For use inside L1."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .agent import Agent, AgentTimeout, Result
from .find import directory
from .initramfs import Initramfs, ModuleTree
from .patience import PATIENCE, wait_until

RESULTS = Path("/results")


class GuestError(RuntimeError):
    """The guest or its VMM did not do what it should; the message has the end of its console."""


class Running:
    """A guest with a line to its shell, and its VMM; `with` waits until the shell is there.

    panics: the guest is made to panic: `run` does not look at its console log, the test has to.
    """

    _count = 0
    agent: Agent

    def __init__(self, panics: bool = False) -> None:
        Running._count += 1
        self.name = f"guest{Running._count}"
        # The machine scans guest*.log for what must not be there.
        self.console_log = RESULTS / f"{'panics-' if panics else ''}{self.name}.log"
        self.vmm_log = RESULTS / f"vmm-{self.name}.log"
        self._directory = tempfile.TemporaryDirectory(prefix=f"{self.name}-")
        self._started = time.monotonic()

    def _start(self, arguments: Sequence[str | Path]) -> None:
        """Starts the VMM."""
        self.console_log.touch()
        with self.vmm_log.open("wb") as log:
            log.write((shlex.join(map(str, arguments)) + "\n").encode())
            log.flush()
            self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        """The VMM's process."""
        return self.process.pid

    def wait_ready(self, timeout: float = PATIENCE) -> None:
        """Waits until the guest's shell is there and its start script has succeeded."""
        status = self._with_console(lambda: self.agent.wait_ready(timeout))
        if status:
            _, log = self.run("cat /tmp/start.log")
            raise GuestError(f"{self.name}: its start script ended with {status}:\n{log}")
        self.boot_seconds = time.monotonic() - self._started

    def run(self, command: str, timeout: float = PATIENCE) -> Result:
        """Runs shell commands in the guest; returns (status, output)."""
        return self.finish(self.begin(command), timeout)

    def begin(self, command: str) -> int:
        """Starts shell commands in the guest without waiting for them; see `finish`."""
        return self._with_console(lambda: self.agent.send(command))

    def finish(self, number: int, timeout: float = PATIENCE) -> Result:
        """Waits for what `begin` started."""
        return self._with_console(lambda: self.agent.receive(number, timeout))

    def check(self, command: str, timeout: float = PATIENCE) -> str:
        """Like `run`, but returns the output only, and a failing command is an error."""
        status, output = self.run(command, timeout)
        if status:
            raise GuestError(f"{self.name}: {command!r} ended with {status}: {output}")
        return output

    def console(self) -> str:
        """What the guest's kernel has logged so far."""
        return read_log(self.console_log)

    def wait_console(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Waits for a line on the console."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, self.console(), re.MULTILINE)):
            if time.monotonic() > deadline:
                raise self._error(f"no {pattern!r} on its console in {timeout:.0f} s")
            time.sleep(0.1)
        return match

    def status_kib(self, field: str) -> int:
        """A field such as VmRSS, RssAnon or RssShmem of the VMM's /proc/<pid>/status."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
        if not match:
            raise KeyError(field)
        return int(match[1])

    def rss_kib(self) -> int:
        """The VMM's resident memory: the guest's footprint on the host."""
        return self.status_kib("VmRSS")

    def kvm_stat(self, name: str) -> int:
        """A counter of KVM for this VM (sum over its vCPUs), such as exits, hypercalls, halt_exits."""
        path = directory("kvm", self.pid)
        if not path:
            raise self._error("KVM does not know its VM")
        return int((path / name).read_text())

    def alive(self) -> bool:
        """Whether the VMM still runs."""
        return self.process.poll() is None

    def poweroff(self, timeout: float = PATIENCE) -> int:
        """Asks the guest to power off; returns the VMM's exit status."""
        self.begin("poweroff -f")
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._error(f"still running {timeout:.0f} s after poweroff") from None

    def kill(self) -> None:
        """Ends the VMM at once."""
        if self.alive():
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _connect(self, path: Path, timeout: float = PATIENCE) -> socket.socket:
        deadline = time.monotonic() + timeout
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(str(path))
                return connection
            except OSError:
                if not self.alive() or time.monotonic() > deadline:
                    raise self._error("its VMM did not start") from None
                time.sleep(0.02)

    def _with_console[T](self, action: Callable[[], T]) -> T:
        try:
            return action()
        except (AgentTimeout, OSError, RuntimeError) as error:
            raise self._error(str(error)) from error

    def _error(self, what: str) -> GuestError:
        state = "running" if self.alive() else f"ended with {self.process.poll()}"
        vmm = read_log(self.vmm_log).splitlines()[1:]
        console = self.console().splitlines()
        return GuestError(
            "\n".join((f"{self.name}: {what} (VMM {state})", *vmm[-10:], "console:", *console[-20:]))
        )


def read_log(path: Path) -> str:
    """A file in /results that a VMM may be writing to: there reading fails now and then, if it grows meanwhile."""
    text: list[str] = []

    def read() -> bool:
        try:
            text.append(path.read_text(errors="replace"))
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
        return bool(text)

    if not wait_until(read, pause=0.02):
        raise OSError(errno.ENODATA, f"{path} cannot be read")
    return text[0]


def write_initramfs(
    target: Path,
    modules: Sequence[str],
    binaries: Sequence[str | Path],
    files: Mapping[str, str | Path],
    start: str = "",
) -> None:
    """Writes the image that a guest with these arguments boots from."""
    image = Initramfs(Path(__file__).with_name("l2-init").read_text())
    tree = ModuleTree(Path("/usr/lib/modules") / os.environ["KREL"])
    for module in modules:
        name, *arguments = module.split()
        if name.endswith(".ko"):
            image.add_module(Path(name), " ".join(arguments))
        else:
            for path in tree.load_order([name]):
                own = path.name.split(".ko")[0].replace("-", "_") == name.replace("-", "_")
                image.add_module(path, " ".join(arguments) if own else "")
    for binary in map(Path, binaries):
        image.add(f"bin/{binary.name}", binary.read_bytes(), 0o755)
    for where, source in files.items():
        path = Path(source)
        image.add(where, path.read_bytes(), path.stat().st_mode & 0o777)
    if start:
        image.add("start", start.encode())
    image.write(target)
