#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=120
# A VM's queue is there from its beginning, under KVM's own name for the VM.
set -e
insmod build/modules/kvm_dlh.ko
build/bin/dlh-vmm ktap birth
