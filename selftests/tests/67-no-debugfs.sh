#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=300 append="debugfs=off"
# A host without debugfs: the modules work, and who looks at memory sees that they do.
set -e
if [[ -e /sys/kernel/debug/kvm ]]; then
	echo "Bail out! there is debugfs"
	exit 1
fi
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko
build/bin/dlh-vmm ktap hosts --no-debugfs
rmmod ksm_bridge
rmmod kvm_dlh
