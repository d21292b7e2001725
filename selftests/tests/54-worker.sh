#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=180
# The worker that merges: its share of a CPU, its cgroup, what is too much for it.
set -e
insmod build/modules/kvm_dlh.ko budget_us=1000000
for bad in worker_cpu_percent=0 worker_cpu_percent=101 merge=both; do
	if insmod build/modules/ksm_bridge.ko $bad 2>/dev/null; then
		echo "Bail out! ksm_bridge.ko takes $bad"
		exit 1
	fi
	dmesg | grep -q "ksm_bridge: $bad is " || { echo "Bail out! no word in the log about $bad"; exit 1; }
done
insmod build/modules/ksm_bridge.ko merge=share worker_cpu_percent=10
build/bin/dlh-vmm ktap worker
rmmod ksm_bridge
rmmod kvm_dlh
