// SPDX-License-Identifier: GPL-2.0
/* Version and parameters of ksm_bridge.ko. */

#include <linux/module.h>
#include <linux/string.h>
#include <linux/sysfs.h>

#include "../../version.h"
#include "../param.h"

MODULE_VERSION(DLH_VERSION);

DLH_PARAM(uint, worker_cpu_percent, 1, 100, 100, "Percent of one CPU that the worker of a VM may use");

static bool merge_share;

static int merge_set(const char *value, const struct kernel_param *kp)
{
	if (sysfs_streq(value, "release") || sysfs_streq(value, "share")) {
		merge_share = sysfs_streq(value, "share");
		return 0;
	}
	pr_err("%s: merge=%s is neither release nor share\n", kp->mod->name, value);
	return -EINVAL;
}

static int merge_get(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%s\n", merge_share ? "share" : "release");
}

static const struct kernel_param_ops merge_ops = {
	.set = merge_set,
	.get = merge_get,
};
module_param_cb(merge, &merge_ops, NULL, 0444);
__MODULE_PARM_TYPE(merge, "string");
MODULE_PARM_DESC(merge, "When the zero page is mapped (release: when it is read; share: at once, for private anonymous memory; default release)");

bool dlh_param_merge_share(void)
{
#ifdef DLH_FAULT_NO_VMA_CHECK
	pr_warn("ksm_bridge: TEST BUILD: every kind of memory is taken for anonymous, guests WILL LOSE DATA\n");
#endif
	return merge_share;
}
