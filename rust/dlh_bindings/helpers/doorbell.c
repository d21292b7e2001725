// SPDX-License-Identifier: GPL-2.0
/*
 * A doorbell: one 32-bit word of guest memory that can be read with interrupts off and any PKRU.
 *
 * It is a hint and nothing else: it says that looking properly, through the memslots and the page
 * tables of the VMM, is worth it. The page is held by a reference, so reading it is always safe; when
 * the VMM's mapping changes, the notifier marks the doorbell stale, and a stale doorbell always says
 * "look". The word is never written through it.
 */

#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/slab.h>

#include "../helpers.h"

/* A page that is held, and the word in it; released after an RCU grace period. */
struct doorbell_view {
	struct rcu_head rcu;
	struct page *page;
	const u32 *word;
};

struct dlh_doorbell {
	struct mmu_interval_notifier notifier;
	struct doorbell_view __rcu *view;
	unsigned long hva;
	bool stale;
};

static void doorbell_view_free(struct rcu_head *rcu)
{
	struct doorbell_view *view = container_of(rcu, struct doorbell_view, rcu);

	put_page(view->page);
	kfree(view);
}

static void doorbell_show(struct dlh_doorbell *bell, struct doorbell_view *view)
{
	struct doorbell_view *old = unrcu_pointer(xchg(&bell->view, RCU_INITIALIZER(view)));

	if (old)
		call_rcu(&old->rcu, doorbell_view_free);
}

static bool doorbell_invalidate(struct mmu_interval_notifier *notifier,
				const struct mmu_notifier_range *range, unsigned long seq)
{
	struct dlh_doorbell *bell = container_of(notifier, struct dlh_doorbell, notifier);

	mmu_interval_set_seq(notifier, seq);
	WRITE_ONCE(bell->stale, true);
	/* Lets go of the page, so that it can be moved. */
	doorbell_show(bell, NULL);
	return true;
}

static const struct mmu_interval_notifier_ops doorbell_ops = {
	.invalidate = doorbell_invalidate,
};

/*
 * Looks the page up anew. On a thread of the VMM; may sleep. Returns -EFAULT where the address is no
 * ordinary memory, and leaves the doorbell stale then.
 */
int dlh_doorbell_rearm(struct dlh_doorbell *bell)
{
	struct doorbell_view *view = kzalloc(sizeof(*view), GFP_KERNEL_ACCOUNT);
	unsigned long seq;

	if (!view)
		return -ENOMEM;
	for (;;) {
		seq = mmu_interval_read_begin(&bell->notifier);
		WRITE_ONCE(bell->stale, false);
		if (get_user_pages_fast(bell->hva & PAGE_MASK, 1, FOLL_WRITE, &view->page) != 1) {
			WRITE_ONCE(bell->stale, true);
			kfree(view);
			return -EFAULT;
		}
		/*
		 * An invalidation since read_begin has set stale, or we have just overwritten that; in
		 * both cases this sees it. A later one sets stale for good.
		 */
		if (!mmu_interval_read_retry(&bell->notifier, seq))
			break;
		put_page(view->page);
	}
	view->word = page_address(view->page) + offset_in_page(bell->hva);
	doorbell_show(bell, view);
	return 0;
}

struct dlh_doorbell *dlh_doorbell_create(unsigned long hva)
{
	struct dlh_doorbell *bell = kzalloc(sizeof(*bell), GFP_KERNEL_ACCOUNT);
	int err;

	if (!bell)
		return ERR_PTR(-ENOMEM);
	bell->hva = hva;
	bell->stale = true;
	err = mmu_interval_notifier_insert(&bell->notifier, current->mm, hva & PAGE_MASK,
					   PAGE_SIZE, &doorbell_ops);
	if (err) {
		kfree(bell);
		return ERR_PTR(err);
	}
	err = dlh_doorbell_rearm(bell);
	if (err) {
		dlh_doorbell_destroy(bell);
		return ERR_PTR(err);
	}
	return bell;
}

/* May sleep. No reader may run or start. */
void dlh_doorbell_destroy(struct dlh_doorbell *bell)
{
	mmu_interval_notifier_remove(&bell->notifier);
	doorbell_show(bell, NULL);
	kfree(bell);
}

/* Waits for the pages of all doorbells that were destroyed: before the module goes. */
void dlh_doorbell_barrier(void)
{
	rcu_barrier();
}

/* False: stale, look yourself. */
bool dlh_doorbell_read(const struct dlh_doorbell *bell, u32 *value)
{
	const struct doorbell_view *view;

	if (READ_ONCE(bell->stale))
		return false;
	rcu_read_lock();
	view = rcu_dereference(bell->view);
	if (view)
		*value = READ_ONCE(*view->word);
	rcu_read_unlock();
	return view;
}
