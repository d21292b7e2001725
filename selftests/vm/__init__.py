# SPDX-License-Identifier: GPL-2.0
"""Virtual machines for the tests.

The machine runs L1, the host under test: the stock kernel with the Debian root (`machine`). Inside
it a test runs L2, its guest: unmodified QEMU on the KVM of L1 (`guest`). Both boot from small
initramfs images (`initramfs`). `runner` boots one L1 for each test file and judges what it prints
(`ktap_parser`) and what the kernels log (`kernel_log`).
"""
