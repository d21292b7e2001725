// SPDX-License-Identifier: GPL-2.0
/* struct kvm and struct kvm_vcpu: the fields and inline functions of linux/kvm_host.h that we use. */

#include <linux/kvm_host.h>

#include "../helpers.h"

struct kvm *dlh_vcpu_kvm(const struct kvm_vcpu *vcpu)
{
	return vcpu->kvm;
}

int dlh_vcpu_idx(const struct kvm_vcpu *vcpu)
{
	return vcpu->vcpu_idx;
}

/* Set by KVM_RUN around kvm_arch_vcpu_ioctl_run() (virt/kvm/kvm_main.c). */
bool dlh_vcpu_in_run(const struct kvm_vcpu *vcpu)
{
	return READ_ONCE(vcpu->wants_to_run);
}

bool dlh_vcpu_is_refused(const struct kvm_vcpu *vcpu)
{
	const struct kvm *kvm = vcpu->kvm;

	return (vcpu->arch.hflags & (HF_SMM_MASK | HF_GUEST_MASK)) ||
	       vcpu->arch.guest_state_protected ||
	       kvm->arch.has_protected_state || kvm->arch.has_private_mem;
}

int dlh_kvm_pid(const struct kvm *kvm)
{
	return kvm->userspace_pid;
}

bool dlh_kvm_is_current(const struct kvm *kvm)
{
	return kvm->mm == current->mm;
}

/* Changes whenever a memslot does. Only compared, so it needs no srcu. */
u64 dlh_kvm_generation(struct kvm *kvm)
{
	return READ_ONCE(rcu_dereference_raw(kvm->memslots[0])->generation);
}

int dlh_kvm_read_lock(struct kvm *kvm)
{
	return srcu_read_lock(&kvm->srcu);
}

void dlh_kvm_read_unlock(struct kvm *kvm, int idx)
{
	srcu_read_unlock(&kvm->srcu, idx);
}

bool dlh_kvm_get_safe(struct kvm *kvm)
{
	return kvm_get_kvm_safe(kvm);
}

void dlh_kvm_put(struct kvm *kvm)
{
	kvm_put_kvm(kvm);
}

/* The caller holds kvm->srcu. *pages: how many pages from gfn on lie in the same slot. */
enum dlh_slot dlh_kvm_translate(struct kvm *kvm, u64 gfn, unsigned long *hva, u64 *pages)
{
	struct kvm_memory_slot *slot;

	slot = __gfn_to_memslot(__kvm_memslots(kvm, 0), gfn);
	if (!slot || !kvm_is_visible_memslot(slot))
		return DLH_SLOT_NONE;
	*pages = slot->base_gfn + slot->npages - gfn;
	if (slot->flags & KVM_MEM_READONLY)
		return DLH_SLOT_READONLY;
	if (kvm_slot_has_gmem(slot))
		return DLH_SLOT_PRIVATE;
	*hva = __gfn_to_hva_memslot(slot, gfn);
	return DLH_SLOT_USABLE;
}
