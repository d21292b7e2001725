/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Deferrable low-overhead hypercalls (DLH): the ABI between a guest and
 * kvm_dlh.ko on its host, version 1.
 *
 * Everything starts with one hypercall number, KVM_HC_DLH, whose first argument
 * names a function. A host without the module answers -KVM_ENOSYS (-1000), so
 * discovery needs no CPUID bit. Callers run at CPL 0, outside SMM, not in a
 * nested guest and not in an encrypted VM; others get -KVM_EPERM (-1) or
 * -KVM_DLH_EREFUSED.
 *
 *   RAX = KVM_HC_DLH, RBX = function, RCX, RDX, RSI = arguments; result in RAX.
 *
 * A ring lies in guest memory, physically contiguous, page aligned, in one
 * memslot. It belongs to the vCPU that set it up:
 *
 *        0 +---------------------------+  <- page aligned
 *          | tail        (guest: u32)  |
 *          | dropped     (guest: u64)  |
 *       64 +---------------------------+
 *          | done        (host: u32)   |
 *          | flags       (host: u32)   |
 *          | cookie      (host: u64)   |
 *          | declined    (host: u64)   |
 *          | entries, version (host)   |
 *      128 +---------------------------+
 *          | entry 0     (32 bytes)    |
 *          | entry 1                   |
 *          |  ...                      |
 *          | entry n-1                 |
 *          +---------------------------+
 *
 * Indices are free-running u32; the slot of position p is p & (n - 1). The guest
 * owns the slots [tail, done + n), the host the slots [done, tail). The guest
 * fills slots, issues a write barrier, stores tail. The host executes entries in
 * order, stores each status that is not 0, then moves done past every entry that
 * has been executed *to its end*; done never passes one that is still worked on.
 */
#ifndef _UAPI_LINUX_KVM_DLH_H
#define _UAPI_LINUX_KVM_DLH_H

#include <linux/types.h>

#define KVM_DLH_ABI_VERSION	1

/* The hypercall number: "DLH" and 1; clear of the numbers in linux/kvm_para.h. */
#define KVM_HC_DLH		0x444c4801

/*
 * Functions (RBX).
 *
 * FEATURES  -> (KVM_DLH_ABI_VERSION << 32) | KVM_DLH_F_* bits; always > 0.
 * RING_SETUP, RCX = guest-physical address, RDX = entries, RSI = 0
 *           -> ring id >= 0. Replaces the calling vCPU's ring, if any. The host
 *           takes the tail it finds as the first position and fills its own
 *           cache line, cookie included.
 * RING_TEARDOWN, RCX = ring id
 *           -> 0. On return nothing from that ring is, or will be, worked on.
 * KICK, RCX = ring id
 *           -> 0. On return every entry that was visible in that ring before the
 *           call has been executed to its end and done says so.
 * CALL, RCX = operation | flags << 16, RDX = arg[0], RSI = arg[1]
 *           -> the status: it has been executed, to its end, before this vCPU is
 *           entered again.
 * CALLS, RCX = guest-physical address of an array of struct kvm_dlh_entry, 32-byte
 *        aligned, in one memslot; RDX = how many, 1 to KVM_DLH_MAX_CALLS; RSI = 0
 *           -> how many of them, from the first on, have been executed to their
 *           end, at least 1: call again for the rest. Each has its status; tags
 *           are not looked at.
 *
 * CALL and CALLS execute what is visible in the caller's own ring first.
 */
#define KVM_DLH_FN_FEATURES		0
#define KVM_DLH_FN_RING_SETUP		1
#define KVM_DLH_FN_RING_TEARDOWN	2
#define KVM_DLH_FN_KICK			3
#define KVM_DLH_FN_CALL			4
#define KVM_DLH_FN_CALLS		5

#define KVM_DLH_MAX_CALLS		512

/* Feature bits: the operations the host will execute at the time of the call. */
#define KVM_DLH_F_RING			(1U << 0)
#define KVM_DLH_F_CALL			(1U << 1)
#define KVM_DLH_F_FREE_PAGES		(1U << 2)
#define KVM_DLH_F_CALLS			(1U << 3)
#define KVM_DLH_F_TRACE			(1U << 4)
#define KVM_DLH_F_FREE_ANY		(1U << 5)	/* KVM_DLH_FREE_ANY is taken */
#define KVM_DLH_F_FREE_ASK		(1U << 6)	/* KVM_DLH_FREE_ASK is answered */
/* Bits that this header gives a meaning, or will; the others are for operations of other modules. */
#define KVM_DLH_F_RESERVED		0xffffU

