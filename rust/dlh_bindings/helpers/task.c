// SPDX-License-Identifier: GPL-2.0
/* Work on the vCPU thread, before it enters the guest again or returns to user space. */

#include <linux/random.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/task_work.h>
#include <linux/wait_bit.h>

#include "../helpers.h"

static_assert(sizeof(struct dlh_task_work) == sizeof(struct callback_head));
static_assert(__alignof__(struct dlh_task_work) == __alignof__(struct callback_head));

int dlh_task_work_add_current(struct dlh_task_work *work, void (*func)(struct dlh_task_work *))
{
	struct callback_head *head = (struct callback_head *)work;

	init_task_work(head, (task_work_func_t)func);
	return task_work_add(current, head, TWA_RESUME);
}

/* Waits for every task that may still execute the last instructions of a function of ours. */
void dlh_synchronize_rcu_tasks(void)
{
	synchronize_rcu_tasks();
}

/* Lets others run; false if the current task is being killed. */
bool dlh_may_go_on(void)
{
	cond_resched();
	return !fatal_signal_pending(current);
}

/* Not ended by signals; the task may be frozen meanwhile. done must not sleep. */
void dlh_wait_until(void *object, bool (*done)(void *data), void *data)
{
	might_sleep();
	if (!done(data))
		___wait_var_event(object, done(data), (TASK_UNINTERRUPTIBLE | TASK_FREEZABLE), 0,
				  0, schedule());
}

void dlh_wake(void *object)
{
	/* What was changed is seen by those who have not begun to wait yet. */
	smp_mb();
	wake_up_var(object);
}

u64 dlh_random_u64(void)
{
	return get_random_u64();
}
