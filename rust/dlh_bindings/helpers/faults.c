// SPDX-License-Identifier: GPL-2.0
/* The probe on page faults of guests: kvm_page_fault, exported by kvm.ko. */

#include <linux/kvm_host.h>
#include <linux/tracepoint.h>

#include "../helpers.h"

extern struct tracepoint __tracepoint_kvm_page_fault;

int dlh_tracepoint_attach_fault(dlh_fault_fn probe, void *data)
{
	return tracepoint_probe_register(&__tracepoint_kvm_page_fault, probe, data);
}

/* May sleep. On return the probe does not run. */
void dlh_tracepoint_detach_fault(dlh_fault_fn probe, void *data)
{
	tracepoint_probe_unregister(&__tracepoint_kvm_page_fault, probe, data);
	tracepoint_synchronize_unregister();
}

/*
 * Whether the fault is a write, and its address one of the VM's own guest-physical ones. Without nested
 * paging KVM reports guest-virtual addresses there, and of a nested guest that guest's. Bit 1 means a
 * write both in SVM's error code and in VMX's exit qualification.
 */
bool dlh_fault_writes_gpa(const struct kvm_vcpu *vcpu, u64 error)
{
	return (error & BIT(1)) && !(vcpu->arch.hflags & HF_GUEST_MASK) &&
	       vcpu->arch.mmu->root_role.direct;
}
