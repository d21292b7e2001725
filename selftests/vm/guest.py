# SPDX-License-Identifier: GPL-2.0
"""L2, the guest: unmodified QEMU on the KVM of the host under test. For use inside L1.

    with Guest(mem="256M", modules=["/src/kvm-dlh/guest/dlh_guest.ko"]) as guest:
        status, output = guest.run("cat /proc/meminfo")
        print(guest.rss_kib(), guest.kvm_stat("exits"))
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .agent import Agent
from .patience import PATIENCE, SLOW, wait_until
from .qmp import Qmp
from .running import RESULTS as RESULTS
from .running import GuestError as GuestError
from .running import Running
from .running import write_initramfs as write_initramfs

# microvm has PCI here because the stock kernel has no built-in driver for virtio without it.
MACHINES = {
    "microvm": "microvm,pcie=on,isa-serial=on,rtc=on,auto-kernel-cmdline=off",
    "q35": "q35",
}


class Guest(Running):
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
        super().__init__(panics)
        directory = Path(self._directory.name)
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
            *("-append", f"console={console} loglevel=7 panic=-1 oops=panic {SLOW} {append}".strip()),
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
        self._start(arguments)
        try:
            # Connected before the guest opens its end: a port without a host reads as ended.
            self.agent = Agent(self._connect(directory / "agent"))
            self._qmp = Qmp(self._connect(directory / "qmp"))
        except BaseException:
            self.kill()
            raise

    def wait_ready(self, timeout: float = PATIENCE) -> None:
        """Waits until the guest's shell is there and its start script has succeeded."""
        if self._incoming == "live":
            return
        if self._incoming:
            # Only now: the guest's port was to be connected first.
            self.qmp("migrate-incoming", uri=f"file:{self._incoming}")
            self.wait_migrated(timeout)
            self.boot_seconds = time.monotonic() - self._started
            return
        super().wait_ready(timeout)

    def wait_reboot(self, timeout: float = PATIENCE) -> None:
        """Waits until the shell of the guest's next kernel is there; its start script must succeed."""
        if self._with_console(lambda: self.agent.wait_ready(timeout, again=True)):
            raise self._error("its start script failed")

    def save(self, path: Path, timeout: float = PATIENCE) -> None:
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

    def wait_migrated(self, timeout: float = PATIENCE) -> None:
        """Waits until the guest's state has been moved."""
        info: dict[str, Any] = {}

        def over() -> bool:
            info.update(self.qmp("query-migrate"))
            return info.get("status") in ("completed", "failed", "cancelled")

        if not wait_until(over, timeout, pause=0.05) or info["status"] != "completed":
            raise self._error(f"its state does not move: {info}")

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
