#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=3G timeout=300
"""A guest hibernates in the middle of a data check, and is resumed in another VMM.

Its memory is written to its disk by itself, and comes back in a VM that has never heard of its rings. The resumed
guest says what it finds on its console: its line to the test does not outlive its device.
"""

import re
from pathlib import Path
from typing import Any

from vm import ktap
from vm.driver import CHURN, DRIVER, EAGER, check_result, host_rings, lawful, wait_above, wait_until
from vm.guest import Guest
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules

SWAP = Path("/tmp/swap")
# A data check is going on when the guest is frozen, and ends after it is resumed. All is said on the console.
SCRIPT = """
(until test -e /tmp/stop; do dlh-churn check --laps 10 --threads 2 --mib 16 || break; done) > /tmp/check 2>&1 &
check=$!
until test -e /tmp/go; do sleep 0.1; done
echo reboot > /sys/power/disk
echo disk > /sys/power/state || echo hibernation: failed > /dev/kmsg
kill -0 $check && echo hibernation: resumed > /dev/kmsg
touch /tmp/stop
wait $check
echo "hibernation: check $(tail -n 1 /tmp/check)" > /dev/kmsg
while true; do
	dlh-churn fill --mib 16
	echo "hibernation: stats" $(grep -E '^(lost|setups|ranges|failed) ' /sys/kernel/debug/dlh_guest/stats) > /dev/kmsg
	sleep 1
done
"""


def arguments(resume: bool) -> dict[str, Any]:
    # The kernel that resumes has no driver, and gets no further than this.
    start = "echo $(cat /sys/block/vda/dev) > /sys/power/resume; exit 1" if resume else EAGER["start"]
    return {
        "mem": "256M",
        "modules": ["virtio_blk"] if resume else ["virtio_blk", f"{DRIVER} order=0 timeout_ms=300"],
        "binaries": [CHURN],
        "append": f"{EAGER['append']} hibernate=nocompress no_console_suspend",
        "start": start,
        "qemu": [
            *("-drive", f"if=none,id=swap,format=raw,file={SWAP}"),
            *("-device", "virtio-blk-pci,drive=swap"),
        ],
    }


def console(guest: Guest) -> str:
    """What is on its console; nothing while the VMM is writing there, which a shared folder may tell of as an error."""
    try:
        return guest.console()
    except OSError:
        return ""


def counters(guest: Guest) -> dict[str, int]:
    """What the driver last said of itself on the console."""
    found = re.findall(r"hibernation: stats (.*)", console(guest))
    words = found[-1].split() if found else []
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}


ktap.plan(7)
with SWAP.open("wb") as file:
    file.truncate(256 << 20)
insert_host_modules()
with Guest(**arguments(resume=False)) as guest:
    dlh = Dlh(guest.pid)
    guest.check("mkswap /dev/vda && swapon /dev/vda")
    before = dict(line.split() for line in guest.check("cat /sys/kernel/debug/dlh_guest/stats").splitlines())
    guest.check(f"cat > /tmp/script <<'END'\n{SCRIPT}\nEND\nsh /tmp/script > /dev/null 2>&1 &")
    ktap.ok(wait_above(dlh, "executed", 0), "the guest reports in the middle of a data check")
    guest.check("touch /tmp/go")
    ended = wait_until(lambda: not guest.alive())
    ktap.ok(ended and "hibernation: failed" not in console(guest), "it hibernates", console(guest)[-1500:])

other = Guest(**arguments(resume=True))
try:
    resumed = wait_until(lambda: "hibernation: resumed" in console(other) or not other.alive())
    ktap.ok(resumed and other.alive(), "another VMM resumes it", console(other)[-1500:])
    said = r"hibernation: check (laps \d+ mib \d+ mismatches \d+)"
    wait_until(lambda: re.search(said, console(other)))
    match = re.search(said, console(other))
    found = check_result(f"{match[1]}\n") if match else None
    ktap.ok(found and found.laps > 0 and found.wrong == 0, "the data check of before finds every word", found)
    dlh, bridge = Dlh(other.pid), Bridge(other.pid)
    served = wait_above(bridge, "merged_pages", 4096)
    active = [ring.active for ring in host_rings(other).values()]
    ktap.ok(served and active == [True], "its new host has a ring of it, and gets pages", bridge.all(), active)
    wait_until(lambda: counters(other).get("setups", 0) > int(before["setups"]))
    seen = counters(other)
    ktap.ok(seen.get("setups", 0) > int(before["setups"]), "its driver has set it up anew", before, seen)
    ktap.ok(lawful(dlh), "no call is lost", dlh.all())
    ktap.comment(f"{found}, {seen}, {dlh.all()}")
finally:
    other.kill()
remove_host_modules()
ktap.done()
