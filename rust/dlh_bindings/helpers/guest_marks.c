// SPDX-License-Identifier: GPL-2.0
/*
 * The page allocator's marks on free blocks that have been reported, and the driver's own work that takes
 * them off.
 *
 * A block keeps its mark until it is used, and is not reported meanwhile. Nothing of the allocator's takes
 * marks off blocks that stay free; so this does what the allocator does when it takes a block out of its list,
 * under the same lock, and leaves the block where it is.
 */

#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/pageblock-flags.h>
#include <linux/slab.h>
#include <linux/timer.h>
#include <linux/workqueue.h>

#include "../helpers.h"

/* Held while descriptors of pages are looked at. */
static DEFINE_MUTEX(marks_lock);
/* Memory is on its way out, and its descriptors may go with it. One block goes at a time. */
static bool going_offline;

static int marks_memory_changes(struct notifier_block *block, unsigned long action, void *data)
{
	switch (action) {
	case MEM_GOING_OFFLINE:
		mutex_lock(&marks_lock);
		going_offline = true;
		mutex_unlock(&marks_lock);
		break;
	/* From here on pfn_to_online_page() does not know it. */
	case MEM_OFFLINE:
	case MEM_CANCEL_OFFLINE:
		mutex_lock(&marks_lock);
		going_offline = false;
		mutex_unlock(&marks_lock);
		break;
	}
	return NOTIFY_OK;
}

static struct notifier_block marks_memory_block = {
	.notifier_call = marks_memory_changes,
};

/* One caller at a time, as there is one driver. */
int dlh_guest_marks_watch(void)
{
	return register_memory_notifier(&marks_memory_block);
}

void dlh_guest_marks_unwatch(void)
{
	unregister_memory_notifier(&marks_memory_block);
}

/* The frame after the last one of any node. */
u64 dlh_guest_marks_end(void)
{
	u64 end = 0;
	int nid;

	for_each_online_node(nid)
		end = max(end, (u64)pgdat_end_pfn(NODE_DATA(nid)));
	return end;
}

/*
 * Whether a block seems to have a mark. In a guest that was just restored the descriptors may have to come from a
 * disk or another host, each page of them with the first look: that should not happen with the lock held.
 * So all are looked at.
 */
static bool seems_marked(unsigned long first, unsigned long end)
{
	unsigned long pfn;
	bool found = false;

	for (pfn = first; pfn < end; pfn++) {
		struct page *page = pfn_to_page(pfn);

		found |= PageBuddy(page) && PageReported(page);
	}
	return found;
}

/*
 * Only a block that is on a list of the zone whose lock is held is sure to be a block, and to have an order;
 * of other pages nothing but that they are none is used. A block that began before first is not found, and was
 * dealt with.
 */
static u32 unmark_locked(struct zone *zone, unsigned long first, unsigned long end)
{
	unsigned long pfn = first;
	u32 unmarked = 0;

	while (pfn < end) {
		struct page *page = pfn_to_page(pfn);
		unsigned long order = 0;

		if (PageBuddy(page) && page_zone(page) == zone) {
			order = min_t(unsigned long, page_private(page), MAX_PAGE_ORDER);
			if (PageReported(page)) {
				__ClearPageReported(page);
				unmarked++;
			}
		}
		pfn += 1UL << order;
	}
	return unmarked;
}

/*
 * Takes the marks off the blocks of one pageblock, which begins at pfn; *unmarked says off how many. Returns
 * the frame to go on with: pfn itself while memory is on its way out. May sleep.
 */
u64 dlh_guest_unmark(u64 pfn, u32 *unmarked)
{
	u64 next = pageblock_end_pfn(pfn);
	struct page *page;
	struct zone *zone;

	*unmarked = 0;
	mutex_lock(&marks_lock);
	if (going_offline) {
		next = pfn;
	} else if (!online_section_nr(pfn_to_section_nr(pfn))) {
		next = section_nr_to_pfn(pfn_to_section_nr(pfn) + 1);
	} else {
		page = pfn_to_online_page(pfn);
		if (page && seems_marked(pfn, next)) {
			zone = page_zone(page);
			spin_lock_irq(&zone->lock);
			*unmarked = unmark_locked(zone, pfn, next);
			spin_unlock_irq(&zone->lock);
		}
	}
	mutex_unlock(&marks_lock);
	return next;
}

/* Work that comes again after as many milliseconds as it says. */
struct dlh_guest_rounds {
	struct delayed_work work;
	u32 (*round)(void *data);
	void *data;
};

static void rounds_work(struct work_struct *work)
{
	struct dlh_guest_rounds *rounds =
		container_of(to_delayed_work(work), struct dlh_guest_rounds, work);
	unsigned long delay = msecs_to_jiffies(rounds->round(rounds->data));

	/* A CPU that sleeps is woken once for all that is due in that second. */
	if (delay >= HZ)
		delay = round_jiffies_relative(delay);
	queue_delayed_work(system_freezable_wq, &rounds->work, delay);
}

/* NULL: no memory. */
struct dlh_guest_rounds *dlh_guest_rounds_start(u32 (*round)(void *data), void *data, u32 ms)
{
	struct dlh_guest_rounds *rounds = kzalloc(sizeof(*rounds), GFP_KERNEL);

	if (!rounds)
		return NULL;
	rounds->round = round;
	rounds->data = data;
	INIT_DELAYED_WORK(&rounds->work, rounds_work);
	queue_delayed_work(system_freezable_wq, &rounds->work, msecs_to_jiffies(ms));
	return rounds;
}

/* Waits for the end of a round that is under way. */
void dlh_guest_rounds_stop(struct dlh_guest_rounds *rounds)
{
	cancel_delayed_work_sync(&rounds->work);
	kfree(rounds);
}
