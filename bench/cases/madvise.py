# SPDX-License-Identifier: GPL-2.0
# mem: 3G
"""What taking memory back costs the host, by a VMM's own madvise and by reports, without a guest's kernel in between."""

from harness.inside import figure, insert, vmm

insert()
for name, value in vmm("reclaim").items():
    figure(name, value)
