#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=240
# Rings whose memory says what no guest should write.
set -e
# Emulation is slow: without this, time would bound the drains that these tests count entries of.
insmod build/modules/kvm_dlh.ko budget_us=1000000
build/bin/dlh-vmm ktap malformed
rmmod kvm_dlh
