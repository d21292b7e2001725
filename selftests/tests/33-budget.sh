#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=2G timeout=120
# Drains that end because their time is up, and what becomes of the rest.
set -e
insmod build/modules/kvm_dlh.ko budget_us=1
build/bin/dlh-vmm ktap short_budget
