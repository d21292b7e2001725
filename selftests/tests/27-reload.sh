#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=300
# Modules that come and go while VMs run.
set -e
build/bin/dlh-vmm ktap reload --modules build/modules
