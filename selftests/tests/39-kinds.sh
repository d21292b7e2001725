#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=4G timeout=300 append="hugepagesz=1G hugepages=1 hugepagesz=2M hugepages=16"
# FREE_PAGES for every kind of memory.
set -e
modprobe zram
zramctl --size 256M /dev/zram0 >/dev/null 2>&1 || echo 256M >/sys/block/zram0/disksize
mkswap /dev/zram0 >/dev/null
swapon /dev/zram0
# Emulation is slow: without this, time would bound the drains that these tests count entries of.
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko allow=all,hugetlb
build/bin/dlh-vmm ktap kinds
rmmod ksm_bridge
rmmod kvm_dlh
