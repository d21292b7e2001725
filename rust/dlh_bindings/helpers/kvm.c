// SPDX-License-Identifier: GPL-2.0
/* struct kvm and struct kvm_vcpu: the fields and inline functions of linux/kvm_host.h that we use. */

#include <linux/dcache.h>
#include <linux/kthread.h>
#include <linux/kvm_host.h>
#include <linux/math64.h>
#include <linux/module.h>
#include <linux/refcount.h>
#include <linux/rculist.h>
#include <linux/string.h>

#include "../helpers.h"

int dlh_vcpu_idx(const struct kvm_vcpu *vcpu)
{
	return vcpu->vcpu_idx;
}

int dlh_vcpu_id(const struct kvm_vcpu *vcpu)
{
	return vcpu->vcpu_id;
}

/*
 * KVM holds kvm->srcu around the handling of an exit, for the memslots. On the vCPU's thread, in a
 * handler that uses none: those who change memslots need not wait for it meanwhile.
 */
void dlh_vcpu_srcu_unlock(struct kvm_vcpu *vcpu)
{
	kvm_vcpu_srcu_read_unlock(vcpu);
}

void dlh_vcpu_srcu_lock(struct kvm_vcpu *vcpu)
{
	kvm_vcpu_srcu_read_lock(vcpu);
}

/* Set by KVM_RUN around kvm_arch_vcpu_ioctl_run() (virt/kvm/kvm_main.c). */
bool dlh_vcpu_in_run(const struct kvm_vcpu *vcpu)
{
	return READ_ONCE(vcpu->wants_to_run);
}

/*
 * Whether the current thread is inside KVM_RUN for it, in the address space of the VMM. KVM_RUN notes
 * the thread before it sets wants_to_run.
 */
bool dlh_vcpu_runs_here(const struct kvm_vcpu *vcpu)
{
	return READ_ONCE(vcpu->wants_to_run) && READ_ONCE(vcpu->pid) == task_pid(current) &&
	       vcpu->kvm->mm == current->mm;
}

/* Whether KVM_RUN waits for an event before the guest is entered again. On its own thread. */
bool dlh_vcpu_will_block(const struct kvm_vcpu *vcpu)
{
	return vcpu->arch.mp_state != KVM_MP_STATE_RUNNABLE || vcpu->arch.apf.halted;
}

bool dlh_vcpu_is_refused(const struct kvm_vcpu *vcpu)
{
	const struct kvm *kvm = vcpu->kvm;

	return (vcpu->arch.hflags & (HF_SMM_MASK | HF_GUEST_MASK)) ||
	       vcpu->arch.guest_state_protected ||
	       kvm->arch.vm_type != KVM_X86_DEFAULT_VM ||
	       kvm->arch.has_protected_state || kvm->arch.has_private_mem;
}

/*
 * The time-stamp counter that the guest reads now. KVM scales it by a fixed-point ratio, whose binary
 * point is where the hardware has it: 32 bits on SVM, 48 on VMX (arch/x86/kvm/svm/svm.c, vmx/vmx.c);
 * without hardware for it the ratio is 1.
 */
u64 dlh_vcpu_guest_tsc(const struct kvm_vcpu *vcpu)
{
	u64 ratio = READ_ONCE(vcpu->arch.l1_tsc_scaling_ratio);
	u64 tsc = rdtsc();

	if (ratio > 1)
		tsc = mul_u64_u64_shr(tsc, ratio, boot_cpu_has(X86_FEATURE_SVM) ? 32 : 48);
	return tsc + READ_ONCE(vcpu->arch.l1_tsc_offset);
}

int dlh_kvm_pid(const struct kvm *kvm)
{
	return kvm->userspace_pid;
}

/*
 * What KVM calls the directory of this VM in debugfs; empty if it has none. It has a name of that length
 * at most, <tid>-<fd>.
 */
void dlh_kvm_name(const struct kvm *kvm, char name[DLH_KVM_NAME])
{
	const struct dentry *dentry = kvm->debugfs_dentry;

	if (IS_ERR_OR_NULL(dentry))
		name[0] = 0;
	else
		strscpy(name, dentry->d_name.name, DLH_KVM_NAME);
}

bool dlh_kvm_is_current(const struct kvm *kvm)
{
	return kvm->mm == current->mm;
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

static int put_thread(void *kvm)
{
	kvm_put_kvm(kvm);
	/* Nothing of the module is on the way back from there. */
	module_put_and_kthread_exit(0);
}

/*
 * Gives back a reference to a VM. The last one destroys the VM, which waits for a thread of the process that made it
 * (KVM's recovery of huge pages), and that for as long as somebody stops that process; and for the readers of its address
 * space's notifiers. So only threads of the VMM do that here. For others, who may be in the way of what it waits for, a
 * thread of its own does; it holds the module. May sleep.
 */
void dlh_kvm_put(struct kvm *kvm)
{
	if (refcount_dec_not_one(&kvm->users_count))
		return;
	if (kvm->mm != current->mm || (current->flags & PF_KTHREAD)) {
		if (try_module_get(THIS_MODULE)) {
			if (!IS_ERR(kthread_run(put_thread, kvm, "kvm_dlh/put")))
				return;
			module_put(THIS_MODULE);
		}
	}
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

/* The first frame of the slot that gfn, which was just translated, lies in. The caller holds kvm->srcu. */
u64 dlh_kvm_slot_start(struct kvm *kvm, u64 gfn)
{
	const struct kvm_memory_slot *slot = __gfn_to_memslot(__kvm_memslots(kvm, 0), gfn);

	return slot ? slot->base_gfn : gfn;
}

/* Whether what is written to gfn is logged. The caller holds kvm->srcu. */
bool dlh_kvm_logs_writes(struct kvm *kvm, u64 gfn)
{
	const struct kvm_memory_slot *slot = __gfn_to_memslot(__kvm_memslots(kvm, 0), gfn);

	return slot && kvm_slot_dirty_track_enabled(slot);
}

/*
 * Notes that gfn was written, where the VMM reads KVM's dirty bitmap. The dirty ring of a vCPU, which a VMM may
 * have in its place, is filled by functions that KVM keeps to itself. The caller holds kvm->srcu.
 */
void dlh_kvm_mark_dirty(struct kvm *kvm, u64 gfn)
{
	struct kvm_memory_slot *slot = __gfn_to_memslot(__kvm_memslots(kvm, 0), gfn);

	if (slot && kvm_slot_dirty_track_enabled(slot) && slot->dirty_bitmap)
		set_bit_le(gfn - slot->base_gfn, slot->dirty_bitmap);
}

/*
 * Whether the VMM has told KVM of devices that it assigns: it makes KVM's device "kvm-vfio" for that,
 * and not otherwise. Devices are added to the list, and taken off it, under RCU.
 */
bool dlh_kvm_has_assigned_devices(struct kvm *kvm)
{
	const struct kvm_device *device;
	bool found = false;

	rcu_read_lock();
	list_for_each_entry_rcu(device, &kvm->devices, vm_node) {
		if (!strcmp(device->ops->name, "kvm-vfio"))
			found = true;
	}
	rcu_read_unlock();
	return found;
}
