// SPDX-License-Identifier: GPL-2.0
/*
 * For 59-waits.sh: an operation whose calls stay pending until somebody says so, first come first served.
 */

#include <linux/kvm_dlh.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/spinlock.h>

#define MOST_KEPT	64

static DEFINE_SPINLOCK(kept_lock);
static struct kvm_dlh_token kept_calls[MOST_KEPT];
static unsigned int kept;
module_param(kept, uint, 0444);
MODULE_PARM_DESC(kept, "Calls that are pending, to be read");

static unsigned int taken;
module_param(taken, uint, 0444);
MODULE_PARM_DESC(taken, "Calls that have been made, to be read");

static int status;
module_param(status, int, 0644);
MODULE_PARM_DESC(status, "What they are completed with");

/* Completes the first of the calls that are pending; false if there is none. */
static bool release_first(int answer)
{
	struct kvm_dlh_token first;

	spin_lock(&kept_lock);
	if (!kept) {
		spin_unlock(&kept_lock);
		return false;
	}
	first = kept_calls[0];
	kept--;
	memmove(kept_calls, kept_calls + 1, kept * sizeof(kept_calls[0]));
	spin_unlock(&kept_lock);
	kvm_dlh_complete(first, answer);
	return true;
}

static int release_set(const char *value, const struct kernel_param *param)
{
	unsigned int count;
	int err = kstrtouint(value, 0, &count);

	if (err)
		return err;
	while (count-- && release_first(status))
		;
	return 0;
}

static const struct kernel_param_ops release_ops = {
	.set = release_set,
};
module_param_cb(release, &release_ops, NULL, 0200);
MODULE_PARM_DESC(release, "Writing completes so many of them");

static int kept_attach(const struct kvm_dlh_ops *ops, struct kvm *kvm, void **context)
{
	*context = &kept;
	return 0;
}

static void kept_detach(void *context)
{
	while (release_first(-KVM_DLH_EGONE))
		;
}

static int kept_execute(void *context, struct kvm *kvm, const u64 *arg,
			struct kvm_dlh_token token)
{
	int answer = -KVM_DLH_EBUSY;

	spin_lock(&kept_lock);
	if (kept < MOST_KEPT) {
		kept_calls[kept++] = token;
		taken++;
		answer = KVM_DLH_PENDING;
	}
	spin_unlock(&kept_lock);
	return answer;
}

static const struct kvm_dlh_ops kept_ops = {
	.version = KVM_DLH_OPS_VERSION,
	.number = KVM_DLH_MAX_OPS - 2,
	.owner = THIS_MODULE,
	.attach = kept_attach,
	.detach = kept_detach,
	.execute = kept_execute,
};

static int __init kept_init(void)
{
	return kvm_dlh_register_ops(&kept_ops);
}

static void __exit kept_exit(void)
{
	kvm_dlh_unregister_ops(&kept_ops);
}

module_init(kept_init);
module_exit(kept_exit);
MODULE_DESCRIPTION("An operation of kvm_dlh.ko that keeps its calls, for a test");
MODULE_LICENSE("GPL");
