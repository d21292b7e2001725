#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=4G timeout=900
"""A guest's processes write patterns to fresh memory and verify them while pages are reported and merged.

Nothing may be lost. That the check would find a loss is shown by a guest driver that breaks the rule on
purpose: it gives pages back before the host has finished with them (DESIGN.md rule 1).
"""

from vm import ktap
from vm.guest import Guest, GuestError
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules
from vm.kernel_log import scan_file

BINARY = "/src/kvm-dlh/build/bin/dlh-churn"
BUILD = "/src/kvm-dlh/build"
CHECK = "dlh-churn check --seconds {seconds} --threads 3 --mib 24"
# Guests with the driver that breaks the rule, until one of them shows it.
LOSERS = 3


def check(guest: Guest, seconds: int) -> tuple[int, int, int]:
    """Laps, MiB and wrong words."""
    _, output = guest.run(CHECK.format(seconds=seconds), timeout=seconds + 120)
    words = output.split()
    if words[0:1] != ["laps"]:
        raise RuntimeError(f"dlh-churn said {output!r}")
    return int(words[1]), int(words[3]), int(words[5])


def lose(guest: Guest) -> tuple[int, str]:
    """Laps, and what shows that data were lost; that may be the guest's kernel's, which then dies of it."""
    laps = 0
    for _ in range(4):
        try:
            more, _, wrong = check(guest, 20)
        except GuestError as error:
            ktap.comment(str(error))
            return laps, next((finding.line for finding in scan_file(guest.console_log)), "")
        laps += more
        if wrong:
            return laps, f"{wrong} wrong words"
    return laps, ""


ktap.plan(9)
insert_host_modules()
for order in (9, 0):
    driver = f"{BUILD}/modules/dlh_guest.ko order={order}"
    with Guest(mem="384M", smp=2, modules=[driver], binaries=[BINARY]) as guest:
        dlh, bridge = Dlh(guest.pid), Bridge(guest.pid)
        merged = bridge.get("merged_pages")
        laps, mib, wrong = check(guest, 30)
        merged = bridge.get("merged_pages") - merged
        ktap.comment(f"order {order}: {laps} laps, {mib} MiB, {merged // 256} MiB merged meanwhile, {wrong} wrong")
        ktap.ok(laps > 20 and merged > 256, f"order {order}: memory is used and merged at the same time", laps, merged)
        ktap.equal(wrong, 0, f"order {order}: every word is what was written")
        ktap.ok(dlh.check_law(), f"order {order}: no call is lost", dlh.all())

driver = f"{BUILD}/modules-report_early/dlh_guest.ko order=0"
says, laps, shown = True, 0, ""
# A guest whose kernel stands still without a word shows nothing: then another one has to.
for _ in range(LOSERS):
    with Guest(mem="384M", smp=2, modules=[driver], binaries=[BINARY], panics=True) as guest:
        says = says and "TEST BUILD" in guest.check("dmesg")
        more, shown = lose(guest)
        laps += more
    if shown:
        break
ktap.ok(says, "the driver that breaks the rule says so")
ktap.comment(f"rule 1 broken: {laps} laps, {shown or 'nothing wrong'}")
ktap.ok(shown, "and the check finds what it loses", laps)
ktap.ok(True, "the host goes on")
remove_host_modules()
ktap.done()
