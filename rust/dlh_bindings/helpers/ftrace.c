// SPDX-License-Identifier: GPL-2.0
/* Attaching an ftrace hook to one function of KVM, and taking it off. */

#include <linux/ftrace.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/sched.h>

#include "ftrace.h"

/*
 * The function's address, by a kprobe that is never armed: a name is looked up in an index there. To give
 * ftrace the name instead has it compare all functions of the kernel, 50,000 of them, after looking up the
 * name of each. Only kvm.ko is searched: others may have functions of the same name.
 */
static int kvm_function(const char *function, unsigned long *address)
{
	struct kprobe probe = { .flags = KPROBE_FLAG_DISABLED };
	char name[KSYM_NAME_LEN];
	int err;

	snprintf(name, sizeof(name), "%s%s", IS_BUILTIN(CONFIG_KVM_X86) ? "" : "kvm:", function);
	probe.symbol_name = name;
	err = register_kprobe(&probe);
	if (err)
		return err;
	*address = (unsigned long)probe.addr;
	unregister_kprobe(&probe);
	return 0;
}

/*
 * ftrace has found the kernel's code other than it left it, and has given itself up (ftrace_kill()). The
 * hooked function may go on calling us until the machine is booted again, so our code must not go: this does
 * not return. No lock is held; the task counts as idle.
 */
static void __noreturn stay(int err)
{
	pr_err("%s: ftrace has failed (%d) and may go on calling this module, which stays until the next boot\n",
	       THIS_MODULE->name, err);
	for (;;) {
		set_current_state(TASK_IDLE);
		schedule();
	}
}

/*
 * -ENOENT: there is no such function; -EBUSY: another hook changes where it leads, or ftrace is switched
 * off; others: it cannot be traced. FTRACE_OPS_FL_PERMANENT: where sysctl kernel.ftrace_enabled still works
 * it is refused while the hook is there, which would miss the end of VMs. May sleep.
 */
int dlh_ftrace_hook(struct ftrace_ops *ops, const char *function)
{
	unsigned long address;
	int err = kvm_function(function, &address);

	if (err)
		return err;
	ops->flags |= FTRACE_OPS_FL_PERMANENT;
	err = ftrace_set_filter_ip(ops, address, 0, 1);
	if (err)
		return err;
	err = register_ftrace_function(ops);
	/* It was well a moment ago. */
	if (err == -ENODEV)
		stay(err);
	if (err)
		ftrace_free_filter(ops);
	return err;
}

/* On return nobody is inside the callback, unless it sleeps. May sleep; for ever, see stay(). */
void dlh_ftrace_unhook(struct ftrace_ops *ops)
{
	int err = unregister_ftrace_function(ops);

	if (err)
		stay(err);
	ftrace_free_filter(ops);
}
