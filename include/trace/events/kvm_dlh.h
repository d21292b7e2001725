/* SPDX-License-Identifier: GPL-2.0 */
/* The tracepoints of kvm_dlh.ko. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM kvm_dlh

#if !defined(_TRACE_KVM_DLH_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_KVM_DLH_H

#include <linux/tracepoint.h>

/*
 * An event of a guest (KVM_DLH_OP_TRACE), emitted when the host finds it; guest_tsc is the vCPU's
 * time-stamp counter at the time of the event itself; pid is the VMM's.
 */
TRACE_EVENT(kvm_dlh_guest_event,
	TP_PROTO(u64 vm, int pid, u32 vcpu, u64 guest_tsc, const u64 *payload),
	TP_ARGS(vm, pid, vcpu, guest_tsc, payload),
	TP_STRUCT__entry(
		__field(u64, vm)
		__field(int, pid)
		__field(u32, vcpu)
		__field(u64, guest_tsc)
		__array(u64, payload, 2)
	),
	TP_fast_assign(
		__entry->vm = vm;
		__entry->pid = pid;
		__entry->vcpu = vcpu;
		__entry->guest_tsc = guest_tsc;
		__entry->payload[0] = payload[0];
		__entry->payload[1] = payload[1];
	),
	TP_printk("vm %llu pid %d vcpu %u guest_tsc %llu payload 0x%016llx 0x%016llx",
		  __entry->vm, __entry->pid, __entry->vcpu, __entry->guest_tsc,
		  __entry->payload[0], __entry->payload[1])
);

#endif

#include <trace/define_trace.h>
