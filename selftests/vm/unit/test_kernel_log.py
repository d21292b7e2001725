# SPDX-License-Identifier: GPL-2.0
"""The kernel log scanner finds every kind of report, and nothing in a healthy log."""

import unittest

from vm.kernel_log import KNOWN_UNRELATED, scan

REPORTS = """\
BUG: unable to handle page fault for address: ffffb1e2c0d3f000
BUG: sleeping function called from invalid context at mm/util.c:123
BUG: scheduling while atomic: qemu/231/0x00000002
BUG: kernel NULL pointer dereference, address: 0000000000000000
kernel BUG at mm/ksm.c:1234!
WARNING: CPU: 0 PID: 1 at kernel/softirq.c:362 __local_bh_enable_ip+0x3c/0x70
WARNING: possible circular locking dependency detected
WARNING: possible recursive locking detected
WARNING: inconsistent lock state
WARNING: suspicious RCU usage
Oops: general protection fault, probably for non-canonical address: 0000 [#1] SMP NOPTI
Kernel panic - not syncing: Fatal exception
Call Trace:
 Call Trace:
refcount_t: underflow; use-after-free.
list_add corruption. next->prev should be prev
list_del corruption, ffff888 is LIST_POISON1
watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [qemu:231]
rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:
rcu: INFO: rcu_preempt self-detected stall on CPU
INFO: task qemu:231 blocked for more than 120 seconds.
BUG: KASAN: slab-use-after-free in foo+0x1/0x2
BUG: KCSAN: data-race in a / b
UBSAN: array-index-out-of-bounds in x.c:1:2
BUG: KFENCE: use-after-free read in foo+0x1/0x2
BUG: Bad page state in process qemu  pfn:12345
BUG: Bad rss-counter state mm:0000 type:MM_ANONPAGES val:1
qemu-system-x86[231]: segfault at 0 ip 0 sp 0 error 4
rust_kernel: panicked at drivers/x.rs:1:2:
unchecked MSR access error: WRMSR to 0x1d9
"""

HEALTHY = """\
[    0.000000] Linux version 7.3.4+deb13-amd64 (debian-kernel@lists.debian.org)
[    0.000000] Command line: console=ttyS0 rcupdate.rcu_cpu_stall_timeout=60 oops=panic
[    0.000000] Kernel command line: console=ttyS0 sysctl.kernel.hung_task_timeout_secs=240 hung_task
[    0.031736] kfence: initialized - using 2097152 bytes for 255 objects at 0x(____ptrval____)
[    0.100000] rcu: Preemptible hierarchical RCU implementation.
[    0.200000] rcu: rcu_fanout_leaf=16, nr_cpu_ids=2.
[    1.027946] kvm_amd: Nested Virtualization enabled
[    1.100000] kvm_dlh: loading out-of-tree module taints kernel.
[    7.015111] kvm: exiting hardware virtualization
"""


class Scan(unittest.TestCase):
    def test_every_report_is_found(self) -> None:
        for line in REPORTS.splitlines():
            for prefix in ("", "[    3.000528] ", "[  123.000528][   T99] "):
                with self.subTest(line=prefix + line):
                    self.assertEqual(len(scan(HEALTHY + prefix + line + "\n")), 1)

    def test_a_healthy_log_has_none(self) -> None:
        self.assertEqual(scan(HEALTHY), [])

    def test_serial_line_ends(self) -> None:
        (finding,) = scan("fine\r\nWARNING: CPU: 0\r\nfine\r\n")
        self.assertEqual(finding.line_number, 2)
        self.assertEqual(finding.context, ("fine", "WARNING: CPU: 0", "fine"))

    def test_a_report_is_one_finding(self) -> None:
        self.assertEqual(len(scan("WARNING: CPU: 0\nRIP: 0\nCall Trace:\n foo\n")), 1)

    def test_a_later_report_is_another(self) -> None:
        self.assertEqual(len(scan("WARNING: a\n" + "fine\n" * 40 + "WARNING: b\n")), 2)

    def test_nothing_is_allowed_yet(self) -> None:
        self.assertEqual(KNOWN_UNRELATED, frozenset())


if __name__ == "__main__":
    unittest.main()
