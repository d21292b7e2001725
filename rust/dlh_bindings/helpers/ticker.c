// SPDX-License-Identifier: GPL-2.0
/*
 * A thread that looks at something again and again, as long as there is something to look at. It is no
 * timer, so that it runs where the host's administrator has kernel threads run, which is not on CPUs
 * that are kept for vCPUs.
 */

#include <linux/hrtimer.h>
#include <linux/jiffies.h>
#include <linux/kthread.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/tick.h>
#include <linux/wait.h>

#include "../helpers.h"

struct dlh_ticker {
	struct task_struct *task;
	struct wait_queue_head wait;
	bool (*tick)(void *data);
	void *data;
	u64 period_ns;
	bool active;
};

static int ticker_thread(void *data)
{
	struct dlh_ticker *ticker = data;

	while (!kthread_should_stop()) {
		ktime_t period = ns_to_ktime(ticker->period_ns);

		/* Whoever adds something after the look that did not find it sets this again. */
		WRITE_ONCE(ticker->active, false);
		smp_mb();
		if (ticker->tick(ticker->data))
			WRITE_ONCE(ticker->active, true);
		if (READ_ONCE(ticker->active)) {
			set_current_state(TASK_IDLE);
			if (!kthread_should_stop())
				schedule_hrtimeout_range(&period, ticker->period_ns / 8,
							 HRTIMER_MODE_REL);
			__set_current_state(TASK_RUNNING);
		} else {
			wait_event_idle(ticker->wait,
					READ_ONCE(ticker->active) || kthread_should_stop());
		}
	}
	return 0;
}

struct dlh_ticker *dlh_ticker_start(bool (*tick)(void *data), void *data, u64 period_ns)
{
	struct dlh_ticker *ticker = kzalloc(sizeof(*ticker), GFP_KERNEL);
	struct task_struct *task;

	if (!ticker)
		return ERR_PTR(-ENOMEM);
	init_waitqueue_head(&ticker->wait);
	ticker->tick = tick;
	ticker->data = data;
	ticker->period_ns = period_ns;
	task = kthread_run(ticker_thread, ticker, "kvm_dlh");
	if (IS_ERR(task)) {
		kfree(ticker);
		return ERR_CAST(task);
	}
	ticker->task = task;
	return ticker;
}

/* There is something to look at. Any context. */
void dlh_ticker_wake(struct dlh_ticker *ticker)
{
	/* Pairs with the barrier in ticker_thread(): what was added is seen, or this is. */
	smp_mb();
	if (!READ_ONCE(ticker->active)) {
		WRITE_ONCE(ticker->active, true);
		wake_up(&ticker->wait);
	}
}

/* On return the thread has ended. May sleep. */
void dlh_ticker_stop(struct dlh_ticker *ticker)
{
	kthread_stop(ticker->task);
	kfree(ticker);
}

/*
 * How often, in microseconds, the host's timer interrupt makes every vCPU exit that is in the guest; 0
 * if there are CPUs where it is stopped.
 */
u32 dlh_tick_period_us(void)
{
	return tick_nohz_full_enabled() ? 0 : USEC_PER_SEC / HZ;
}

/*
 * Makes a task, or all threads of its process, enter the kernel, if they are running, in the guest or
 * elsewhere. Any context.
 */
void dlh_task_kick(struct task_struct *task, bool all)
{
	struct task_struct *thread;

	if (!all) {
		kick_process(task);
		return;
	}
	rcu_read_lock();
	for_each_thread(task, thread)
		kick_process(thread);
	rcu_read_unlock();
}
