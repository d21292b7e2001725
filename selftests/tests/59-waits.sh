#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=2G timeout=600
# What a thread of a VMM waits for, and what ends that; and who is held up meanwhile.
set -e
modprobe zram
zramctl --size 256M /dev/zram0 >/dev/null 2>&1 || echo 256M >/sys/block/zram0/disksize
mkswap /dev/zram0 >/dev/null
swapon /dev/zram0
echo 5 >/proc/sys/kernel/hung_task_timeout_secs
build/bin/dlh-vmm ktap waits --build build
