// SPDX-License-Identifier: GPL-2.0
/* For 15-patching.py: has functions of the same names as those of KVM that kvm_dlh.ko hooks. */

#include <linux/module.h>

int ____kvm_emulate_hypercall(void *vcpu, int cpl, void *complete);
void kvm_arch_create_vm_debugfs(void *kvm);
void kvm_arch_destroy_vm(void *kvm);

noinline int ____kvm_emulate_hypercall(void *vcpu, int cpl, void *complete)
{
	return cpl;
}

noinline void kvm_arch_create_vm_debugfs(void *kvm)
{
}

noinline void kvm_arch_destroy_vm(void *kvm)
{
}

/* If one of them is hooked, this shows it: there is no VM at these addresses. */
static int __init namesake_init(void)
{
	return 0;
}

static void __exit namesake_exit(void)
{
	kvm_arch_create_vm_debugfs(NULL);
	kvm_arch_destroy_vm(NULL);
}

module_init(namesake_init);
module_exit(namesake_exit);
MODULE_DESCRIPTION("Functions of the same names as KVM's, for a test");
MODULE_LICENSE("GPL");
