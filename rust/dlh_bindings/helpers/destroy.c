// SPDX-License-Identifier: GPL-2.0
/* The end of a VM: a plain ftrace hook on kvm_arch_destroy_vm(kvm), which runs before kvm is freed. */

#include <linux/ftrace.h>
#include <linux/kvm_host.h>

#include "../helpers.h"

#define DESTROY_SYMBOL "kvm_arch_destroy_vm"

static dlh_destroy_fn destroy_entry;

static void notrace destroy_vm(unsigned long ip, unsigned long parent_ip,
			       struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	destroy_entry((struct kvm *)ftrace_regs_get_argument(fregs, 0));
}

static struct ftrace_ops destroy_ops = {
	.func = destroy_vm,
	.flags = FTRACE_OPS_FL_RECURSION,
};

int dlh_destroy_hook(dlh_destroy_fn entry)
{
	static char symbol[] = DESTROY_SYMBOL;
	int err;

	destroy_entry = entry;
	err = ftrace_set_filter(&destroy_ops, symbol, strlen(symbol), 1);
	if (err)
		return -ENOENT;
	err = register_ftrace_function(&destroy_ops);
	if (err)
		ftrace_free_filter(&destroy_ops);
	return err;
}

int dlh_destroy_unhook(void)
{
	int err = unregister_ftrace_function(&destroy_ops);

	ftrace_free_filter(&destroy_ops);
	return err;
}

const char *dlh_destroy_symbol(void)
{
	return DESTROY_SYMBOL;
}
