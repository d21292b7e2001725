// SPDX-License-Identifier: GPL-2.0
/*
 * For 47-guest-params.py and 51-operations.sh: an operation that can be everything an operation should not be.
 */

#include <linux/kvm_dlh.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>

static unsigned int version = KVM_DLH_OPS_VERSION;
module_param(version, uint, 0444);
MODULE_PARM_DESC(version, "Version of the table");

static unsigned short number = KVM_DLH_MAX_OPS - 1;
module_param(number, ushort, 0444);
MODULE_PARM_DESC(number, "Number of the operation");

static unsigned int feature;
module_param(feature, uint, 0444);
MODULE_PARM_DESC(feature, "Feature bits");

static bool no_attach, no_detach, no_execute;
module_param(no_attach, bool, 0444);
MODULE_PARM_DESC(no_attach, "Leave attach() out");
module_param(no_detach, bool, 0444);
MODULE_PARM_DESC(no_detach, "Leave detach() out");
module_param(no_execute, bool, 0444);
MODULE_PARM_DESC(no_execute, "Leave execute() out");

static int attach_error;
module_param(attach_error, int, 0644);
MODULE_PARM_DESC(attach_error, "What attach() returns");

static bool no_context;
module_param(no_context, bool, 0644);
MODULE_PARM_DESC(no_context, "attach() succeeds without a context");

static int status;
module_param(status, int, 0644);
MODULE_PARM_DESC(status, "What execute() returns, KVM_DLH_PENDING excepted");

static bool by_token;
module_param(by_token, bool, 0644);
MODULE_PARM_DESC(by_token, "execute() hands the status to kvm_dlh_complete() instead");

/* Calls that are pending for as long as somebody says. */
#define MOST_HELD	256
static struct kvm_dlh_token held[MOST_HELD];
static unsigned int held_count;
static DEFINE_MUTEX(held_lock);
static bool hold;

static bool hold_call(struct kvm_dlh_token token)
{
	bool held_it = false;

	mutex_lock(&held_lock);
	if (hold && held_count < MOST_HELD) {
		held[held_count++] = token;
		held_it = true;
	}
	mutex_unlock(&held_lock);
	return held_it;
}

/* The last first, and one by one: completing takes locks that are held around execute(). */
static void complete_held(s32 how)
{
	struct kvm_dlh_token token;
	bool any;

	do {
		mutex_lock(&held_lock);
		any = held_count > 0;
		if (any)
			token = held[--held_count];
		mutex_unlock(&held_lock);
		if (any)
			kvm_dlh_complete(token, how);
	} while (any);
}

static int set_hold(const char *value, const struct kernel_param *param)
{
	int error;

	mutex_lock(&held_lock);
	error = param_set_bool(value, param);
	mutex_unlock(&held_lock);
	if (!error && !hold)
		complete_held(0);
	return error;
}

static const struct kernel_param_ops hold_ops = {
	.flags = KERNEL_PARAM_OPS_FL_NOARG,
	.set = set_hold,
	.get = param_get_bool,
};
module_param_cb(hold, &hold_ops, &hold, 0644);
MODULE_PARM_DESC(hold, "Calls stay pending, at most 256 of them; they end with 0 when this is set to 0");

static unsigned int attached, detached;
module_param(attached, uint, 0444);
MODULE_PARM_DESC(attached, "Calls of attach() that made a context, to be read");
module_param(detached, uint, 0444);
MODULE_PARM_DESC(detached, "Calls of detach(), to be read");

static int odd_attach(const struct kvm_dlh_ops *ops, struct kvm *kvm, void **context)
{
	if (attach_error)
		return attach_error;
	if (!no_context) {
		*context = &attached;
		attached++;
	}
	return 0;
}

static void odd_detach(void *context)
{
	WARN_ON(context != &attached);
	/* Of all VMs: a test that holds calls has one. */
	complete_held(-KVM_DLH_EGONE);
	detached++;
}

/* FREE_PAGES that names no page. */
static bool is_question(const u64 *arg)
{
	return number == KVM_DLH_OP_FREE_PAGES && !arg[0] && arg[1] == KVM_DLH_FREE_ASK;
}

static int odd_execute(void *context, struct kvm *kvm, const u64 *arg,
		       struct kvm_dlh_token token)
{
	int answer = status;

	WARN_ON(context != &attached);
	/* A driver asks before it reports: the question is answered, the reports are held. */
	if (!is_question(arg) && hold_call(token))
		return KVM_DLH_PENDING;
	if (!by_token)
		return answer == KVM_DLH_PENDING ? 0 : answer;
	kvm_dlh_complete(token, answer);
	return KVM_DLH_PENDING;
}

static struct kvm_dlh_ops odd_ops;

static int __init odd_init(void)
{
	odd_ops = (struct kvm_dlh_ops) {
		.version = version,
		.number = number,
		.feature = feature,
		.owner = THIS_MODULE,
		.attach = no_attach ? NULL : odd_attach,
		.detach = no_detach ? NULL : odd_detach,
		.execute = no_execute ? NULL : odd_execute,
	};
	return kvm_dlh_register_ops(&odd_ops);
}

static void __exit odd_exit(void)
{
	/* Of a table that is not registered this knows nothing. */
	static const struct kvm_dlh_ops stranger = { .number = KVM_DLH_MAX_OPS - 1 };

	kvm_dlh_unregister_ops(&stranger);
	kvm_dlh_unregister_ops(&odd_ops);
	kvm_dlh_unregister_ops(&odd_ops);
}

module_init(odd_init);
module_exit(odd_exit);
MODULE_DESCRIPTION("An odd operation of kvm_dlh.ko, for a test");
MODULE_LICENSE("GPL");
