// SPDX-License-Identifier: GPL-2.0
/* The parameters of ksm_bridge.ko. */

#include <linux/module.h>

#include "../param.h"

DLH_PARAM(uint, worker_cpu_percent, 1, 100, 100, "Percent of one CPU that the worker of a VM may use");
