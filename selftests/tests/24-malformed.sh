#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=2G timeout=240
# Rings whose memory says what no guest should write.
set -e
insmod build/modules/kvm_dlh.ko
build/bin/dlh-vmm ktap malformed
rmmod kvm_dlh
