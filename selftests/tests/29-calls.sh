#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=180
# Arrays of calls, events for the host's trace, their order, and the statistics of operations.
set -e
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko
build/bin/dlh-vmm ktap calls
