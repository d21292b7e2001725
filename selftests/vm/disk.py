# SPDX-License-Identifier: GPL-2.0
"""Makes a file system on a block device, FAT16: the root has no mkfs. For use inside L1.

python3 -m vm.disk /dev/ram0
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

_SECTOR = 512
_RESERVED, _FATS, _ROOT_ENTRIES, _CLUSTER = 1, 2, 512, 4
# With clusters of four sectors FAT16 has 4,085 to 65,524 of them.
_SECTORS = range(4085 * _CLUSTER + 1024, 65524 * _CLUSTER)


def make_fat16(device: Path) -> None:
    """Writes what an empty file system is made of; the device must have 9 to 128 MiB."""
    with device.open("r+b") as disk:
        sectors = disk.seek(0, os.SEEK_END) // _SECTOR
        if sectors not in _SECTORS:
            raise ValueError(f"{device} has {sectors} sectors")
        table = (sectors // _CLUSTER + 2) * 2 // _SECTOR + 1
        boot = struct.pack(
            "<3s8sHBHBHHBHHHIIBBBI11s8s",
            *(b"\xeb\x3c\x90", b"kvm-dlh ", _SECTOR, _CLUSTER, _RESERVED, _FATS, _ROOT_ENTRIES),
            *(0, 0xF8, table, 32, 2, 0, sectors, 0x80, 0, 0x29, 1, b"DLH        ", b"FAT16   "),
        )
        disk.seek(0)
        disk.write(boot.ljust(_SECTOR - 2, b"\0") + b"\x55\xaa")
        for _ in range(_FATS):
            disk.write(b"\xf8\xff\xff\xff".ljust(table * _SECTOR, b"\0"))
        disk.write(bytes(_ROOT_ENTRIES * 32))


if __name__ == "__main__":
    make_fat16(Path(sys.argv[1]))
