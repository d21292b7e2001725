#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=2G timeout=300
# Rings that are used as they should be.
set -e
insmod build/modules/kvm_dlh.ko
build/bin/dlh-vmm ktap ring
rmmod kvm_dlh
