#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=3G timeout=300
"""The driver beside others that have to do with free pages: virtio-balloon, and init_on_free.

A balloon that reports nothing inflates and deflates beside it. Who reports free pages is there alone, and
the other one may follow. A kernel that zeroes what is freed expects zeroes where it allocates.
"""

from vm import ktap
from vm.driver import (
    CHURN,
    DRIVER,
    EAGER,
    Check,
    begin_load,
    check_command,
    check_result,
    end_load,
    host_rings,
    lawful,
    stats,
    wait_above,
    wait_until,
)
from vm.guest import Guest
from vm.host import Bridge, Dlh, insert_host_modules, remove_host_modules
from vm.memory import hold, let_go

MIB = 1 << 20
MEM_MIB = 384
SMALL_MIB = 336
LAPS = 2
FILL_MIB = 128


def actual_mib(guest: Guest) -> int:
    """What the balloon leaves to the guest."""
    return int(guest.qmp("query-balloon")["actual"]) // MIB


def balloon(guest: Guest, mib: int) -> bool:
    """Has the balloon leave so much to the guest; whether it does."""
    guest.qmp("balloon", value=mib * MIB)
    return wait_until(lambda: actual_mib(guest) == mib)


def beside(guest: Guest) -> None:
    """A balloon inflates and deflates while pages are reported: 6 results."""
    dlh, bridge = Dlh(guest.pid), Bridge(guest.pid)
    begin_load(guest)
    wait_above(bridge, "merged_pages", 0)
    inflated, deflated, executed = [], [], []
    for _ in range(LAPS):
        calls = dlh.get("executed")
        inflated.append(balloon(guest, SMALL_MIB))
        executed.append(wait_above(dlh, "executed", calls))
        calls = dlh.get("executed")
        deflated.append(balloon(guest, MEM_MIB))
        # What the balloon gives back is free again.
        executed.append(wait_above(dlh, "executed", calls + (MEM_MIB - SMALL_MIB) // 8))
    ktap.ok(all(inflated), f"the balloon takes {MEM_MIB - SMALL_MIB} MiB of a guest that reports, {LAPS} times", inflated)
    ktap.ok(all(deflated), "and gives them back", deflated)
    ktap.ok(all(executed), "pages are reported before and after", executed)
    found = end_load(guest)
    ktap.ok(found.laps > 0 and found.wrong == 0, "every word is what was written meanwhile", found)
    seen = stats(guest)
    ktap.ok(seen["failed"] <= seen["declined"] and seen["lost"] == 0, "no report fails but for what passes", seen)
    ktap.ok(lawful(dlh), "no call is lost", dlh.all())
    ktap.comment(f"{found}; {seen}")


def returns(guest: Guest) -> bool:
    """Whether the host gets back what the guest fills and frees."""
    if not hold(guest, FILL_MIB):
        return False
    full = guest.rss_kib()
    let_go(guest)
    return wait_until(lambda: guest.rss_kib() < full - FILL_MIB * 512)


def instead(guest: Guest) -> None:
    """One of the two reports, and the other stands back: 5 results."""
    dlh = Dlh(guest.pid)
    refused = guest.run("insmod /dlh_guest.ko")
    log = [line for line in guest.check("dmesg").splitlines() if "standing back" in line]
    ktap.ok(refused.status != 0 and log, "beside a balloon that reports the driver stands back", refused, log)
    ktap.equal(host_rings(guest), {}, "and holds no ring")
    # The driver asks the host a question before it stands back, and names no page.
    bridge = Bridge(guest.pid)
    ktap.ok(returns(guest) and not bridge.get("reported_pages"), "the balloon goes on to report", dlh.all(), bridge.all())

    guest.check("rmmod virtio_balloon && insmod /dlh_guest.ko")
    ktap.ok(returns(guest) and wait_above(dlh, "executed", 0), "the driver reports when the balloon has gone", dlh.all())
    guest.run("insmod /modules/virtio_balloon.ko")
    calls, refused = dlh.get("executed"), guest.run("ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio*")
    again = returns(guest) and dlh.get("executed") > calls
    ktap.ok(again and refused.status != 0, "then it is the balloon's driver that is refused its device", refused, dlh.all())


def zeroed(guest: Guest) -> None:
    """A kernel that zeroes what is freed finds zeroes: 4 results."""
    bridge, dlh = Bridge(guest.pid), Dlh(guest.pid)
    ktap.ok("heap free:on" in guest.check("dmesg"), "the guest's kernel zeroes pages when they are freed")
    before = bridge.get("merged_pages")
    check = check_command(4, threads=1, until="/tmp/zeroed")
    command = (
        f"rm -f /tmp/zeroed; {check} > /tmp/check & dlh-churn zeroes --laps 3 --mib 33; "
        "touch /tmp/zeroed; wait; cat /tmp/check"
    )
    zeroes = words = Check(0, 0, 0)

    def enough() -> bool:
        """Until pages have been merged meanwhile."""
        nonlocal zeroes, words
        found = (check_result(line) for line in guest.run(command).output.splitlines(keepends=True))
        zeroes, words = (
            Check(*map(sum, zip(old, new, strict=True))) for old, new in zip((zeroes, words), found, strict=True)
        )
        return bridge.get("merged_pages") - before > 256

    wait_until(enough, pause=0)
    merged = bridge.get("merged_pages") - before
    ktap.comment(f"{merged // 256} MiB merged; zeroes: {zeroes}; words: {words}")
    ktap.ok(zeroes.laps >= 2 and zeroes.wrong == 0 and merged > 256, "fresh memory is zeroes, reported or not", zeroes, merged)
    ktap.ok(words.laps > 3 and words.wrong == 0, "every word is what was written", words)
    ktap.ok(lawful(dlh), "no call is lost", dlh.all())


ktap.plan(6 + 5 + 4)
insert_host_modules()
driver = f"{DRIVER} order=0"
with Guest(mem=f"{MEM_MIB}M", smp=2, balloon=True, modules=[driver], binaries=[CHURN], **EAGER) as machine:
    beside(machine)
files = {"dlh_guest.ko": DRIVER}
with Guest(mem="384M", free_page_reporting=True, files=files, binaries=[CHURN], **EAGER) as machine:
    instead(machine)
append = f"init_on_free=1 {EAGER['append']}"
with Guest(mem="384M", smp=2, modules=[driver], binaries=[CHURN], append=append, start=EAGER["start"]) as machine:
    zeroed(machine)
remove_host_modules()
ktap.done()
