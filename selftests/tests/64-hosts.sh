#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=3G timeout=300 qemu="-object memory-backend-ram,id=m0,size=2G -object memory-backend-ram,id=m1,size=1G -numa node,memdev=m0,cpus=0 -numa node,memdev=m1"
# What hosts, and VMMs, do with memory beside giving it to guests; locked down at the end.
set -e
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko
build/bin/dlh-vmm ktap hosts
rmmod ksm_bridge
rmmod kvm_dlh
