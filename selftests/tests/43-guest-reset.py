#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=4G timeout=600
"""A guest's kernel ends while its rings are active, and another one comes after it in the same VM.

It goes on with another kernel in an orderly way (kexec), is reset from outside, panics, and goes on with a
crash kernel. Before the next kernel has a driver the host executes nothing, whatever comes to lie where the rings
were; its processes find every word they wrote; then its driver gets rings, and reporting works.
"""

import os
import re
import tempfile
from pathlib import Path

from vm import ktap
from vm.driver import (
    CHURN,
    DRIVER,
    EAGER,
    check_command,
    check_data,
    forgotten,
    host_rings,
    lawful,
    wait_above,
    wait_more,
)
from vm.guest import Guest, write_initramfs
from vm.host import Dlh, insert_host_modules, remove_host_modules
from vm.kernel_log import scan

KERNEL = Path(f"/kernel/{os.environ['KREL']}/vmlinuz")
KEXEC = CHURN.with_name("dlh-kexec")
INSERT = "insmod /dlh_guest.ko order=0 timeout_ms=300"
PANIC = "sysrq: Trigger a crash"


def report_busily(guest: Guest, dlh: Dlh) -> None:
    """Leaves the guest in the middle of taking, giving back and reporting pages."""
    executed = dlh.get("executed")
    guest.check(f"{check_command(1, mib=24, until="/never")} > /dev/null &")
    if not wait_above(dlh, "executed", executed + 50):
        raise RuntimeError("the guest does not report")


def successor(guest: Guest, dlh: Dlh, what: str) -> None:
    """The kernel after has no driver yet, and gets one: 5 results."""
    executed, rings = dlh.get("executed"), host_rings(guest)
    available = int(guest.check("awk '/^MemAvailable/ { print $2 }' /proc/meminfo")) >> 10
    guest.check(f"dlh-churn fill --mib {available - 48}")
    found = check_data(guest)
    ktap.comment(f"{what}: the host had {rings}, now {host_rings(guest)}, {dlh.get('rings_broken')} broke")
    ktap.comment(f"{what}: {available - 48} MiB used; {found}")
    ktap.ok(found.laps > 0 and found.wrong == 0, f"{what}: memory keeps what is written, without a driver", found)
    ktap.equal(dlh.get("executed"), executed, f"{what}: and the host executes nothing that nobody asked for")
    set_up = dlh.get("rings_set_up")
    guest.check(INSERT)
    rings, cpus = host_rings(guest), int(guest.check("nproc"))
    ktap.ok(
        all(rings[cpu].active for cpu in range(cpus)) and dlh.get("rings_set_up") == set_up + cpus,
        f"{what}: the driver gets new rings",
        rings,
        dlh.all(),
    )
    found = check_data(guest)
    seen, _ = wait_more(guest, "ranges", 0)
    ktap.ok(
        found.laps > 0 and found.wrong == 0 and seen["ranges"] > 0 and seen["failed"] <= seen["declined"] and seen["lost"] == 0,
        f"{what}: pages are reported, memory keeps what is written",
        found,
        seen,
    )
    ktap.comment(f"{what}: {found}, {seen['ranges']} ranges reported, {seen['kicks']} kicks")
    ktap.ok(lawful(dlh), f"{what}: submitted = executed + declined + dropped", dlh.all())


def load(guest: Guest, append: str, *arguments: str) -> None:
    """Loads the next kernel, with the same command line and a bit more."""
    append = guest.check("cat /proc/cmdline").strip() + " " + append
    guest.check(
        f"dlh-kexec load --kernel /vmlinuz --initrd /next.cpio --append '{append}' {' '.join(arguments)}",
    )


def without_panics(log: str) -> tuple[int, str]:
    """How often the kernels of a log panicked because they were told to, and the log without that."""
    kept, panics, told = [], 0, 0.0
    for line in log.splitlines():
        stamp = re.match(r"\[\s*(\d+\.\d+)\]", line)
        if PANIC in line and stamp:
            panics, told = panics + 1, float(stamp[1])
        elif stamp and float(stamp[1]) < told:
            # The next kernel counts from 0.
            told = 0
        if not told:
            kept.append(line)
    return panics, "\n".join(kept)


ktap.plan(4 * 5 + 8)
insert_host_modules()
directory = Path(tempfile.mkdtemp())
FILES = {"dlh_guest.ko": DRIVER}
write_initramfs(directory / "next.cpio", (), (CHURN,), FILES, EAGER["start"])
FILES |= {"vmlinuz": KERNEL, "next.cpio": directory / "next.cpio"}
with Guest(
    smp=2,
    mem="768M",
    files=FILES,
    binaries=[CHURN, KEXEC],
    # A boot with two emulated CPUs can stand still for long on a busy machine; there is no driver yet then.
    append=f"crashkernel=224M rcupdate.rcu_cpu_stall_suppress_at_boot=1 {EAGER['append']}",
    start=EAGER["start"],
    reboot=True,
    panics=True,
) as guest:
    dlh = Dlh(guest.pid)
    vmm = guest.pid
    guest.check(INSERT)
    report_busily(guest, dlh)
    load(guest, "kexeced")
    guest.begin("dlh-kexec exec")
    guest.wait_reboot()
    ktap.ok("kexeced" in guest.check("cat /proc/cmdline"), "kexec: another kernel is there")
    ktap.equal(host_rings(guest), {}, "kexec: an orderly end takes the rings away")
    successor(guest, dlh, "kexec")

    report_busily(guest, dlh)
    guest.qmp("system_reset")
    guest.wait_reboot()
    ktap.ok("kexeced" not in guest.check("cat /proc/cmdline"), "reset: the first kernel is there again")
    successor(guest, dlh, "reset")

    report_busily(guest, dlh)
    guest.begin("echo c > /proc/sysrq-trigger")
    guest.wait_reboot()
    successor(guest, dlh, "panic")

    report_busily(guest, dlh)
    # The crash kernel has one CPU only, the first.
    load(guest, "crashed nr_cpus=1", "--panic")
    guest.begin("taskset 1 sh -c 'echo c > /proc/sysrq-trigger'")
    guest.wait_reboot()
    ktap.ok("crashed" in guest.check("cat /proc/cmdline"), "crash kernel: it is there")
    size = guest.check("awk '/^MemTotal/ { print $2 }' /proc/meminfo")
    ktap.ok(int(size) < 224 << 10, "crash kernel: it lives in the memory set aside", size)
    successor(guest, dlh, "crash kernel")

    ktap.ok(guest.alive() and guest.pid == vmm, "all in one VM")
    panics, log = without_panics(guest.console())
    ktap.equal((panics, scan(log)), (2, []), "the guest's log is clean, but for the panics it was told to have")
    guest.kill()
ktap.ok(forgotten(vmm), "nothing of the VM is left")
remove_host_modules()
ktap.done()
