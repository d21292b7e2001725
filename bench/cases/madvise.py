# SPDX-License-Identifier: GPL-2.0
# mem: 3G
"""What taking memory back costs the host, by a VMM's own madvise and by reports, without a guest's kernel in between."""

import sys

from harness.inside import PROFILING, figure, insert, profiled, vmm

insert()
if PROFILING:
    with profiled():
        vmm("reclaim", "--laps", "1000")
    sys.exit()
for name, value in vmm("reclaim").items():
    figure(name, value)
