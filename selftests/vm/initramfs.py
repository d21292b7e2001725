# SPDX-License-Identifier: GPL-2.0
"""Initramfs images: a static busybox, some kernel modules, a few files, an init script."""

from __future__ import annotations

import io
import lzma
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

BUSYBOX = Path("/usr/bin/busybox")


class ModuleTree:
    """The modules of one stock kernel, as depmod describes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._paths: dict[str, str] = {}
        self._needs: dict[str, list[str]] = {}
        for line in (root / "modules.dep").read_text().splitlines():
            path, _, needs = line.partition(":")
            name = _module_name(path)
            self._paths[name] = path
            # depmod lists what to load last first
            self._needs[name] = [_module_name(needed) for needed in reversed(needs.split())]
        self._builtin = {
            _module_name(line) for line in (root / "modules.builtin").read_text().splitlines()
        }

    def load_order(self, names: Iterable[str]) -> list[Path]:
        """The files of these modules and of all they need, in the order to insert them."""
        order: dict[str, None] = {}
        for name in (name.replace("-", "_") for name in names):
            if name in self._builtin:
                continue
            if name not in self._needs:
                raise ValueError(f"the kernel has no module {name}")
            for needed in (*self._needs[name], name):
                order.setdefault(needed)
        return [self.root / self._paths[name] for name in order]


def _module_name(path: str) -> str:
    return Path(path).name.split(".ko")[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    """A module, decompressed: busybox inserts no compressed ones."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", path], check=True, capture_output=True).stdout
    return path.read_bytes()


class Initramfs:
    """An image in the kernel's "newc" cpio format, not compressed: emulated CPUs copy faster than
    they decompress."""

    def __init__(self, init: str) -> None:
        self._out = io.BytesIO()
        self._inode = 0
        self._directories: set[str] = set()
        self._modules: dict[str, str] = {}
        for name in ("dev", "proc", "sys", "tmp", "mnt"):
            self._directory(name)
        self.add("bin/busybox", BUSYBOX.read_bytes(), 0o755)
        self._entry("bin/sh", 0o120777, b"busybox")
        self.add("init", init.encode(), 0o755)

    def add(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Adds a file, and the directories above it."""
        name = name.lstrip("/")
        self._directory(os.path.dirname(name))
        self._entry(name, 0o100000 | mode, data)

    def add_module(self, path: Path, arguments: str = "") -> None:
        """Adds a module; init inserts them in the order they were added."""
        name = path.name.split(".ko")[0] + ".ko"
        if name not in self._modules:
            self.add(f"modules/{name}", read_module(path))
            self._modules[name] = arguments

    def write(self, path: Path) -> None:
        """Ends the image and writes it."""
        order = "".join(f"{name} {arguments}\n" for name, arguments in self._modules.items())
        self.add("modules/order", order.encode())
        self._entry("TRAILER!!!", 0, b"")
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(self._out.getvalue())
        partial.rename(path)

    def _directory(self, name: str) -> None:
        if name and name not in self._directories:
            self._directory(os.path.dirname(name))
            self._directories.add(name)
            self._entry(name, 0o040755, b"")

    def _entry(self, name: str, mode: int, data: bytes) -> None:
        self._inode += 1
        links, mtime, check = 1, 0, 0
        numbers = (self._inode, mode, 0, 0, links, mtime, len(data), 0, 0, 0, 0, len(name) + 1, check)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers) + name.encode() + b"\0"
        self._out.write(header + bytes(-len(header) % 4))
        self._out.write(data + bytes(-len(data) % 4))