/* Errors: returned in RAX, or as an entry's status, negated. */
#define KVM_DLH_EREFUSED	1101	/* SMM, nested, a VM of a special type; FREE_PAGES: assigned devices */
#define KVM_DLH_EFUNCTION	1102	/* unknown function */
#define KVM_DLH_EALIGN		1103	/* ring not page aligned, array not 32-byte aligned */
#define KVM_DLH_ESIZE		1104	/* ring size no power of two, or a size out of range */
#define KVM_DLH_EMEMORY		1105	/* range not inside one usable memslot */
#define KVM_DLH_ENORING		1106	/* no such ring */
#define KVM_DLH_EOPERATION	1107	/* unknown operation */
#define KVM_DLH_EARGUMENT	1108	/* reserved bits set or argument out of range */
#define KVM_DLH_EBUSY		1109	/* declined: the host has no room for it now */
#define KVM_DLH_ENOMEM		1110	/* the host could not allocate */
#define KVM_DLH_EGONE		1111	/* declined: the operation, its worker or the module went away */
#define KVM_DLH_EAGAIN		1112	/* the answer to KVM_DLH_FREE_ASK: report all that is free once more */

/* Operations. */
#define KVM_DLH_OP_NOP		0
/*
 * FREE_PAGES, arg[0] = guest-physical address, arg[1] = bytes; both multiples of
 * 4096. The guest promises not to touch the range until done has passed the
 * entry; then it may use it again: it reads as zeroes or as it was.
 *
 * Where the host shows the feature bit for it, arg[1] may have set
 *   FREE_ANY: the guest does not rely on that. The range may read as what the VMM
 *        gave this memory in the beginning as well (the file that it maps there).
 *   FREE_ASK, and nothing else in either argument: no page is named. The status is
 *        -KVM_DLH_EAGAIN if all that is free is to be reported once more, for
 *        the host does not know of it, or something has filled it; 0 if not.
 * Without the bit both are refused with -KVM_DLH_EARGUMENT.
 */
#define KVM_DLH_OP_FREE_PAGES	1
#define KVM_DLH_FREE_ANY	(1U << 0)
#define KVM_DLH_FREE_ASK	(1U << 1)
/*
 * TRACE, arg = 16 bytes of the guest's choice: emits the tracepoint
 * kvm_dlh:kvm_dlh_guest_event on the host, with VM, vCPU and guest time. The guest
 * stores the lower half of its time-stamp counter in the entry's time; the host
 * stores the status over it, 0 included.
 */
#define KVM_DLH_OP_TRACE	2

#define KVM_DLH_RING_MIN_ENTRIES	64
#define KVM_DLH_RING_MAX_ENTRIES	65536

/*
 * One deferred call. tag is cookie + position (mod 2^64); an entry whose tag is
 * anything else detaches the ring, so memory that was put to another use is never
 * executed. flags must be 0. status is written by the host, only where it is not 0;
 * the guest clears it when it fills the slot.
 */
struct kvm_dlh_entry {
	__u64 tag;
	__u16 op;
	__u16 flags;
	union {
		__s32 status;	/* host: the outcome */
		__u32 time;	/* guest: for KVM_DLH_OP_TRACE */
	};
	__u64 arg[2];
};

/* hdr.flags */
/*
 * Cleared when the ring is torn down or replaced. A ring that was detached for what was found in it, or
 * whose host went away, keeps the flag, for its memory may be anything by then: done stands still, and
 * KICK answers -KVM_DLH_ENORING or -KVM_ENOSYS.
 */
#define KVM_DLH_RING_ACTIVE	(1U << 0)

struct kvm_dlh_ring_hdr {
	/* Written by the guest only. */
	__u32 tail;
	__u32 guest_reserved0;
	__u64 dropped;		/* calls the guest could not place: ring full */
	__u64 guest_reserved[6];
	/* Written by the host only. */
	__u32 done;
	__u32 flags;
	__u64 cookie;		/* the secret of this registration; never 0 */
	__u64 declined;		/* entries the host did not execute */
	__u32 entries;
	__u32 version;
	__u64 host_reserved[4];
};

#endif /* _UAPI_LINUX_KVM_DLH_H */
