# SPDX-License-Identifier: GPL-2.0
"""A guest of cloud-hypervisor. For use inside L1, where the binary has been put by whoever has one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .agent import Agent
from .find import directories
from .patience import SLOW, wait_until
from .running import Running, write_initramfs


class CloudHypervisor(Running):
    """As `vm.guest.Guest`, as far as it goes. The line to its shell is a serial port: it has no virtio port for it.

    memory: what follows --memory.
    """

    def __init__(
        self,
        binary: Path,
        *,
        memory: str,
        modules: Sequence[str | Path] = (),
        binaries: Sequence[str | Path] = (),
        start: str = "",
        append: str = "",
    ) -> None:
        super().__init__()
        directory = Path(self._directory.name)
        initramfs = directory / "initramfs.cpio"
        write_initramfs(initramfs, [str(module) for module in modules], binaries, {}, start)
        self._start(
            [
                binary,
                *("--kernel", f"/kernel/{os.environ['KREL']}/vmlinuz", "--initramfs", initramfs),
                *("--cmdline", f"console=hvc0 loglevel=7 panic=-1 oops=panic agent=ttyS0 {SLOW} {append}".strip()),
                *("--cpus", "boot=1", "--memory", memory),
                *("--console", f"file={self.console_log}", "--serial", f"socket={directory}/agent"),
            ]
        )
        try:
            self.agent = Agent(self._connect(directory / "agent"))
            # A thread of the VMM makes the VM when that is there.
            wait_until(lambda: not self.alive() or directories("kvm", self.pid))
        except BaseException:
            self.kill()
            raise
