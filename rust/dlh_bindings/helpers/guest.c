// SPDX-License-Identifier: GPL-2.0
/* The guest's hypercall instruction: VMCALL or VMMCALL, whichever this CPU has. */

#include <linux/kvm_para.h>

#include "../helpers.h"

s64 dlh_guest_hypercall(u64 function, u64 arg0, u64 arg1, u64 arg2)
{
	return kvm_hypercall4(KVM_HC_DLH, function, arg0, arg1, arg2);
}

bool dlh_guest_on_kvm(void)
{
	return kvm_para_available();
}
