# SPDX-License-Identifier: GPL-2.0
# mem: 2G
# smp: 2
# append: nohz_full=1 isolcpus=1 rcu_nocbs=1
"""How long an entry waits for a guest that is busy on a CPU without a timer tick: max_defer_us is what ends that."""

import os

from harness.inside import figure, insert, vmm

insert("kvm_dlh")
os.sched_setaffinity(0, {1})
for name, value in vmm("latency", "--samples", "200").items():
    figure(name, value)
