// SPDX-License-Identifier: GPL-2.0
/* A workqueue of the module's own, and a work that is done later. */

#include <linux/err.h>
#include <linux/jiffies.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/workqueue.h>

#include "../helpers.h"

/* Named after the module that this is linked into. Each work has a thread when those before it wait. */
struct workqueue_struct *dlh_workqueue_create(void)
{
	return alloc_workqueue("%s", WQ_UNBOUND, 0, THIS_MODULE->name);
}

/* Waits for all works that were queued before. May sleep. */
void dlh_workqueue_flush(struct workqueue_struct *queue)
{
	__flush_workqueue(queue);
}

void dlh_workqueue_destroy(struct workqueue_struct *queue)
{
	destroy_workqueue(queue);
}

struct dlh_later {
	struct delayed_work work;
	void (*func)(void *data);
	void *data;
};

static void later_run(struct work_struct *work)
{
	struct dlh_later *later = container_of(to_delayed_work(work), struct dlh_later, work);

	later->func(later->data);
}

struct dlh_later *dlh_later_create(void (*func)(void *data), void *data)
{
	struct dlh_later *later = kzalloc(sizeof(*later), GFP_KERNEL);

	if (!later)
		return ERR_PTR(-ENOMEM);
	INIT_DELAYED_WORK(&later->work, later_run);
	later->func = func;
	later->data = data;
	return later;
}

/* Done once, so much after the last call of this. */
void dlh_later_queue(struct dlh_later *later, struct workqueue_struct *queue, u32 ms)
{
	mod_delayed_work(queue, &later->work, msecs_to_jiffies(ms));
}

/* On return it is not being done, nor will it be until it is queued again. May sleep. */
void dlh_later_cancel(struct dlh_later *later)
{
	cancel_delayed_work_sync(&later->work);
}

/* It must have been cancelled. */
void dlh_later_destroy(struct dlh_later *later)
{
	kfree(later);
}
