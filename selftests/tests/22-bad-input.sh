#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=240
# Hypercalls and entries that must be refused.
set -e
# Emulation is slow: without this, time would bound the drains that these tests count entries of.
insmod build/modules/kvm_dlh.ko budget_us=1000000
build/bin/dlh-vmm ktap bad_input
rmmod kvm_dlh
