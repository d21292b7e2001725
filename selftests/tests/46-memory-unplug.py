#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=4G timeout=600
"""A guest's memory goes away below its ring, below what it reports, and with its whole VMM.

The ring lies in memory of virtio-mem, which first shrinks around it, and then goes and comes back in a
reset. A DIMM is unplugged while its pages are reported. The VMM is killed in the middle of reports.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from vm import ktap
from vm.driver import (
    CHURN,
    DRIVER,
    EAGER,
    begin_load,
    check_data,
    forgotten,
    end_load,
    host_rings,
    lawful,
    stats,
    use_memory,
    wait_above,
    wait_more,
    wait_until,
)
from vm.guest import Guest
from vm.host import Bridge, Dlh, all_workers, insert_host_modules, remove_host_modules

MIB = 1 << 20
# QEMU puts memory that can be plugged above 4 GiB; the kernel takes memory for itself from there first.
PLUGGABLE = 4 << 30
INSERT = "insmod /dlh_guest.ko order=0 timeout_ms=300"
KILLS = 10


def total_mib(guest: Guest) -> int:
    return int(guest.check("awk '/^MemTotal/ { print $2 }' /proc/meminfo")) >> 10


def virtio_mem_mib(guest: Guest) -> int:
    (device,) = guest.qmp("query-memory-devices")
    return int(device["data"]["size"]) // MIB


def wait_total(guest: Guest, mib: int) -> bool:
    return wait_until(lambda: total_mib(guest) > mib)


def dimms(guest: Guest) -> int:
    return sum(device["type"] == "dimm" for device in guest.qmp("query-memory-devices"))


def virtio_mem(guest: Guest, dlh: Dlh) -> None:
    """The ring is in memory that shrinks, and that goes: 10 results."""
    ktap.ok(wait_total(guest, 380), "virtio-mem gives the guest memory", total_mib(guest))
    guest.check(INSERT)
    rings = host_rings(guest)
    ktap.ok([r.gpa >= PLUGGABLE for r in rings.values()] == [True], "the ring is in it", rings)
    use_memory(guest)

    guest.qmp("qom-set", path="/machine/peripheral/vmem", property="requested-size", value=0)
    shrunk = wait_until(lambda: virtio_mem_mib(guest) < 128)
    # What the kernel cannot move it keeps.
    ktap.ok(shrunk and virtio_mem_mib(guest) > 0, "it shrinks around the ring", virtio_mem_mib(guest))
    ktap.comment(f"256 MiB, then {virtio_mem_mib(guest)} MiB with the ring")
    seen, _ = wait_more(guest, "ranges", stats(guest)["ranges"])
    ktap.ok(all(r.active for r in host_rings(guest).values()) and seen["lost"] == 0, "it goes on", seen)

    guest.qmp("qom-set", path="/machine/peripheral/vmem", property="requested-size", value=256 * MIB)
    executed = dlh.get("executed")
    guest.check("dlh-churn check --until /never > /dev/null &")
    ktap.ok(wait_above(dlh, "executed", executed), "the guest reports when it is reset")
    guest.qmp("system_reset")
    guest.wait_reboot()
    executed = dlh.get("executed")
    ktap.ok(wait_total(guest, 380), "the memory has gone and come back", total_mib(guest))
    found = check_data(guest)
    ktap.ok(found.laps > 0 and found.wrong == 0, "it keeps what is written", found)
    ktap.equal(dlh.get("executed"), executed, "the host takes nothing in it for a call")
    ktap.comment(f"rings after the reset: {host_rings(guest)}, {dlh.get('rings_broken')} broke")
    guest.check(INSERT)
    seen, _ = wait_more(guest, "ranges", 0)
    rings = host_rings(guest)
    ktap.ok(seen["ranges"] > 0 and all(r.active for r in rings.values()), "the driver gets a ring and reports", rings)
    ktap.ok(lawful(dlh), "no call is lost", dlh.all())


def dimm(guest: Guest, dlh: Dlh) -> None:
    """A DIMM whose pages are reported goes away, twice: 2 * 3 + 3 results."""
    bridge = Bridge(guest.pid)
    guest.check("echo online_movable > /sys/devices/system/memory/auto_online_blocks")
    rings, setups = host_rings(guest), stats(guest)["setups"]
    begin_load(guest)
    for lap in ("first", "second"):
        before = total_mib(guest)
        guest.qmp("object-add", qom_type="memory-backend-ram", id="ram", size=256 * MIB)
        guest.qmp("device_add", driver="pc-dimm", id="dimm", memdev="ram")
        ktap.ok(wait_total(guest, before + 200), f"{lap} DIMM: the guest has more memory")
        # Processes get their memory from there first.
        merged = bridge.get("merged_pages")
        use_memory(guest, 96)
        ktap.ok(wait_above(bridge, "merged_pages", merged + 48 * 256), f"{lap} DIMM: it is reported")
        start = time.monotonic()
        guest.qmp("device_del", id="dimm")
        ktap.ok(wait_until(lambda: not dimms(guest)), f"{lap} DIMM: it can be unplugged while pages are reported")
        ktap.comment(f"unplugged in {time.monotonic() - start:.1f} s")
        guest.qmp("object-del", id="ram")
    found = end_load(guest)
    ktap.ok(found.laps > 0 and found.wrong == 0, "every word is what was written meanwhile", found)
    seen, after = stats(guest), host_rings(guest)
    same = {vcpu: ring.gpa for vcpu, ring in after.items() if ring.active} == {v: r.gpa for v, r in rings.items()}
    ktap.ok(same and (seen["setups"], seen["lost"]) == (setups, 0), "the ring has stayed", after, seen)
    ktap.ok(lawful(dlh), "no call is lost", dlh.all())
    ktap.comment(f"{found}, {seen}")


def kill(directory: Path) -> None:
    """VMMs are killed in the middle of reports: 4 results."""
    arguments: dict[str, Any] = {
        "mem": "256M",
        "modules": [f"{DRIVER} order=0 timeout_ms=50"],
        "binaries": [CHURN],
        **EAGER,
    }
    state = directory / "state"
    with Guest(**arguments) as guest:
        begin_load(guest)
        wait_above(Dlh(guest.pid), "executed", 0)
        guest.save(state)
    busy, right, left = [], [], []
    for _ in range(KILLS):
        with Guest(**arguments, incoming=state) as guest:
            dlh = Dlh(guest.pid)
            wait_above(dlh, "executed", 20)
            pending = 0

            def some(dlh: Dlh = dlh) -> bool:
                nonlocal pending
                pending = dlh.get("pending")
                return pending > 0

            # No pause in between: calls do not stay pending for long.
            wait_until(some, pause=0)
            guest.process.kill()
            seen = dlh.all()
            guest.kill()
            busy.append(pending)
            ended = sum(seen.get(name, 0) for name in ("executed", "declined", "dropped"))
            right.append(ended <= seen.get("submitted", 0))
            left.append((forgotten(guest.pid), wait_until(lambda: not all_workers())))
    ktap.comment(f"killed with {busy} calls pending")
    ktap.ok(sum(n > 0 for n in busy) > KILLS // 2, f"{KILLS} VMMs are killed, most with calls pending", busy)
    ktap.ok(all(right), "no call ended that was not submitted")
    ktap.equal(left, [(True, True)] * KILLS, "nothing of the VMs is left, no thread either")
    with Guest(**arguments, incoming=state) as guest:
        ktap.ok(wait_above(Dlh(guest.pid), "executed", 20), "another one is served as ever")


ktap.plan(10 + 9 + 4 + 1)
insert_host_modules()
with Guest(
    machine="q35",
    mem="256M,slots=2,maxmem=2G",
    modules=["virtio_mem"],
    files={"dlh_guest.ko": DRIVER},
    binaries=[CHURN],
    append=f"{EAGER['append']} memhp_default_state=online_kernel",
    start=EAGER["start"],
    reboot=True,
    qemu=[
        *("-object", "memory-backend-ram,id=vram,size=512M"),
        *("-device", "virtio-mem-pci,id=vmem,memdev=vram,requested-size=256M,dynamic-memslots=on"),
        # Ports in place of memory-mapped registers for the guest's line to the test. QEMU's emulated SVM
        # leaves traces of an exception in EXITINTINFO, and KVM takes the first access to memory-mapped
        # registers after a change of memslots for one in the middle of an exception then.
        *("-global", "virtio-serial-pci.disable-modern=on"),
    ],
) as machine:
    calls = Dlh(machine.pid)
    virtio_mem(machine, calls)
    dimm(machine, calls)
kill(Path(tempfile.mkdtemp()))
remove_host_modules()
ktap.ok(not Path("/sys/module/kvm_dlh").exists(), "the host's modules go")
ktap.done()
