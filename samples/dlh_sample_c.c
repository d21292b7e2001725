// SPDX-License-Identifier: GPL-2.0
/*
 * A sample: an operation of kvm_dlh.ko that another module provides, in C.
 *
 * It adds up the numbers that guests send, for each VM on its own. That is nothing one needs a host for: what
 * there is to see is how a call can end, what is kept for a VM, and how the module goes while calls are under
 * way. dlh_sample_rust.rs is the same in Rust. The contract is in include/linux/kvm_dlh.h.
 *
 *	make samples KDIR=/path/to/kernel/build		(or make samples-env)
 *	insmod build/modules/kvm_dlh.ko
 *	insmod build/samples/dlh_sample_c.ko
 *	grep . /sys/kernel/debug/dlh_sample_c/<pid of the VMM>-<serial>/stats
 *
 * A module of your own is built out of tree as usual, with include/ on its path and
 * KBUILD_EXTRA_SYMBOLS=build/modules/Module.symvers. As long as it is loaded kvm_dlh.ko cannot go.
 *
 * The guest's side, in an entry of a ring or in a CALL:
 *
 *	op	32
 *	arg[0]	the number
 *	arg[1]	bits 0 to 31: how the call ends, enum ending below
 *		bits 32 to 63: milliseconds until then, for ENDS_LATE; otherwise 0
 *
 * This sample shows no feature bit; those outside of KVM_DLH_F_RESERVED are free (uapi/linux/kvm_dlh.h). A guest that calls a host
 * without this module gets -KVM_DLH_EOPERATION, and does without.
 *
 * To see it at work (make samples-env programs before; the last number is how the call ends):
 *
 *	tools/l1 -- bash -c 'insmod build/modules/kvm_dlh.ko; insmod build/samples/dlh_sample_c.ko
 *		timeout 5 build/bin/dlh-vmm flood 32 7 0 & sleep 4
 *		grep -r . /sys/kernel/debug/kvm_dlh --include operations'
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/debugfs.h>
#include <linux/jiffies.h>
#include <linux/kvm_dlh.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

/* 3 to KVM_DLH_MAX_OPS - 1, and agreed on with the guests: nobody hands numbers out. */
#define NUMBER		32

/*
 * A vCPU does not return to its VMM, and a VM does not end, before its calls have ended: keep this short. (Here it is
 * long, for tests on slow machines.)
 */
#define MOST_MS		60000

/* A guest must not have the host keep as much as it likes. */
#define MOST_WAITING	256

/* How a call ends. Each is something a real operation does. */
enum ending {
	ENDS_AT_ONCE,	/* execute() returns the status */
	ENDS_EARLY,	/* the call is completed, say by another thread, before execute() has returned */
	ENDS_LATE,	/* the call is pending until a work completes it */
	ENDS_REFUSED,	/* execute() returns an error */
};

/* What is kept for one VM: the context of the interface. */
struct account {
	spinlock_t lock;
	u64 calls;
	u64 sum;
	u64 digest;		/* tells in which order the numbers came */
	unsigned int waiting;
	struct list_head late;	/* struct late_call, waiting of them */
	struct delayed_work work;
	struct dentry *dir;
};

/* A call that has been accepted and not been completed. */
struct late_call {
	struct list_head node;
	struct kvm_dlh_token token;
	u64 number;
	unsigned long due;	/* in jiffies */
};

static struct dentry *module_dir;
static atomic_t next_serial;

/* The caller holds the lock. */
static void add(struct account *account, u64 number)
{
	account->calls++;
	account->sum += number;
	account->digest = account->digest * 31 + number;
}

/* Has the work run when the first of the waiting calls is due. The caller holds the lock. */
static void schedule_late(struct account *account)
{
	unsigned long now = jiffies, wait = ULONG_MAX;
	const struct late_call *call;

	list_for_each_entry(call, &account->late, node)
		wait = min(wait, time_after(call->due, now) ? call->due - now : 0);
	if (wait != ULONG_MAX)
		mod_delayed_work(system_dfl_wq, &account->work, wait);
}

static void finish_late(struct work_struct *work)
{
	struct account *account = container_of(to_delayed_work(work), struct account, work);
	struct late_call *call, *next;
	LIST_HEAD(due);

	spin_lock(&account->lock);
	list_for_each_entry_safe(call, next, &account->late, node) {
		if (time_after(call->due, jiffies))
			continue;
		list_move_tail(&call->node, &due);
		account->waiting--;
		add(account, call->number);
	}
	schedule_late(account);
	spin_unlock(&account->lock);

	/* Completing takes mutexes. When it has returned the guest may have seen the end of the call. */
	list_for_each_entry_safe(call, next, &due, node) {
		kvm_dlh_complete(call->token, 0);
		kfree(call);
	}
}

/* Accepts a call that ends later, or says why not. */
static int accept_late(struct account *account, u64 number, unsigned long ms,
		       struct kvm_dlh_token token)
{
	/* Charged to the VMM, on one of whose threads this is. */
	struct late_call *call = kmalloc(sizeof(*call), GFP_KERNEL_ACCOUNT);
	bool room;

