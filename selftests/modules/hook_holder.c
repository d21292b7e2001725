// SPDX-License-Identifier: GPL-2.0
/*
 * For 12-hook-conflicts.py: owns the function that kvm_dlh.ko hooks, and leaves it as it is.
 *
 * ftrace lets one owner at a time change where a function goes (FTRACE_OPS_FL_IPMODIFY). This one could,
 * and does not; it counts the calls.
 */

#include <linux/ftrace.h>
#include <linux/module.h>
#include <linux/moduleparam.h>

static char symbol[] = "____kvm_emulate_hypercall";

static atomic_t seen;

static int seen_get(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%d\n", atomic_read(&seen));
}

static const struct kernel_param_ops seen_ops = { .get = seen_get };
module_param_cb(seen, &seen_ops, NULL, 0444);
MODULE_PARM_DESC(seen, "Calls of the function, to be read");

static void notrace holder(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			   struct ftrace_regs *fregs)
{
	atomic_inc(&seen);
}

static struct ftrace_ops holder_ops = {
	.func = holder,
	.flags = FTRACE_OPS_FL_IPMODIFY,
};

static int __init holder_init(void)
{
	int err = ftrace_set_filter(&holder_ops, symbol, strlen(symbol), 1);

	if (err)
		return err;
	err = register_ftrace_function(&holder_ops);
	if (err)
		ftrace_free_filter(&holder_ops);
	return err;
}

static void __exit holder_exit(void)
{
	unregister_ftrace_function(&holder_ops);
	ftrace_free_filter(&holder_ops);
}

module_init(holder_init);
module_exit(holder_exit);
MODULE_DESCRIPTION("Owns a function that kvm_dlh.ko hooks, for a test");
MODULE_LICENSE("GPL");
