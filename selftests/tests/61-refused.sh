#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=180
# Nested guests, and memory of guest_memfd.
set -e
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko
build/bin/dlh-vmm ktap refused
rmmod ksm_bridge
rmmod kvm_dlh
