// SPDX-License-Identifier: GPL-2.0
/* Words of the VMM's memory, each in one access, which copy_from_user() may take apart; and bytes. */

#include <linux/uaccess.h>

#include "../helpers.h"

int dlh_get_user_u32(unsigned long address, u32 *value)
{
	return get_user(*value, (u32 __user *)address);
}

int dlh_get_user_u64(unsigned long address, u64 *value)
{
	return get_user(*value, (u64 __user *)address);
}

int dlh_put_user_u32(unsigned long address, u32 value)
{
	return put_user(value, (u32 __user *)address);
}

int dlh_put_user_u64(unsigned long address, u64 value)
{
	return put_user(value, (u64 __user *)address);
}

/* The words of a ring's header that a drain looks at; tail is read first, and what follows it later. */
int dlh_get_user_ring_words(unsigned long ring, struct dlh_ring_words *words)
{
	const struct kvm_dlh_ring_hdr __user *hdr = (const void __user *)ring;

	might_fault();
	if (!user_read_access_begin(hdr, sizeof(*hdr)))
		return -EFAULT;
	unsafe_get_user(words->tail, &hdr->tail, fault);
	/* Pairs with the guest's barrier between filling a slot and moving tail. */
	smp_rmb();
	unsafe_get_user(words->done, &hdr->done, fault);
	unsafe_get_user(words->cookie, &hdr->cookie, fault);
	user_read_access_end();
	return 0;
fault:
	user_read_access_end();
	return -EFAULT;
}

/*
 * copy_from_user() without its check of the kernel's side, which costs more than the copy: to must be
 * memory of at least that many bytes.
 */
int dlh_get_user_bytes(void *to, unsigned long address, size_t bytes)
{
	const void __user *from = (const void __user *)address;

	might_fault();
	if (!access_ok(from, bytes))
		return -EFAULT;
	barrier_nospec();
	return raw_copy_from_user(to, from, bytes) ? -EFAULT : 0;
}
