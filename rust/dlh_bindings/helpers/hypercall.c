// SPDX-License-Identifier: GPL-2.0
/*
 * The hypercall exit: an ftrace hook that sends our hypercall, and only ours, to another function.
 *
 * KVM calls ____kvm_emulate_hypercall(vcpu, cpl, complete) for a hypercall that is neither Hyper-V's
 * nor Xen's; a positive return value makes the caller pass run->hypercall.ret to the guest and skip
 * the instruction (arch/x86/kvm/x86.c).
 */

#include <linux/ftrace.h>
#include <linux/kvm_host.h>

#include "../helpers.h"
#include "ftrace.h"

#ifdef DLH_FAULT_MISSING_HOOK
#define HYPERCALL_SYMBOL "____kvm_emulate_hypercall_is_missing"
#else
#define HYPERCALL_SYMBOL "____kvm_emulate_hypercall"
#endif

static dlh_hypercall_fn hypercall_entry;

/*
 * Outside 64-bit mode KVM looks at the lower halves of the registers only. Whether a guest in long mode
 * runs 32-bit code is not visible here: such a caller's upper halves count.
 */
static u64 register_mask(const struct kvm_vcpu *vcpu)
{
	return vcpu->arch.efer & EFER_LMA ? ~0ULL : ~0U;
}

/* Callers that are not at CPL 0 are left to KVM, which answers -KVM_EPERM. */
static void notrace hypercall_exit(unsigned long ip, unsigned long parent_ip,
				   struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	const struct kvm_vcpu *vcpu = (void *)ftrace_regs_get_argument(fregs, 0);
	int cpl = ftrace_regs_get_argument(fregs, 1);

	if ((vcpu->arch.regs[VCPU_REGS_RAX] & register_mask(vcpu)) == KVM_HC_DLH && !cpl)
		ftrace_regs_set_instruction_pointer(fregs, (unsigned long)hypercall_entry);
}

static struct ftrace_ops hypercall_ops = {
	.func = hypercall_exit,
	.flags = FTRACE_OPS_FL_IPMODIFY,
};

int dlh_hypercall_hook(dlh_hypercall_fn entry)
{
	hypercall_entry = entry;
	return dlh_ftrace_hook(&hypercall_ops, HYPERCALL_SYMBOL);
}

void dlh_hypercall_unhook(void)
{
	dlh_ftrace_unhook(&hypercall_ops);
}

const char *dlh_hypercall_symbol(void)
{
	return HYPERCALL_SYMBOL;
}

void dlh_hypercall_read(const struct kvm_vcpu *vcpu, struct dlh_hypercall *call)
{
	const unsigned long *regs = vcpu->arch.regs;
	u64 mask = register_mask(vcpu);

	call->function = regs[VCPU_REGS_RBX] & mask;
	call->arg[0] = regs[VCPU_REGS_RCX] & mask;
	call->arg[1] = regs[VCPU_REGS_RDX] & mask;
	call->arg[2] = regs[VCPU_REGS_RSI] & mask;
}

void dlh_hypercall_return(struct kvm_vcpu *vcpu, s64 result)
{
	++vcpu->stat.hypercalls;
	vcpu->run->hypercall.ret = result;
}
