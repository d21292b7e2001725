// SPDX-License-Identifier: GPL-2.0
/* A thread of the VMM: its address space, its cgroups, its end. */

#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sched/vhost_task.h>

#include "../helpers.h"

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

/*
 * CPU time of the current thread in nanoseconds, as last brought up to date by the scheduler: at the
 * last tick, or when it last began to run.
 */
u64 dlh_worker_cpu_ns(void)
{
	return READ_ONCE(current->se.sum_exec_runtime);
}
