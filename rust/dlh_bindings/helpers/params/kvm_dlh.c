// SPDX-License-Identifier: GPL-2.0
/* Version and parameters of kvm_dlh.ko. */

#include <linux/module.h>

#include "../../version.h"
#include "../param.h"

MODULE_VERSION(DLH_VERSION);

DLH_PARAM(uint, budget_entries, 1, 65536, 512, "Entries executed at most before a vCPU may go on");
DLH_PARAM(uint, budget_us, 1, 1000000, 50, "Microseconds that executing entries takes at most before a vCPU may go on; the last one is not cut short");
DLH_PARAM_ALSO(uint, max_defer_us, 100, 1000000, 0, "for ever", 10000,
	       "Microseconds that an entry waits at most for its vCPU to exit by itself");
