// SPDX-License-Identifier: GPL-2.0
/* Setting and showing the parameters of helpers/param.h. */

#include <linux/kernel.h>
#include <linux/log2.h>
#include <linux/module.h>
#include <linux/sysfs.h>

#include "param.h"

static bool is_allowed(const struct dlh_param *param, int value)
{
	if (value == param->also)
		return true;
	return value >= param->min && value <= param->max && (!param->power_of_two || is_power_of_2(value));
}

/* Says what is wrong: the kernel itself names only the parameter and the value. */
static void complain(const struct kernel_param *kp, const char *value)
{
	const struct dlh_param *param = kp->arg;

	if (param->power_of_two)
		pr_err("%s: %s=%s is no power of two from %d to %d\n", kp->mod->name, kp->name, value,
		       param->min, param->max);
	else if (param->also < param->min)
		pr_err("%s: %s=%s is not between %d and %d, nor %d\n", kp->mod->name, kp->name, value,
		       param->min, param->max, param->also);
	else
		pr_err("%s: %s=%s is not between %d and %d\n", kp->mod->name, kp->name, value,
		       param->min, param->max);
}

static int param_set(const char *text, const struct kernel_param *kp)
{
	struct dlh_param *param = kp->arg;
	int value;

	if (kstrtoint(text, 0, &value) || !is_allowed(param, value)) {
		complain(kp, text);
		return -EINVAL;
	}
	param->value = value;
	return 0;
}

static int param_get(char *buffer, const struct kernel_param *kp)
{
	const struct dlh_param *param = kp->arg;

	return sysfs_emit(buffer, "%d\n", param->value);
}

const struct kernel_param_ops dlh_param_ops = {
	.set = param_set,
	.get = param_get,
};
