// SPDX-License-Identifier: GPL-2.0
/*
 * For 12-hook-conflicts.py: a live patch of the function that kvm_dlh.ko hooks.
 *
 * While it is enabled guests get one and the same answer to every hypercall.
 */

#include <linux/kvm_host.h>
#include <linux/livepatch.h>
#include <linux/module.h>

/* Stands in for ____kvm_emulate_hypercall(); 1 tells its caller to pass on the result. */
static int answer_all(struct kvm_vcpu *vcpu, int cpl, int (*complete)(struct kvm_vcpu *vcpu))
{
	vcpu->run->hypercall.ret = -KVM_EOPNOTSUPP;
	return 1;
}

static struct klp_func functions[] = {
	{ .old_name = "____kvm_emulate_hypercall", .new_func = answer_all },
	{ }
};

static struct klp_object objects[] = {
	{ .name = "kvm", .funcs = functions },
	{ }
};

static struct klp_patch patch = {
	.mod = THIS_MODULE,
	.objs = objects,
};

static int __init patch_init(void)
{
	return klp_enable_patch(&patch);
}

/* Only called when the patch has been disabled. */
static void __exit patch_exit(void)
{
}

module_init(patch_init);
module_exit(patch_exit);
MODULE_DESCRIPTION("Live patch of a function that kvm_dlh.ko hooks, for a test");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
