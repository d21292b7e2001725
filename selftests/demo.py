#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""The second half of `make demo`, inside the host under test: one guest, its memory filled and freed."""

import os
import sys
import time
from pathlib import Path

from vm.driver import settle
from vm.guest import Guest
from vm.host import Bridge, Dlh, insert_host_modules
from vm.patience import PATIENCE

FILL_MIB = 320
BINARY = "/src/kvm-dlh/build/bin/dlh-churn"
DRIVER = "/src/kvm-dlh/build/modules/dlh_guest.ko"


def costs(name: str) -> dict[str, float]:
    lines = (Path(os.environ["COSTS"]) / name).read_text().splitlines()
    return {key: float(value) for key, value in (line.split() for line in lines)}


def main() -> int:
    stock, loaded = costs("stock"), costs("loaded")
    insert_host_modules()
    print("     booting an unmodified QEMU with the stock kernel and dlh_guest.ko", flush=True)
    with Guest(mem="512M", modules=[DRIVER], binaries=[BINARY]) as guest:
        dlh, bridge = Dlh(guest.pid), Bridge(guest.pid)

        def show(what: str) -> None:
            print(
                f"     {what:<28} RSS {guest.rss_kib() // 1024:4} MiB   "
                f"deferred calls executed {dlh.get('executed'):5}   merged {bridge.get('merged_pages') // 256:4} MiB",
                flush=True,
            )

        settle(guest)
        before = guest.rss_kib()
        show("booted, all reported")
        number = guest.begin(f"dlh-churn fill --mib {FILL_MIB} < /dev/null & sleep 3; wait")
        guest.finish(number)
        # The process kept its memory until its input ended; the high-water mark is the VMM's own.
        full = guest.status_kib("VmHWM")
        show("filled and freed")
        calls, exits = dlh.get("executed"), guest.kvm_stat("hypercalls")
        start = time.monotonic()
        while time.monotonic() - start < PATIENCE and guest.rss_kib() > before * 1.1:
            time.sleep(1)
            show(f"{time.monotonic() - start:4.0f} s after freeing")
        after, seconds = guest.rss_kib(), time.monotonic() - start
        calls, exits = dlh.get("executed") - calls, guest.kvm_stat("hypercalls") - exits

    rows = [
        ("deferred calls executed (to free the memory)", f"{calls}"),
        ("VM exits they caused (KVM's counter of hypercalls)", f"{exits}"),
        ("instructions, stock hypercall", f"{stock['hypercall']:.0f}"),
        ("instructions, deferred call, guest and host, 32 an exit", f"{loaded['deferred_total_b32']:.0f}"),
        ("instructions, deferred call, guest alone", f"{loaded['deferred_guest_b32']:.0f}"),
        ("guest's footprint before (RSS)", f"{before // 1024} MiB"),
        (f"guest's footprint full ({FILL_MIB} MiB filled)", f"{full // 1024} MiB"),
        ("guest's footprint after the free pages were merged", f"{after // 1024} MiB"),
        ("seconds from freeing to there", f"{seconds:.0f}"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"  {name:<{width}}  {value:>9}" for name, value in rows), flush=True)
    good = calls > 0 and exits == 0 and after <= before * 1.1 and full > before + FILL_MIB * 900
    print("\n  All as promised." if good else "\n  NOT as promised: see the table.", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