	if (!call)
		return -KVM_DLH_ENOMEM;
	*call = (struct late_call) {
		.token = token,
		.number = number,
		.due = jiffies + msecs_to_jiffies(ms),
	};
	spin_lock(&account->lock);
	room = account->waiting < MOST_WAITING;
	if (room) {
		list_add_tail(&call->node, &account->late);
		account->waiting++;
		schedule_late(account);
	}
	spin_unlock(&account->lock);
	if (!room) {
		kfree(call);
		return -KVM_DLH_EBUSY;
	}
	/* From here on the call is the work's, and may have ended already. */
	return KVM_DLH_PENDING;
}

/*
 * One call. Several vCPUs of a VM may be in here at once. The arguments are the guest's: whatever is not
 * checked here, the guest decides.
 */
static int sample_execute(void *context, struct kvm *kvm, const u64 *arg,
			  struct kvm_dlh_token token)
{
	struct account *account = context;
	u64 number = arg[0];
	u32 ending = lower_32_bits(arg[1]), ms = upper_32_bits(arg[1]);

	if (ms > (ending == ENDS_LATE ? MOST_MS : 0))
		return -KVM_DLH_EARGUMENT;

	switch (ending) {
	case ENDS_AT_ONCE:
	case ENDS_EARLY:
		spin_lock(&account->lock);
		add(account, number);
		spin_unlock(&account->lock);
		if (ending == ENDS_AT_ONCE)
			return 0;
		/* A token that has been completed always goes with KVM_DLH_PENDING. */
		kvm_dlh_complete(token, 0);
		return KVM_DLH_PENDING;
	case ENDS_LATE:
		return accept_late(account, number, ms, token);
	case ENDS_REFUSED:
		return -KVM_DLH_EBUSY;
	default:
		return -KVM_DLH_EARGUMENT;
	}
}

static int stats_show(struct seq_file *file, void *unused)
{
	struct account *account = file->private;
	u64 calls, sum, digest;
	unsigned int waiting;

	spin_lock(&account->lock);
	calls = account->calls;
	sum = account->sum;
	digest = account->digest;
	waiting = account->waiting;
	spin_unlock(&account->lock);
	seq_printf(file, "calls %llu\nsum %llu\ndigest %llu\nwaiting %u\n",
		   calls, sum, digest, waiting);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(stats);

/* The first call in a VM. A context is never NULL. */
static int sample_attach(const struct kvm_dlh_ops *ops, struct kvm *kvm, void **context)
{
	struct account *account = kzalloc(sizeof(*account), GFP_KERNEL_ACCOUNT);
	char name[32];

	if (!account)
		return -ENOMEM;
	spin_lock_init(&account->lock);
	INIT_LIST_HEAD(&account->late);
	INIT_DELAYED_WORK(&account->work, finish_late);
	/* Without debugfs nothing is shown, and nothing else changes. */
	snprintf(name, sizeof(name), "%d-%u", task_tgid_nr(current),
		 (u32)atomic_fetch_inc(&next_serial));
	account->dir = debugfs_create_dir(name, module_dir);
	debugfs_create_file("stats", 0400, account->dir, account, &stats_fops);
	*context = account;
	return 0;
}

/*
 * The VM has ended, or the module goes. Nothing executes any more, so nothing is added to the list: the work
 * is stopped, and what it had not come to is declined. Those calls are waited for by vCPUs.
 */
static void sample_detach(void *context)
{
	struct account *account = context;
	struct late_call *call, *next;

	cancel_delayed_work_sync(&account->work);
	list_for_each_entry_safe(call, next, &account->late, node) {
		kvm_dlh_complete(call->token, -KVM_DLH_EGONE);
		kfree(call);
	}
	debugfs_remove(account->dir);
	kfree(account);
}

static const struct kvm_dlh_ops sample_ops = {
	.version = KVM_DLH_OPS_VERSION,
	.number = NUMBER,
	.owner = THIS_MODULE,
	.attach = sample_attach,
	.detach = sample_detach,
	.execute = sample_execute,
};

static int __init sample_init(void)
{
	int err;

	module_dir = debugfs_create_dir(KBUILD_MODNAME, NULL);
	/* Last: from here on the callbacks are called. */
	err = kvm_dlh_register_ops(&sample_ops);
	if (err) {
		pr_err("operation %d cannot be registered: %d\n", NUMBER, err);
		debugfs_remove(module_dir);
	}
	return err;
}

static void __exit sample_exit(void)
{
	/* First: detaches every VM. When it has returned nothing of this module runs, or is going to. */
	kvm_dlh_unregister_ops(&sample_ops);
	debugfs_remove(module_dir);
}

module_init(sample_init);
module_exit(sample_exit);
MODULE_AUTHOR("The kvm-dlh developers");
MODULE_DESCRIPTION("A sample operation of kvm_dlh.ko, in C");
MODULE_LICENSE("GPL");
