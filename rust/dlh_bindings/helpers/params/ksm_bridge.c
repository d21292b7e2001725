// SPDX-License-Identifier: GPL-2.0
/* Version and parameters of ksm_bridge.ko. */

#include <linux/minmax.h>
#include <linux/module.h>
#include <linux/overflow.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
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

/* What allow says: a text that dlh_allow_check() has found good. */
struct allow {
	struct rcu_head rcu;
	size_t bytes;
	char text[] __counted_by(bytes);
};

/* NULL: the default. Written under the lock of the module's parameters. */
static struct allow __rcu *allow;
/* Raised after allow has changed. */
static u32 allow_generation;

static int allow_set(const char *value, const struct kernel_param *kp)
{
	struct dlh_allow_bad bad = {};
	struct allow *new, *old;
	size_t bytes;

	bytes = dlh_allow_check(value, strlen(value), &bad);
	if (bad.why) {
		pr_err("%s: allow=%.*s is no good: \"%.*s\" %.*s\n", kp->mod->name,
		       (int)min_t(size_t, bytes, 128), value, (int)min_t(size_t, bad.word_bytes, 64),
		       bad.word, (int)bad.why_bytes, bad.why);
		return -EINVAL;
	}
	new = kmalloc(struct_size(new, text, bytes), GFP_KERNEL);
	if (!new)
		return -ENOMEM;
	new->bytes = bytes;
	memcpy(new->text, value, bytes);
	/* Nobody but us writes: the caller holds the lock of the parameters, or the module is only being made. */
	old = rcu_replace_pointer(allow, new, true);
	/* Who sees the new number sees the new text. */
	smp_store_release(&allow_generation, allow_generation + 1);
	if (old)
		kfree_rcu(old, rcu);
	return 0;
}

static int allow_get(char *buffer, const struct kernel_param *kp)
{
	const char *text;
	size_t bytes;
	int length;

	rcu_read_lock();
	text = dlh_allow_text(&bytes);
	length = sysfs_emit(buffer, "%.*s\n", (int)bytes, text);
	rcu_read_unlock();
	return length;
}

/* The module goes; nobody reads it any more. */
static void allow_free(void *arg)
{
	kfree(rcu_replace_pointer(allow, NULL, true));
}

static const struct kernel_param_ops allow_ops = {
	.set = allow_set,
	.get = allow_get,
	.free = allow_free,
};
module_param_cb(allow, &allow_ops, NULL, 0644);
__MODULE_PARM_TYPE(allow, "string");
MODULE_PARM_DESC(allow, "Whose free pages are merged (all; none; or a list of uid=NUMBER and cgroup=/PATH; with hugetlb in the list memory of hugetlbfs, too; default all)");

/* A number that has changed when the text has. */
u32 dlh_allow_generation(void)
{
	/* Pairs with allow_set(). */
	return smp_load_acquire(&allow_generation);
}

/* The text, for as long as the caller's RCU read section lasts. */
const char *dlh_allow_text(size_t *bytes)
{
	const struct allow *now = rcu_dereference(allow);

	if (!now) {
		*bytes = sizeof(DLH_ALLOW_DEFAULT) - 1;
		return DLH_ALLOW_DEFAULT;
	}
	*bytes = now->bytes;
	return now->text;
}
