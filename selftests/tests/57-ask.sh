#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=300 append="hugepagesz=2M hugepages=16"
# Whether a guest is to report all that is free once more, as the host answers.
set -e
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko allow=all,hugetlb
build/bin/dlh-vmm ktap again
rmmod ksm_bridge
rmmod kvm_dlh
