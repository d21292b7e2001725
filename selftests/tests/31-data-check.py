#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=4G timeout=900
"""A guest's processes write patterns to fresh memory and verify them while pages are reported and merged.

Nothing may be lost. That the check would find a loss is shown by a guest driver that breaks the rule on
purpose: it gives pages back before the host has finished with them (DESIGN.md rule 1).
"""

import subprocess

from vm import ktap
from vm.driver import Check, check_command, check_result, freed_mib, lawful
from vm.guest import Guest, GuestError
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules
from vm.kernel_log import scan_file
from vm.patience import PATIENCE, wait_until

BINARY = "/src/kvm-dlh/build/bin/dlh-churn"
BUILD = "/src/kvm-dlh/build"
LAPS = 60
# Guests with the driver that breaks the rule, until one of them shows it.
LOSERS = 3
LOSER_LAPS, LOSER_CHECKS = 40, 4
# A guest that has lost its own kernel's data may stand still without a word.
STILL_SECONDS = 180


def check(guest: Guest, laps: int, timeout: float) -> Check:
    return check_result(guest.run(check_command(laps, threads=3, mib=24), timeout=timeout).output)


def lose(guest: Guest) -> tuple[int, str]:
    """Laps, and what shows that data were lost; that may be the guest's kernel's, which then dies of it."""
    laps = 0
    for _ in range(LOSER_CHECKS):
        try:
            more, _, wrong = check(guest, LOSER_LAPS, STILL_SECONDS)
        except GuestError as error:
            ktap.comment(str(error))
            return laps, next((finding.line for finding in scan_file(guest.console_log)), "")
        laps += more
        if wrong:
            return laps, f"{wrong} wrong words"
    return laps, ""


ktap.plan(11)
insert_host_modules()
for order in (9, 0):
    driver = f"{BUILD}/modules/dlh_guest.ko order={order}"
    with Guest(mem="384M", smp=2, modules=[driver], binaries=[BINARY]) as guest:
        dlh, bridge = Dlh(guest.pid), Bridge(guest.pid)
        before, found, freed = bridge.get("merged_pages"), Check(0, 0, 0), freed_mib(guest)

        def enough() -> bool:
            """Until pages have been merged while the memory was in use."""
            global found
            found = Check(*map(sum, zip(found, check(guest, LAPS, PATIENCE), strict=True)))
            return bridge.get("merged_pages") - before > 256

        wait_until(enough, pause=0)
        merged = bridge.get("merged_pages") - before
        ktap.comment(f"order {order}: {found}, {merged // 256} MiB merged meanwhile")
        used = found.laps >= LAPS and merged > 256
        ktap.ok(used, f"order {order}: memory is used and merged at the same time", found, merged)
        # What a process keeps for itself is never free, and nothing is checked then.
        freed = freed_mib(guest) - freed
        ktap.ok(freed >= found.mib, f"order {order}: and given back each time", freed, found)
        ktap.equal(found.wrong, 0, f"order {order}: every word is what was written")
        ktap.ok(lawful(dlh), f"order {order}: no call is lost", dlh.all())

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
# Whatever became of those guests, the host serves others as ever.
command = [f"{BUILD}/bin/dlh-vmm", "ktap", "--only", "anonymous memory is given back", "free_pages"]
works = subprocess.run(command, capture_output=True, text=True, check=False)
ktap.ok(works.returncode == 0, "the host goes on to serve others", works.stdout)
remove_host_modules()
ktap.done()
