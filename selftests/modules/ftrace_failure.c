// SPDX-License-Identifier: GPL-2.0
/*
 * For 14-ftrace-failure.py: has ftrace give itself up, as it does when it finds the kernel's code other than
 * it left it. There is no way to ask for that, so a kprobe sends a call of ours to the kernel's function.
 */

#include <linux/kprobes.h>
#include <linux/module.h>

static void *ftrace_kill_address;

static noinline void ftrace_failure_call(void)
{
	/* Not reached: see ftrace_failure_divert(). Without this the compiler drops the call. */
	barrier();
}

/* On return 1 the call goes on at the address set here, which returns to the caller. */
static int ftrace_failure_divert(struct kprobe *probe, struct pt_regs *regs)
{
	regs->ip = (unsigned long)ftrace_kill_address;
	return 1;
}

static int __init ftrace_failure_init(void)
{
	struct kprobe search = { .symbol_name = "ftrace_kill", .flags = KPROBE_FLAG_DISABLED };
	static struct kprobe divert = {
		.addr = (kprobe_opcode_t *)ftrace_failure_call,
		.pre_handler = ftrace_failure_divert,
	};
	int err;

	err = register_kprobe(&search);
	if (err)
		return err;
	ftrace_kill_address = search.addr;
	unregister_kprobe(&search);
	err = register_kprobe(&divert);
	if (err)
		return err;
	ftrace_failure_call();
	unregister_kprobe(&divert);
	return 0;
}

/* No way back, and no way out. */
module_init(ftrace_failure_init);
MODULE_DESCRIPTION("Has ftrace give itself up, for a test");
MODULE_LICENSE("GPL");
