#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=2G timeout=300
# What no sane guest or VMM does keeps no thread in the kernel, and holds nobody else up.
set -e
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
insmod build/modules/kvm_dlh.ko
insmod build/modules/ksm_bridge.ko
build/bin/dlh-vmm ktap hostile
rmmod ksm_bridge
rmmod kvm_dlh
