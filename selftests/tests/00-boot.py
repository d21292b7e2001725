#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=4G timeout=240
"""The host under test runs guests: the ground that every other test stands on."""

from pathlib import Path

from vm import ktap
from vm.guest import Guest

ktap.plan(11)
ktap.ok(Path("/dev/kvm").is_char_device(), "the host has /dev/kvm")

for machine in ("microvm", "q35"):
    with Guest(machine=machine, mem="256M", free_page_reporting=True) as guest:
        ktap.comment(f"{machine}: booted in {guest.boot_seconds:.1f} s")
        ktap.equal(guest.run("echo hello; exit 3"), (3, "hello\n"), f"{machine}: the guest runs commands")
        ktap.ok("virtio_balloon" in guest.check("lsmod"), f"{machine}: the guest inserts modules")
        ktap.ok(20_000 < guest.rss_kib() < 400_000, f"{machine}: its footprint can be read", guest.rss_kib())
        before = guest.kvm_stat("exits")
        guest.check("true")
        ktap.ok(guest.kvm_stat("exits") > before, f"{machine}: its exits are counted")
        ktap.equal(guest.poweroff(), 0, f"{machine}: the guest powers off")

ktap.done()
