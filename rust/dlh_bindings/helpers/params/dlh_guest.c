// SPDX-License-Identifier: GPL-2.0
/* Version and parameters of dlh_guest.ko. */

#include <linux/module.h>

#include "../../version.h"
#include "../param.h"

MODULE_VERSION(DLH_VERSION);

DLH_PARAM_POWER_OF_TWO(uint, ring_entries, 64, 65536, 256, "Entries of each CPU's ring");
DLH_PARAM_ALSO(int, order, 0, 10, -1, "page_reporting.page_reporting_order, or else 9", -1,
	       "Report free blocks of 2^order pages and more");
DLH_PARAM(uint, batch, 1, 32, 32,
	  "Blocks that are taken from the allocator, handed to the host and waited for at a time");
DLH_PARAM(uint, pace_mib, 0, 1048576, 0, "MiB that are reported in a second at most, 0 for no limit");
DLH_PARAM(uint, timeout_ms, 1, 60000, 1000, "Milliseconds to wait for the host to come by before calling it");
