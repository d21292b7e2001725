#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=3G timeout=300
# The operation FREE_PAGES.
set -e
# Emulation is slow: without this, time would bound the drains that these tests count entries of.
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko
build/bin/dlh-vmm ktap free_pages
rmmod ksm_bridge
rmmod kvm_dlh
