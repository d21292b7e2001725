# SPDX-License-Identifier: GPL-2.0
# mem: 2G
"""How long an entry waits for a guest that is busy and makes no exits of its own: the host's timer tick is what comes."""

from harness.inside import figure, insert, vmm

insert("kvm_dlh")
for name, value in vmm("latency").items():
    figure(f"busy_{name}", value)
