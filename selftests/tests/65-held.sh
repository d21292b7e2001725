#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=3G timeout=600
# What users may keep from going on: their VMMs, files, address spaces. Nobody else waits for that.
set -e
sysctl -qw kernel.hung_task_timeout_secs=10
# Emulation is slow: without this, time would bound the drains that these tests count entries of.
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko
insmod build/test-modules/vmm_holder.ko
build/bin/dlh-vmm ktap held
rmmod vmm_holder
