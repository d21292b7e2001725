// SPDX-License-Identifier: GPL-2.0
/* The tracepoints of kvm_dlh.ko. */

#include "../helpers.h"

#define CREATE_TRACE_POINTS
#include <trace/events/kvm_dlh.h>

bool dlh_trace_guest_event_enabled(void)
{
	return trace_kvm_dlh_guest_event_enabled();
}

void dlh_trace_guest_event(u64 vm, int pid, u32 vcpu, u64 tsc, const u64 payload[2])
{
	trace_kvm_dlh_guest_event(vm, pid, vcpu, tsc, payload);
}
