// SPDX-License-Identifier: GPL-2.0
/* Work on the vCPU thread, before it enters the guest again or returns to user space. */

#include <linux/hrtimer.h>
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

/*
 * Lets others run; false if the current task is being killed. Where the kernel preempts by itself cond_resched() alone
 * does nothing, and whoever waits for RCU-tasks (to take a tracer off) would wait for all that is done here.
 */
bool dlh_may_go_on(void)
{
	cond_resched_tasks_rcu_qs();
	return !fatal_signal_pending(current);
}

/*
 * Waits until done, which must not sleep, says so; the task may be frozen meanwhile. Killable: false if somebody
 * kills the task before that. Otherwise nothing ends it, and it does not count as hung.
 */
bool dlh_wait_until(void *object, bool (*done)(void *data), void *data, bool killable)
{
	might_sleep();
	if (done(data))
		return true;
	if (killable)
		return !___wait_var_event(object, done(data), (TASK_KILLABLE | TASK_FREEZABLE), 0,
					  0, schedule());
	(void)___wait_var_event(object, done(data), (TASK_IDLE | TASK_FREEZABLE), 0, 0, schedule());
	return true;
}

/* Sleeps for about that long; false if somebody kills the task. */
bool dlh_sleep_killable(u32 us)
{
	ktime_t time = us_to_ktime(us);

	__set_current_state(TASK_KILLABLE);
	schedule_hrtimeout_range(&time, us * NSEC_PER_USEC / 4, HRTIMER_MODE_REL);
	return !fatal_signal_pending(current);
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
