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
#include <linux/mmap_lock.h>
#include <linux/mmu_notifier.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "../helpers.h"

/* A page that is held for a reader; released after an RCU grace period. */
struct doorbell_view {
	struct rcu_head rcu;
	struct page *page;
};

struct doorbell {
	struct dlh_doorbell seen;
	struct mmu_interval_notifier notifier;
	unsigned long hva;
	/* Protects view and seen.word, which change together, and the sequence of the notifier. */
	spinlock_t lock;
	struct doorbell_view *view;
};

static struct doorbell *to_doorbell(struct dlh_doorbell *seen)
{
	return container_of(seen, struct doorbell, seen);
}

static void doorbell_view_free(struct rcu_head *rcu)
{
	struct doorbell_view *view = container_of(rcu, struct doorbell_view, rcu);

	put_page(view->page);
	kfree(view);
}

/* Shows readers a word of the view's page, or with NULL that there is none. bell->lock is held. */
static void doorbell_show(struct doorbell *bell, struct doorbell_view *view)
{
	struct doorbell_view *old = bell->view;

	bell->view = view;
	WRITE_ONCE(bell->seen.word,
		   view ? page_address(view->page) + offset_in_page(bell->hva) : NULL);
	if (old)
		call_rcu(&old->rcu, doorbell_view_free);
}

static bool doorbell_invalidate(struct mmu_interval_notifier *notifier,
				const struct mmu_notifier_range *range, unsigned long seq)
{
	struct doorbell *bell = container_of(notifier, struct doorbell, notifier);

	spin_lock(&bell->lock);
	mmu_interval_set_seq(notifier, seq);
	/* Lets go of the page, so that it can be moved. */
	doorbell_show(bell, NULL);
	spin_unlock(&bell->lock);
	return true;
}

static const struct mmu_interval_notifier_ops doorbell_ops = {
	.invalidate = doorbell_invalidate,
};

/*
 * Looks the page up anew. Where it is not there, or the mapping changes meanwhile, the doorbell stays stale.
 * On a thread of the VMM; may sleep: for memory of the kernel, and for the end of a change of the mapping that is
 * under way, which waits for no user. 0; -EFAULT: the page is not there, for writing; -ENOMEM.
 */
int dlh_doorbell_rearm(struct dlh_doorbell *seen)
{
	struct doorbell *bell = to_doorbell(seen);
	struct doorbell_view *view = kzalloc(sizeof(*view), GFP_KERNEL_ACCOUNT);
	unsigned long seq;
	bool changed;

	if (!view)
		return -ENOMEM;
	seq = mmu_interval_read_begin(&bell->notifier);
	if (get_user_pages_fast_only(bell->hva & PAGE_MASK, 1, FOLL_WRITE, &view->page) != 1) {
		kfree(view);
		return -EFAULT;
	}
	spin_lock(&bell->lock);
	changed = mmu_interval_read_retry(&bell->notifier, seq);
	if (!changed)
		doorbell_show(bell, view);
	spin_unlock(&bell->lock);
	if (changed) {
		put_page(view->page);
		kfree(view);
	}
	return 0;
}

/* How often the mmap lock is tried, a millisecond apart: who maps a user's files holds it for as long as these like. */
#define MMAP_TRIES	1000

/* As mmap_write_lock(), which has no such form. */
static bool mmap_try_write(struct mm_struct *mm)
{
	if (!down_write_trylock(&mm->mmap_lock))
		return false;
	mm_lock_seqcount_begin(mm);
	return true;
}

/*
 * The first notifier of an mm takes its mmap lock for writing; mmu_interval_notifier_insert() would wait for that
 * without end, and without heeding a SIGKILL.
 */
static int doorbell_insert(struct doorbell *bell)
{
	struct mm_struct *mm = current->mm;
	unsigned int tries;
	int err;

	for (tries = 0; !mmap_try_write(mm); tries++) {
		if (fatal_signal_pending(current))
			return -EINTR;
		if (tries == MMAP_TRIES)
			return -EBUSY;
		schedule_timeout_killable(msecs_to_jiffies(1));
	}
	err = mmu_interval_notifier_insert_locked(&bell->notifier, mm, bell->hva & PAGE_MASK,
						  PAGE_SIZE, &doorbell_ops);
	mmap_write_unlock(mm);
	return err;
}

/* A doorbell, stale at first. On a thread of the VMM; may sleep. -EINTR: it is being killed; -EBUSY: no mmap lock. */
struct dlh_doorbell *dlh_doorbell_create(unsigned long hva)
{
	struct doorbell *bell = kzalloc(sizeof(*bell), GFP_KERNEL_ACCOUNT);
	int err;

	if (!bell)
		return ERR_PTR(-ENOMEM);
	bell->hva = hva;
	spin_lock_init(&bell->lock);
	err = doorbell_insert(bell);
	if (err) {
		kfree(bell);
		return ERR_PTR(err);
	}
	return &bell->seen;
}

/* May sleep. No reader may run or start. */
void dlh_doorbell_destroy(struct dlh_doorbell *seen)
{
	struct doorbell *bell = to_doorbell(seen);

	mmu_interval_notifier_remove(&bell->notifier);
	spin_lock(&bell->lock);
	doorbell_show(bell, NULL);
	spin_unlock(&bell->lock);
	kfree(bell);
}

/* Waits for the pages of all doorbells that were destroyed: before the module goes. */
void dlh_doorbell_barrier(void)
{
	rcu_barrier();
}
