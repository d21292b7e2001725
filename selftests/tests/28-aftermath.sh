#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=3G timeout=300
# What is left when KVM_RUN returns, a ring goes, a VM ends, or the module is removed: nothing.
set -e -o pipefail
# Emulation is slow: without this, time would bound the drains that these tests count entries of.
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko
build/bin/dlh-vmm ktap aftermath
# A probe that stayed behind would meet this VM.
build/bin/dlh-vmm measure | sed 's/^/# /'
! grep -qE 'kvm_dlh|ksm_bridge' /proc/modules /sys/kernel/tracing/enabled_functions
