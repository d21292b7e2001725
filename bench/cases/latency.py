# SPDX-License-Identifier: GPL-2.0
# mem: 2G
"""How long an entry waits: of a guest that is busy and makes no exits of its own, and of one that halts."""

from harness.inside import figure, idle_waits, insert, vmm

insert("kvm_dlh")
busy = vmm("latency")
figure("tsc_khz", busy.pop("tsc_khz"))
for name, value in busy.items():
    figure(f"busy_{name}", value)
waits = sorted(idle_waits())
for name, permille in (("p50", 500), ("p99", 990), ("max", 1000)):
    figure(f"idle_wait_{name}", waits[(len(waits) - 1) * permille // 1000])
