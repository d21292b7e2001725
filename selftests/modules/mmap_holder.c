// SPDX-License-Identifier: GPL-2.0
/*
 * For the subject `held` of dlh-vmm: keeps the mmap lock of a process for writing, as an mmap() does whose file system
 * in user space does not answer. `echo PID >/sys/module/mmap_holder/parameters/hold`, and 0 to let go.
 */

#include <linux/completion.h>
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/mmap_lock.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>

static DEFINE_MUTEX(changes);
static DECLARE_COMPLETION(held);
static struct task_struct *holder;
static int hold;

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

static int begin(int number)
{
	struct task_struct *task, *thread;
	struct mm_struct *mm;
	struct pid *pid = find_get_pid(number);

	task = get_pid_task(pid, PIDTYPE_PID);
	put_pid(pid);
	if (!task)
		return -ESRCH;
	mm = get_task_mm(task);
	put_task_struct(task);
	if (!mm)
		return -ESRCH;
	thread = kthread_run(holder_thread, mm, "mmap_holder");
	if (IS_ERR(thread)) {
		mmput(mm);
		return PTR_ERR(thread);
	}
	wait_for_completion(&held);
	holder = thread;
	return 0;
}

static void end(void)
{
	if (holder)
		kthread_stop(holder);
	holder = NULL;
}

static int hold_set(const char *value, const struct kernel_param *param)
{
	int number, error;

	error = kstrtoint(value, 0, &number);
	if (error)
		return error;
	mutex_lock(&changes);
	end();
	if (number)
		error = begin(number);
	hold = error ? 0 : number;
	mutex_unlock(&changes);
	return error;
}

static const struct kernel_param_ops hold_ops = {
	.set = hold_set,
	.get = param_get_int,
};
module_param_cb(hold, &hold_ops, &hold, 0600);
MODULE_PARM_DESC(hold, "The process whose mmap lock is kept, or 0");

static int __init holder_init(void)
{
	return 0;
}

static void __exit holder_exit(void)
{
	end();
}

module_init(holder_init);
module_exit(holder_exit);
MODULE_DESCRIPTION("Keeps the mmap lock of a process, for a test");
MODULE_LICENSE("GPL");
