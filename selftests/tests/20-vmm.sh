#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=1 mem=2G timeout=180
# The VMM that the tests below use does what they take for granted. No module is inserted.
set -e
echo 8 >/proc/sys/vm/nr_hugepages
build/bin/dlh-vmm ktap machinery
