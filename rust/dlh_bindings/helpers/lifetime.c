// SPDX-License-Identifier: GPL-2.0
/*
 * The beginning and the end of a VM, by plain ftrace hooks.
 *
 * kvm_arch_create_vm_debugfs(kvm) is the last that can go wrong in kvm_create_vm(): from there on a VM
 * ends by its reference count only, which may be raised. Where debugfs is off it is not called.
 * kvm_arch_destroy_vm(kvm) runs before kvm is freed (virt/kvm/kvm_main.c).
 */

#include <linux/ftrace.h>
#include <linux/kvm_host.h>

#include "../helpers.h"
#include "ftrace.h"

#define CREATE_SYMBOL "kvm_arch_create_vm_debugfs"
#define DESTROY_SYMBOL "kvm_arch_destroy_vm"

static dlh_lifetime_fn create_entry, destroy_entry;

static void notrace create_vm(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			      struct ftrace_regs *fregs)
{
	create_entry((struct kvm *)ftrace_regs_get_argument(fregs, 0));
}

static void notrace destroy_vm(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			       struct ftrace_regs *fregs)
{
	destroy_entry((struct kvm *)ftrace_regs_get_argument(fregs, 0));
}

static struct ftrace_ops create_ops = {
	.func = create_vm,
	.flags = FTRACE_OPS_FL_RECURSION,
};

static struct ftrace_ops destroy_ops = {
	.func = destroy_vm,
	.flags = FTRACE_OPS_FL_RECURSION,
};

int dlh_create_hook(dlh_lifetime_fn entry)
{
	create_entry = entry;
	return dlh_ftrace_hook(&create_ops, CREATE_SYMBOL);
}

void dlh_create_unhook(void)
{
	dlh_ftrace_unhook(&create_ops);
}

const char *dlh_create_symbol(void)
{
	return CREATE_SYMBOL;
}

int dlh_destroy_hook(dlh_lifetime_fn entry)
{
	destroy_entry = entry;
	return dlh_ftrace_hook(&destroy_ops, DESTROY_SYMBOL);
}

void dlh_destroy_unhook(void)
{
	dlh_ftrace_unhook(&destroy_ops);
}

const char *dlh_destroy_symbol(void)
{
	return DESTROY_SYMBOL;
}
