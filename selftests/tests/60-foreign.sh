#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=180
# VMs whose hypercalls KVM takes for another hypervisor's.
set -e
insmod build/modules/kvm_dlh.ko budget_us=1000000
build/bin/dlh-vmm ktap foreign
rmmod kvm_dlh
