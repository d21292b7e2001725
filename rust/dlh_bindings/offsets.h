/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Where fields lie that are read at every exit, as this kernel's own headers say: a call of a helper
 * for each would cost more than the read.
 */
#ifndef DLH_BINDINGS_OFFSETS_H
#define DLH_BINDINGS_OFFSETS_H

#include <linux/kvm_host.h>
#include <linux/stddef.h>

enum dlh_offset {
	DLH_VCPU_KVM = offsetof(struct kvm_vcpu, kvm),
	DLH_KVM_MEMSLOTS = offsetof(struct kvm, memslots),
	DLH_MEMSLOTS_GENERATION = offsetof(struct kvm_memslots, generation),
};

#endif
