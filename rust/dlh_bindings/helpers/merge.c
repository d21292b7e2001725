// SPDX-License-Identifier: GPL-2.0
/* What may be released of a VMM's memory, and the thread of the VMM that releases it. */

#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched/vhost_task.h>
#include <linux/userfaultfd_k.h>

#include "../helpers.h"

/* The caller holds the mmap lock. */
enum dlh_vma dlh_vma_judge(struct vm_area_struct *vma)
{
	if (!vma_is_anonymous(vma) ||
	    vma->vm_flags & (VM_SHARED | VM_MAYSHARE | VM_HUGETLB | VM_PFNMAP | VM_MIXEDMAP | VM_IO))
		return DLH_VMA_KIND;
	if (!(vma->vm_flags & VM_WRITE))
		return DLH_VMA_KIND;
	if (vma->vm_flags & VM_LOCKED)
		return DLH_VMA_LOCKED;
	if (userfaultfd_armed(vma))
		return DLH_VMA_UFFD;
	return DLH_VMA_USABLE;
}

/* How far it is from address, where nothing is mapped, to the next VMA. The caller holds the mmap lock. */
unsigned long dlh_unmapped_bytes(struct mm_struct *mm, unsigned long address)
{
	const struct vm_area_struct *vma = find_vma(mm, address);

	return (vma ? vma->vm_start : TASK_SIZE_MAX) - address;
}

/* Set by the first pin in this mm and never cleared: without it no page of it is pinned. */
bool dlh_mm_has_pinned(struct mm_struct *mm)
{
	return mm_flags_test(MMF_HAS_PINNED, mm);
}

/*
 * How many pages from start on, at most pages, are not pinned; the one after them is, or may be. Only
 * pages that are present are looked at, nothing is faulted in: a pinned page is never unmapped for
 * migration or swap. The caller holds the mmap lock of current->mm. Not the fast variant: that one
 * fails on pages that are present, for a PROT_NONE of NUMA balancing or a concurrent change.
 */
unsigned long dlh_unpinned_pages(unsigned long start, unsigned long pages)
{
	unsigned long i;

	for (i = 0; i < pages; i++) {
		struct page *page;
		bool pinned;
		long found = get_user_pages(start + i * PAGE_SIZE, 1, FOLL_NOFAULT, &page);

		if (found == -EFAULT)
			continue;
		if (found != 1)
			break;
		pinned = folio_maybe_dma_pinned(page_folio(page));
		put_page(page);
		if (pinned)
			break;
	}
	return i;
}

/* The thread is named after the module that this is linked into. */
struct vhost_task *dlh_worker_create(bool (*work)(void *), void (*killed)(void *), void *data)
{
	return vhost_task_create(work, killed, data, THIS_MODULE->name);
}

void dlh_worker_start(struct vhost_task *task)
{
	vhost_task_start(task);
}

/* The thread is about to work: it must not be in the state it sleeps in. */
void dlh_worker_running(void)
{
	__set_current_state(TASK_RUNNING);
}

void dlh_worker_wake(struct vhost_task *task)
{
	vhost_task_wake(task);
}

void dlh_worker_stop(struct vhost_task *task)
{
	vhost_task_stop(task);
}
