#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=3G timeout=300
# FREE_PAGES of private memory over files, as of a VMM that has restored a snapshot: of tmpfs and of a disk.
set -e
modprobe brd rd_nr=1 rd_size=65536
modprobe vfat
# Where it is a module, as in the stock kernel.
modprobe nls_ascii || true
modprobe nls_cp437 || true
python3 -m vm.disk /dev/ram0
mkdir /tmp/disk /tmp/tmpfs
mount -t vfat -o iocharset=ascii,codepage=437 /dev/ram0 /tmp/disk
mount -t tmpfs tmpfs /tmp/tmpfs
insmod build/modules/kvm_dlh.ko budget_us=1000000
insmod build/modules/ksm_bridge.ko
build/bin/dlh-vmm ktap private_files /tmp/tmpfs /tmp/disk
umount /tmp/disk /tmp/tmpfs
rmmod ksm_bridge
rmmod kvm_dlh
