// SPDX-License-Identifier: GPL-2.0
/*
 * The probes on the exit path: kvm_exit, exported by kvm.ko, on every VM exit with interrupts off; and
 * kvm_userspace_exit, not exported, when KVM_RUN is about to return to the VMM.
 */

#include <linux/kvm_host.h>
#include <linux/module.h>
#include <linux/tracepoint.h>

#include "../helpers.h"

#define LEFT_NAME "kvm_userspace_exit"

extern struct tracepoint __tracepoint_kvm_exit;

/* The tracepoint's module is kvm.ko, which cannot go while we use its symbols. */
static struct tracepoint *left_found;

static void left_match(struct tracepoint *tp, void *data)
{
	if (!strcmp(tp->name, LEFT_NAME))
		left_found = tp;
}

static int left_search(struct notifier_block *nb, unsigned long event, void *data)
{
	const struct module *mod = ((struct tp_module *)data)->mod;
	unsigned int i;

	for (i = 0; event == MODULE_STATE_COMING && i < mod->num_tracepoints; i++)
		left_match(tracepoint_ptr_deref(&mod->tracepoints_ptrs[i]), NULL);
	return NOTIFY_OK;
}

/* Registering a notifier shows it every module that is loaded; it is not needed any longer then. */
struct tracepoint *dlh_tracepoint_left(void)
{
	struct notifier_block nb = { .notifier_call = left_search };

	left_found = NULL;
	for_each_kernel_tracepoint(left_match, NULL);
	if (!left_found && !register_tracepoint_module_notifier(&nb))
		unregister_tracepoint_module_notifier(&nb);
	return left_found;
}

int dlh_tracepoint_attach_exit(dlh_exit_fn probe, void *data)
{
	return tracepoint_probe_register(&__tracepoint_kvm_exit, probe, data);
}

void dlh_tracepoint_detach_exit(dlh_exit_fn probe, void *data)
{
	tracepoint_probe_unregister(&__tracepoint_kvm_exit, probe, data);
}

int dlh_tracepoint_attach_left(struct tracepoint *tp, dlh_left_fn probe, void *data)
{
	return tracepoint_probe_register(tp, probe, data);
}

void dlh_tracepoint_detach_left(struct tracepoint *tp, dlh_left_fn probe, void *data)
{
	tracepoint_probe_unregister(tp, probe, data);
}

void dlh_tracepoint_synchronize(void)
{
	tracepoint_synchronize_unregister();
}
