# SPDX-License-Identifier: GPL-2.0
"""L2, the guest: unmodified QEMU on the KVM of the host under test. For use inside L1.

    with Guest(mem="256M", modules=["/src/kvm-dlh/guest/dlh_guest.ko"]) as guest:
        status, output = guest.run("cat /proc/meminfo")
        print(guest.rss_kib(), guest.kvm_stat("exits"))
"""

from __future__ import annotations

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
from typing import Any, Literal, Self

from .agent import Agent, AgentTimeout, Result
from .initramfs import Initramfs, ModuleTree
from .qmp import Qmp

RESULTS = Path("/results")
KVM_DEBUGFS = Path("/sys/kernel/debug/kvm")
# microvm has PCI here because the stock kernel has no built-in driver for virtio without it.
MACHINES = {
    "microvm": "microvm,pcie=on,isa-serial=on,rtc=on,auto-kernel-cmdline=off",
    "q35": "q35",
}


class GuestError(RuntimeError):
    """The guest or its VMM did not do what it should; the message has the end of its console."""


class Guest:
    """A running guest. Made, it is booting; `wait_ready` (which `with` calls) waits for its shell.

    modules: names of stock modules, or paths of .ko files; inserted in this order, each after what it
        depends on. A path may be followed by module arguments: "/path/dlh_guest.ko order=0".
    binaries: static programs to put into /bin; files: other files, by their path in the guest.
    start: shell script the guest runs before it is ready.
    memory_backend: a QEMU object such as "memory-backend-memfd,share=on" in place of anonymous memory.
    console: ttyS0 shows earlier messages than hvc0, and is slower.
    reboot: the guest may reset itself, or be reset; otherwise that ends its VMM. See `wait_reboot`.
    panics: the guest is made to panic: `run` does not look at its console log, the test has to.
    incoming: a file that `save` made of a guest with the same arguments: it is not booted, it goes on.
        "live": nothing runs before `begin_migration` of a guest with the same arguments moves it here.
    """

    _count = 0

    def __init__(
        self,
        *,
        machine: str = "microvm",
        mem: str = "512M",
        smp: int = 1,
        balloon: bool = False,
        free_page_reporting: bool = False,
        modules: Sequence[str | Path] = (),
        binaries: Sequence[str | Path] = (),
        files: Mapping[str, str | Path] | None = None,
        start: str = "",
        append: str = "",
        memory_backend: str = "",
        console: str = "hvc0",
        cpu: str = "host",
        reboot: bool = False,
        panics: bool = False,
        incoming: Path | Literal["live"] | None = None,
        qemu: Sequence[str] = (),
    ) -> None:
        Guest._count += 1
        self.name = f"guest{Guest._count}"
        # The machine scans guest*.log for what must not be there.
        self.console_log = RESULTS / f"{'panics-' if panics else ''}{self.name}.log"
        self.vmm_log = RESULTS / f"vmm-{self.name}.log"
        self._directory = tempfile.TemporaryDirectory(prefix=f"{self.name}-")
        directory = Path(self._directory.name)
        self._started = time.monotonic()
        self._incoming = incoming

        names = [str(module) for module in modules]
        if balloon or free_page_reporting:
            names.insert(0, "virtio_balloon")
        if os.environ.get("VM_ICOUNT"):
            # QEMU 11.1 emulating SVM delivers an interrupt that was injected again, whatever the guest is doing,
            # if it has to leave its loop before the guest exits. With this one exits at once, to end the interrupt.
            # On q35 it is lost now and then all the same: use microvm there.
            cpu = f"{cpu},kvm-pv-eoi=off"
        initrd = directory / "initramfs.cpio"
        write_initramfs(initrd, names, binaries, files or {}, start)

        arguments = [
            "qemu-system-x86_64",
            *("-accel", "kvm", "-cpu", cpu, "-M", MACHINES.get(machine, machine)),
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *(() if reboot else ("-no-reboot",)),
            *(("-incoming", "defer") if incoming else ()),
            *("-smp", str(smp), "-m", mem),
            *("-kernel", f"/kernel/{os.environ['KREL']}/vmlinuz", "-initrd", str(initrd)),
            *("-append", f"console={console} loglevel=7 panic=-1 oops=panic {append}".strip()),
            *("-qmp", f"unix:{directory}/qmp,server=on,wait=off"),
            # max_ports=2: a console and the agent's port
            *("-device", "virtio-serial-pci,max_ports=2"),
            *("-chardev", f"socket,id=agent,path={directory}/agent,server=on,wait=off"),
            *("-chardev", f"file,id=console,path={self.console_log}"),
            *(
                ("-device", "virtconsole,chardev=console,nr=0")
                if console.startswith("hvc")
                else ("-serial", "chardev:console")
            ),
            *("-device", "virtserialport,chardev=agent,nr=1"),
            *qemu,
        ]
        if memory_backend:
            arguments += ["-object", f"{memory_backend},id=ram,size={mem}", "-machine", "memory-backend=ram"]
        if balloon or free_page_reporting:
            reporting = "on" if free_page_reporting else "off"
            arguments += ["-device", f"virtio-balloon-pci,id=balloon,free-page-reporting={reporting}"]
        self.console_log.touch()
        with self.vmm_log.open("wb") as log:
            log.write((shlex.join(arguments) + "\n").encode())
            log.flush()
            self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            # Connected before the guest opens its end: a port without a host reads as ended.
            self.agent = Agent(self._connect(directory / "agent"))
            self._qmp = Qmp(self._connect(directory / "qmp"))
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The VMM's process."""
        return self.process.pid

    def wait_ready(self, timeout: float = 120) -> None:
        """Waits until the guest's shell is there and its start script has succeeded."""
        if self._incoming == "live":
            return
        if self._incoming:
            # Only now: the guest's port was to be connected first.
            self.qmp("migrate-incoming", uri=f"file:{self._incoming}")
            self.wait_migrated(timeout)
            self.boot_seconds = time.monotonic() - self._started
            return
        status = self._with_console(lambda: self.agent.wait_ready(timeout))
        if status:
            _, log = self.run("cat /tmp/start.log")
            raise GuestError(f"{self.name}: its start script ended with {status}:\n{log}")
        self.boot_seconds = time.monotonic() - self._started

    def wait_reboot(self, timeout: float = 120) -> None:
        """Waits until the shell of the guest's next kernel is there; its start script must succeed."""
        if self._with_console(lambda: self.agent.wait_ready(timeout, again=True)):
            raise self._error("its start script failed")

    def save(self, path: Path, timeout: float = 60) -> None:
        """Writes the guest's state to a file. The guest stands still then."""
        self.qmp("migrate", uri=f"file:{path}")
        self.wait_migrated(timeout)

    def begin_migration(self, to: Guest, *capabilities: str, **parameters: int) -> None:
        """Starts moving the running guest to another VMM; `wait_migrated` of both waits for the end."""
        for vmm in (to, self):
            states = [{"capability": name, "state": True} for name in capabilities]
            vmm.qmp("migrate-set-capabilities", capabilities=states)
        self.qmp("migrate-set-parameters", **parameters)
        uri = f"unix:{to._directory.name}/migration"
        to.qmp("migrate-incoming", uri=uri)
        self.qmp("migrate", uri=uri)

    def migration(self) -> str:
        """What QEMU calls the state that a migration is in."""
        return str(self.qmp("query-migrate").get("status", "none"))

    def wait_migrated(self, timeout: float = 60) -> None:
        """Waits until the guest's state has been moved."""
        deadline = time.monotonic() + timeout
        while (info := self.qmp("query-migrate")).get("status") != "completed":
            if info.get("status") == "failed" or time.monotonic() > deadline:
                raise self._error(f"its state does not move: {info}")
            time.sleep(0.05)

    def run(self, command: str, timeout: float = 60) -> Result:
        """Runs shell commands in the guest; returns (status, output)."""
        return self.finish(self.begin(command), timeout)

    def begin(self, command: str) -> int:
        """Starts shell commands in the guest without waiting for them; see `finish`."""
        return self._with_console(lambda: self.agent.send(command))

    def finish(self, number: int, timeout: float = 60) -> Result:
        """Waits for what `begin` started."""
        return self._with_console(lambda: self.agent.receive(number, timeout))

    def check(self, command: str, timeout: float = 60) -> str:
        """Like `run`, but returns the output only, and a failing command is an error."""
        status, output = self.run(command, timeout)
        if status:
            raise GuestError(f"{self.name}: {command!r} ended with {status}: {output}")
        return output

    def console(self) -> str:
        """What the guest's kernel has logged so far."""
        return self.console_log.read_text(errors="replace")

    def wait_console(self, pattern: str, timeout: float = 60) -> re.Match[str]:
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
        (directory,) = KVM_DEBUGFS.glob(f"{self.pid}-*")
        return int((directory / name).read_text())

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Runs a command of QEMU's control socket."""
        return self._qmp.command(command, **arguments)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The data of the events of a name that the VMM has sent so far."""
        self.qmp("query-status")
        return [event.get("data", {}) for event in self._qmp.events if event["event"] == name]

    def hmp(self, line: str) -> None:
        """Runs a line of QEMU's monitor for people; if that says anything, it is an error."""
        if said := self.qmp("human-monitor-command", command_line=line).strip():
            raise self._error(f"the monitor says to {line!r}: {said}")

    def alive(self) -> bool:
        """Whether the VMM still runs."""
        return self.process.poll() is None

    def poweroff(self, timeout: float = 60) -> int:
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

    def _connect(self, path: Path, timeout: float = 30) -> socket.socket:
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
        vmm = self.vmm_log.read_text(errors="replace").splitlines()[1:]
        console = self.console().splitlines()
        return GuestError(
            "\n".join((f"{self.name}: {what} (VMM {state})", *vmm[-10:], "console:", *console[-20:]))
        )


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
