#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=3G timeout=500 one_thread=yes
# One thread: with several the emulator itself loses a VM in some thousands; see docs/emulation.md.
# Very many vCPUs and VMs; VMs in the hands of other processes; every kind of interrupt controller.
set -e
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko
build/bin/dlh-vmm ktap scale
rmmod ksm_bridge
rmmod kvm_dlh
