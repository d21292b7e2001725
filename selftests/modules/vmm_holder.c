// SPDX-License-Identifier: GPL-2.0
/*
 * For tests: keeps from going on what works for a VMM. Both parameters take the VMM's pid, and 0 to let go.
 *
 * mmap_lock: keeps its mmap lock for writing, as an mmap() does whose file system in user space does not answer.
 * worker: keeps ksm_bridge's worker in the midst of a piece of memory, as the notifier of another driver would that
 * waits for a device.
 */

#include <linux/completion.h>
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/mmap_lock.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>
#include <linux/string.h>
#include <linux/wait.h>

static DEFINE_MUTEX(changes);

static struct mm_struct *mm_of(int number)
{
	struct pid *pid = find_get_pid(number);
	struct task_struct *task = get_pid_task(pid, PIDTYPE_PID);
	struct mm_struct *mm;

	put_pid(pid);
	if (!task)
		return NULL;
	mm = get_task_mm(task);
	put_task_struct(task);
	return mm;
}

static DECLARE_COMPLETION(held);
static struct task_struct *holder;

static int holder_thread(void *data)
{
	struct mm_struct *mm = data;

	mmap_write_lock(mm);
	complete(&held);
	for (;;) {
		set_current_state(TASK_IDLE);
		if (kthread_should_stop())
			break;
		schedule();
	}
	__set_current_state(TASK_RUNNING);
	mmap_write_unlock(mm);
	mmput(mm);
	return 0;
}

static int hold_mmap_lock(struct mm_struct *mm)
{
	struct task_struct *thread = kthread_run(holder_thread, mm, "vmm_holder");

	if (IS_ERR(thread)) {
		mmput(mm);
		return PTR_ERR(thread);
	}
	wait_for_completion(&held);
	holder = thread;
	return 0;
}

static void let_mmap_lock_go(void)
{
	if (holder)
		kthread_stop(holder);
	holder = NULL;
}

static DECLARE_WAIT_QUEUE_HEAD(released);
static bool hold_workers;

static int worker_waits(struct mmu_notifier *notifier, const struct mmu_notifier_range *range)
{
	if (!strstarts(current->comm, "ksm_bridge/") || !mmu_notifier_range_blockable(range))
		return 0;
	wait_event_idle(released, !READ_ONCE(hold_workers));
	return 0;
}

static const struct mmu_notifier_ops worker_ops = {
	.invalidate_range_start = worker_waits,
};

static struct mmu_notifier notifier = { .ops = &worker_ops };
static struct mm_struct *watched;

static int hold_worker(struct mm_struct *mm)
{
	int error;

	WRITE_ONCE(hold_workers, true);
	error = mmu_notifier_register(&notifier, mm);
	if (!error) {
		mmgrab(mm);
		watched = mm;
	}
	mmput(mm);
	return error;
}

static void let_worker_go(void)
{
	WRITE_ONCE(hold_workers, false);
	wake_up_all(&released);
	if (watched) {
		mmu_notifier_unregister(&notifier, watched);
		mmdrop(watched);
	}
	watched = NULL;
}

struct holding {
	int (*begin)(struct mm_struct *mm);
	void (*end)(void);
	int pid;
};

static struct holding mmap_lock = { hold_mmap_lock, let_mmap_lock_go };
static struct holding worker = { hold_worker, let_worker_go };

static int holding_set(const char *value, const struct kernel_param *param)
{
	struct holding *holding = param->arg;
	struct mm_struct *mm;
	int pid, error;

	error = kstrtoint(value, 0, &pid);
	if (error)
		return error;
	mutex_lock(&changes);
	holding->end();
	holding->pid = 0;
	if (pid) {
		mm = mm_of(pid);
		error = mm ? holding->begin(mm) : -ESRCH;
	}
	if (!error)
		holding->pid = pid;
	mutex_unlock(&changes);
	return error;
}

static int holding_get(char *buffer, const struct kernel_param *param)
{
	struct holding *holding = param->arg;

	return sysfs_emit(buffer, "%d\n", holding->pid);
}

static const struct kernel_param_ops holding_ops = {
	.set = holding_set,
	.get = holding_get,
};
module_param_cb(mmap_lock, &holding_ops, &mmap_lock, 0600);
MODULE_PARM_DESC(mmap_lock, "The process whose mmap lock is kept, or 0");
module_param_cb(worker, &holding_ops, &worker, 0600);
MODULE_PARM_DESC(worker, "The VMM whose worker of ksm_bridge is kept, or 0");

static int __init holder_init(void)
{
	return 0;
}

static void __exit holder_exit(void)
{
	let_mmap_lock_go();
	let_worker_go();
}

module_init(holder_init);
module_exit(holder_exit);
MODULE_DESCRIPTION("Keeps what works for a VMM from going on, for tests");
MODULE_LICENSE("GPL");
