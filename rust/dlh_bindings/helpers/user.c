// SPDX-License-Identifier: GPL-2.0
/*
 * The VMM's memory: words, each in one access, which copy_from_user() may take apart; and bytes.
 *
 * No access takes a page fault: -EFAULT says that the memory is not there at this moment, or not for this
 * access. So locks may be held. dlh_fault_in(), which is called without them, asks for it.
 */

#include <linux/hugetlb.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include <linux/shmem_fs.h>
#include <linux/uaccess.h>

#include "../helpers.h"

#define get_user_word(value, address)						\
({										\
	const typeof(*(value)) __user *from = (const void __user *)(address);	\
	int err = -EFAULT;							\
										\
	pagefault_disable();							\
	if (user_read_access_begin(from, sizeof(*from))) {			\
		unsafe_get_user(*(value), from, fault);				\
		err = 0;							\
fault:										\
		user_read_access_end();						\
	}									\
	pagefault_enable();							\
	err;									\
})

#define put_user_word(value, address)						\
({										\
	typeof(value) __user *to = (void __user *)(address);			\
	int err = -EFAULT;							\
										\
	pagefault_disable();							\
	if (user_write_access_begin(to, sizeof(*to))) {				\
		unsafe_put_user(value, to, fault);				\
		err = 0;							\
fault:										\
		user_write_access_end();					\
	}									\
	pagefault_enable();							\
	err;									\
})

int dlh_get_user_u32(unsigned long address, u32 *value)
{
	return get_user_word(value, address);
}

int dlh_get_user_u64(unsigned long address, u64 *value)
{
	return get_user_word(value, address);
}

int dlh_put_user_u32(unsigned long address, u32 value)
{
	return put_user_word(value, address);
}

int dlh_put_user_u64(unsigned long address, u64 value)
{
	return put_user_word(value, address);
}

/* The words of a ring's header that a drain looks at; tail is read first, and what follows it later. */
int dlh_get_user_ring_words(unsigned long ring, struct dlh_ring_words *words)
{
	const struct kvm_dlh_ring_hdr __user *hdr = (const void __user *)ring;
	int err = -EFAULT;

	pagefault_disable();
	if (user_read_access_begin(hdr, sizeof(*hdr))) {
		unsafe_get_user(words->tail, &hdr->tail, fault);
		/* Pairs with the guest's barrier between filling a slot and moving tail. */
		smp_rmb();
		unsafe_get_user(words->done, &hdr->done, fault);
		unsafe_get_user(words->cookie, &hdr->cookie, fault);
		err = 0;
fault:
		user_read_access_end();
	}
	pagefault_enable();
	return err;
}

/*
 * copy_from_user() without its check of the kernel's side, which costs more than the copy: to must be
 * memory of at least that many bytes.
 */
int dlh_get_user_bytes(void *to, unsigned long address, size_t bytes)
{
	const void __user *from = (const void __user *)address;
	unsigned long left;

	if (!access_ok(from, bytes))
		return -EFAULT;
	barrier_nospec();
	pagefault_disable();
	left = raw_copy_from_user(to, from, bytes);
	pagefault_enable();
	return left ? -EFAULT : 0;
}

/*
 * Whether a fault at address needs no file of a file system that a user may serve (FUSE), who could take
 * for ever: the memory is anonymous, shmem's or hugetlbfs', or a page is mapped there already, and the fault is
 * about NUMA balancing or write protection. The caller holds the mmap lock.
 */
static bool may_fault(struct vm_area_struct *vma, unsigned long address, bool write)
{
	struct page *page;

	if (vma_is_anonymous(vma) || is_vm_hugetlb_page(vma))
		return true;
	if (vma->vm_file && shmem_mapping(vma->vm_file->f_mapping))
		return true;
	/* A file system may be asked before a page of its file is written, and wait. */
	if (write && vma->vm_ops && vma->vm_ops->page_mkwrite)
		return false;
	if (get_user_pages_remote(vma->vm_mm, address, 1, FOLL_NOFAULT, &page, NULL) != 1)
		return false;
	put_page(page);
	return true;
}

/*
 * Asks for the page of the VMM's memory at address, to be read or written, without waiting: neither for
 * locks of pages, nor for what is to be read from a disk, nor for userfaultfd, which is not even told. 0: it
 * is there, or was a moment ago; -EAGAIN: not yet, ask again later; -EFAULT: it cannot be had.
 *
 * On a thread with the VMM's mm, which keeps it; no locks.
 */
int dlh_fault_in(unsigned long address, bool write)
{
	/* A page that NUMA balancing has made inaccessible is to become accessible. */
	unsigned int flags = FOLL_NOWAIT | FOLL_HONOR_NUMA_FAULT | (write ? FOLL_WRITE : 0);
	struct mm_struct *mm = current->mm;
	struct vm_area_struct *vma;
	struct page *page;
	long found;

	/* Whoever changes mappings may be waiting for a user. */
	if (!mmap_read_trylock(mm))
		return -EAGAIN;
	vma = vma_lookup(mm, address);
	found = vma && may_fault(vma, address, write) ?
		get_user_pages_remote(mm, address, 1, flags, &page, NULL) : -EFAULT;
	mmap_read_unlock(mm);
	if (found > 0) {
		put_page(page);
		return 0;
	}
	return found == 0 || found == -EAGAIN || found == -EBUSY || found == -EINTR ? -EAGAIN : -EFAULT;
}
