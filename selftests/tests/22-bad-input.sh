#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=2G timeout=240
# Hypercalls and entries that must be refused.
set -e
insmod build/modules/kvm_dlh.ko
build/bin/dlh-vmm ktap bad_input
rmmod kvm_dlh
