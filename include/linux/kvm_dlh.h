/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Deferrable operations for guests, registered with kvm_dlh.ko by another module.
 *
 * Guests name an operation by number in an entry of their ring or in a trap-inserted call
 * (uapi/linux/kvm_dlh.h). kvm_dlh.ko copies the entry, checks its tag, and calls execute().
 */
#ifndef _LINUX_KVM_DLH_H
#define _LINUX_KVM_DLH_H

#include <linux/types.h>
#include <uapi/linux/kvm_dlh.h>

struct kvm;
struct module;

/* Version of struct kvm_dlh_ops; a registration with another one is refused. */
#define KVM_DLH_OPS_VERSION	1

/* Operation numbers are below this. */
#define KVM_DLH_MAX_OPS		64

/* execute(): the call goes on; kvm_dlh_complete() will be called once with its token. */
#define KVM_DLH_PENDING		1

/* Names one call until it is completed. Opaque; copied freely, completed exactly once. */
struct kvm_dlh_token {
	void *feed;
	u64 call;
};

/**
 * struct kvm_dlh_ops - one deferrable operation
 * @version:	KVM_DLH_OPS_VERSION
 * @number:	operation number, 1 to KVM_DLH_MAX_OPS - 1, not in use and not built in (uapi header)
 * @feature:	bits to show to guests while this is registered, outside of KVM_DLH_F_RESERVED
 * @owner:	THIS_MODULE
 * @attach:	first call of this operation in a VM: makes the VM's context. May sleep; on a thread of
 *		the VMM, so current->mm is the VM's. Returns 0 and a context that is not NULL, or -errno
 *		(the call is then declined with -KVM_DLH_ENOMEM). kvm->srcu may be held for reading, here and
 *		in @execute: neither may wait for a change of memslots.
 * @detach:	the VM or the operation goes away. Completes every token it still holds; afterwards
 *		the context is not used again. May sleep. Any thread.
 * @execute:	one call. @arg points to two words of a private copy; they are the guest's and must be
 *		checked. Returns 0 or -KVM_DLH_E* when it is finished, or KVM_DLH_PENDING. Same context
 *		as @attach; must be short, long work belongs on a thread of the operation's own. Its
 *		token may be completed before it returns.
 */
struct kvm_dlh_ops {
	u32 version;
	u16 number;
	u32 feature;
	struct module *owner;
	int (*attach)(const struct kvm_dlh_ops *ops, struct kvm *kvm, void **context);
	void (*detach)(void *context);
	int (*execute)(void *context, struct kvm *kvm, const u64 *arg,
		       struct kvm_dlh_token token);
};

/*
 * -EINVAL: version, number, reserved feature bits, or a callback missing; -EBUSY: the number is taken.
 * May sleep. The table must stay until kvm_dlh_unregister_ops() has returned.
 */
int kvm_dlh_register_ops(const struct kvm_dlh_ops *ops);

/*
 * On return no callback runs or will run, and every context has been detached. Calls that wait in
 * rings are declined from now on. May sleep.
 */
void kvm_dlh_unregister_ops(const struct kvm_dlh_ops *ops);

/* Any context in which a mutex may be taken. @status: 0 or -KVM_DLH_E*. */
void kvm_dlh_complete(struct kvm_dlh_token token, s32 status);

/*
 * As kvm_dlh_complete() for each of count tokens, and cheaper. Those of one ring are best given in the order
 * in which they came: the guest sees it move on once.
 */
void kvm_dlh_complete_all(const struct kvm_dlh_token *tokens, u32 count, s32 status);

#endif /* _LINUX_KVM_DLH_H */
