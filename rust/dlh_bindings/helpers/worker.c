// SPDX-License-Identifier: GPL-2.0
/*
 * A kernel thread that works for one VM, from time to time in the address space of its VMM.
 *
 * It is not a thread of the VMM: whoever may stop or freeze that could make everybody wait who stops this
 * one. It has no reference to the address space that would keep it (mm_users): with the last of those goes
 * the tearing down, which closes mappings of files that may have to wait for a user's FUSE server, say. So it
 * does as KVM does: it hears of the end by an MMU notifier, before anything is torn down, and lets go first.
 */

#include <linux/completion.h>
#include <linux/freezer.h>
#include <linux/hrtimer.h>
#include <linux/kthread.h>
#include <linux/kvm_host.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/mmu_context.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "../helpers.h"

struct dlh_worker {
	struct task_struct *task;
	struct mm_struct *mm;
	struct mmu_notifier notifier;
	/* Held while the thread has the address space: the end of that waits for it. */
	struct mutex inside;
	/* The address space has ended, or is about to. Set under inside. */
	bool gone;
	struct completion begun;
	int error;
	bool (*is_due)(void *data);
	void (*work)(void *data, struct dlh_worker *worker);
	void *data;
};

/* The last user of the address space has gone, or the worker is being taken apart. */
static void worker_release(struct mmu_notifier *notifier, struct mm_struct *mm)
{
	struct dlh_worker *worker = container_of(notifier, struct dlh_worker, notifier);

	WRITE_ONCE(worker->gone, true);
	/* Whoever is inside sees that, or is waited for; whoever comes sees it. */
	mutex_lock(&worker->inside);
	mutex_unlock(&worker->inside);
}

static const struct mmu_notifier_ops worker_notifier = {
	.release = worker_release,
};

/*
 * How often something is tried that others keep from being done, DLH_WORKER_NAP_US apart. mmap()s of a
 * user's file systems hold the mmap lock for as long as these like.
 */
#define NOTIFIER_TRIES 250

/* As mmap_write_lock(), which has no such form. */
static bool mmap_try_write(struct mm_struct *mm)
{
	if (!down_write_trylock(&mm->mmap_lock))
		return false;
	mm_lock_seqcount_begin(mm);
	return true;
}

/* By the thread: it has no signals, for which this gives up. Whoever creates it keeps the address space meanwhile. */
static int worker_listen(struct dlh_worker *worker)
{
	unsigned int tries;
	int error;

	for (tries = 0; !mmap_try_write(worker->mm); tries++) {
		if (tries == NOTIFIER_TRIES)
			return -EBUSY;
		dlh_worker_nap();
	}
	error = __mmu_notifier_register(&worker->notifier, worker->mm);
	mmap_write_unlock(worker->mm);
	return error;
}

/* What it allocates is the VMM's, if it is accounted. */
static void worker_work(struct dlh_worker *worker)
{
	struct mem_cgroup *memcg = get_mem_cgroup_from_mm(worker->mm);
	struct mem_cgroup *before = set_active_memcg(memcg);

	worker->work(worker->data, worker);
	set_active_memcg(before);
	mem_cgroup_put(memcg);
}

static int worker_thread(void *data)
{
	struct dlh_worker *worker = data;
	int error = worker_listen(worker);

	worker->error = error;
	complete(&worker->begun);
	if (!error)
		set_freezable();
	for (;;) {
		set_current_state(TASK_IDLE | TASK_FREEZABLE);
		if (kthread_should_stop())
			break;
		if (error || !worker->is_due(worker->data)) {
			schedule();
			continue;
		}
		__set_current_state(TASK_RUNNING);
		worker_work(worker);
		cond_resched_tasks_rcu_qs();
		kthread_freezable_should_stop(NULL);
	}
	__set_current_state(TASK_RUNNING);
	return 0;
}

/* On a thread of the VMM; may sleep, for a short time only. The thread is named after the module that this is in. */
struct dlh_worker *dlh_worker_start(struct kvm *kvm, bool (*is_due)(void *),
				    void (*work)(void *, struct dlh_worker *), void *data)
{
	struct dlh_worker *worker;
	struct task_struct *task;

	if (kvm->mm != current->mm)
		return ERR_PTR(-EINVAL);
	worker = kzalloc(sizeof(*worker), GFP_KERNEL_ACCOUNT);
	if (!worker)
		return ERR_PTR(-ENOMEM);
	worker->mm = kvm->mm;
	worker->notifier.ops = &worker_notifier;
	mutex_init(&worker->inside);
	init_completion(&worker->begun);
	worker->is_due = is_due;
	worker->work = work;
	worker->data = data;
	task = kthread_run(worker_thread, worker, "%s/%d", THIS_MODULE->name, kvm->userspace_pid);
	if (IS_ERR(task)) {
		kfree(worker);
		return ERR_CAST(task);
	}
	worker->task = task;
	wait_for_completion(&worker->begun);
	if (worker->error) {
		int error = worker->error;

		kthread_stop(task);
		kfree(worker);
		return ERR_PTR(error);
	}
	return worker;
}

/* Any context. */
void dlh_worker_wake(struct dlh_worker *worker)
{
	wake_up_process(worker->task);
}

/* On return the thread has ended. Waits for what it does at a time, see dlh_worker_may_go_on(). */
void dlh_worker_stop(struct dlh_worker *worker)
{
	kthread_stop(worker->task);
	mmu_notifier_unregister(&worker->notifier, worker->mm);
	kfree(worker);
}

/*
 * By the thread, holding nothing that others need: lets others run, RCU-tasks included, and the system be suspended. False if it is to
 * stop, or the address space has gone.
 */
bool dlh_worker_may_go_on(struct dlh_worker *worker)
{
	cond_resched_tasks_rcu_qs();
	return !kthread_freezable_should_stop(NULL) && !READ_ONCE(worker->gone);
}

/* By the thread: gets the address space, until dlh_worker_leave(); false if that has gone. */
bool dlh_worker_enter(struct dlh_worker *worker)
{
	mutex_lock(&worker->inside);
	if (READ_ONCE(worker->gone)) {
		mutex_unlock(&worker->inside);
		return false;
	}
	kthread_use_mm(worker->mm);
	return true;
}

void dlh_worker_leave(struct dlh_worker *worker)
{
	kthread_unuse_mm(worker->mm);
	mutex_unlock(&worker->inside);
}

/* By the thread, holding nothing that others need. Being stopped ends it. */
void dlh_worker_nap(void)
{
	ktime_t span = ns_to_ktime(DLH_WORKER_NAP_US * NSEC_PER_USEC);

	set_current_state(TASK_IDLE | TASK_FREEZABLE);
	if (!kthread_should_stop())
		schedule_hrtimeout_range(&span, 0, HRTIMER_MODE_REL);
	__set_current_state(TASK_RUNNING);
}

/*
 * CPU time of the current thread in nanoseconds, as last brought up to date by the scheduler: at the
 * last tick, or when it last began to run.
 */
u64 dlh_worker_cpu_ns(void)
{
	return READ_ONCE(current->se.sum_exec_runtime);
}
