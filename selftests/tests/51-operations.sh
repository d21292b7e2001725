#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=600
# Operations that other modules provide: the samples, and an odd one.
set -e
build/bin/dlh-vmm ktap operations --build build
