#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=2G timeout=400
# Statistics that somebody has open, or is just reading, while VMs and modules go.
set -e
build/bin/dlh-vmm ktap files --modules build/modules
