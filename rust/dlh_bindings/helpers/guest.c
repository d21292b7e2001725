// SPDX-License-Identifier: GPL-2.0
/* What the guest's driver needs: the hypercall instruction, and inline functions around it. */

#include <asm/msr.h>
#include <asm/tsc.h>
#include <linux/cc_platform.h>
#include <linux/cpuhotplug.h>
#include <linux/delay.h>
#include <linux/gfp.h>
#include <linux/jiffies.h>
#include <linux/kvm_para.h>
#include <linux/mm.h>
#include <linux/page_reporting.h>
#include <linux/reboot.h>
#include <linux/sched/stat.h>
#include <linux/scatterlist.h>
#include <linux/workqueue.h>

#include "../helpers.h"

/* Exported for drivers, and declared nowhere that they could include. */
extern unsigned int page_reporting_order;

/* VMCALL or VMMCALL, whichever this CPU has. */
s64 dlh_guest_hypercall(u64 function, u64 arg0, u64 arg1, u64 arg2)
{
	return kvm_hypercall4(KVM_HC_DLH, function, arg0, arg1, arg2);
}

s64 dlh_guest_unknown_hypercall(void)
{
	return kvm_hypercall0(0xffff);
}

bool dlh_guest_on_kvm(void)
{
	return kvm_para_available();
}

bool dlh_guest_memory_encrypted(void)
{
	return cc_platform_has(CC_ATTR_GUEST_MEM_ENCRYPT);
}

bool dlh_guest_free_pages_poisoned(void)
{
	return page_poisoning_enabled();
}

/* Then the kernel relies on finding zeroes in free pages. */
bool dlh_guest_free_pages_zeroed(void)
{
	return want_init_on_free();
}

void *dlh_guest_ring_alloc(size_t bytes)
{
	return alloc_pages_exact(bytes, GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN);
}

void dlh_guest_ring_free(void *ring, size_t bytes)
{
	free_pages_exact(ring, bytes);
}

u64 dlh_guest_ring_gpa(void *ring)
{
	return virt_to_phys(ring);
}

u32 dlh_guest_cpu_get(void)
{
	return get_cpu();
}

void dlh_guest_cpu_put(void)
{
	put_cpu();
}

/* A timer that may be a tick late is not the CPU's next one, and the tick finds it expired. */
void dlh_guest_sleep(u32 us, bool to_tick)
{
	usleep_range_idle(us, us + (to_tick ? TICK_USEC : us / 8));
}

bool dlh_guest_cpu_is_ours(void)
{
	return single_task_running();
}

u64 dlh_guest_tsc(void)
{
	return rdtsc_ordered();
}

u32 dlh_guest_tsc_khz(void)
{
	return tsc_khz;
}

int dlh_guest_cpuhp_create(const char *name,
			   int (*online)(unsigned int cpu, struct hlist_node *node),
			   int (*offline)(unsigned int cpu, struct hlist_node *node))
{
	return cpuhp_setup_state_multi(CPUHP_AP_ONLINE_DYN, name, online, offline);
}

int dlh_guest_cpuhp_add(int state, struct hlist_node *node)
{
	return cpuhp_state_add_instance(state, node);
}

void dlh_guest_cpuhp_remove(int state, struct hlist_node *node)
{
	cpuhp_state_remove_instance(state, node);
}

void dlh_guest_cpuhp_destroy(int state)
{
	cpuhp_remove_multi_state(state);
}

int dlh_guest_reboot_register(struct notifier_block *block)
{
	return register_reboot_notifier(block);
}

void dlh_guest_reboot_unregister(struct notifier_block *block)
{
	unregister_reboot_notifier(block);
}

static_assert(sizeof(struct page_reporting_dev_info) <= sizeof(struct dlh_guest_reporting));

static struct page_reporting_dev_info *reporting_info(struct dlh_guest_reporting *reporting)
{
	return (struct page_reporting_dev_info *)reporting->opaque;
}

/* reporting must be zeroed; report gets its address. */
int dlh_guest_reporting_register(struct dlh_guest_reporting *reporting, dlh_guest_report_fn report,
				 u32 order, u32 capacity)
{
	struct page_reporting_dev_info *info = reporting_info(reporting);

	info->report = report;
	info->order = order;
	info->capacity = capacity;
	return page_reporting_register(info);
}

/*
 * Has the page allocator come again after a report that fails, which it would not do by itself: blocks
 * that are put back tell nobody. Only within a report: there the registration is in force, and the one
 * who ends it waits for this work, and has it queued no more.
 *
 * Until then blocks that are freed do not make it come sooner. Freeing one for that would not do anyway:
 * small ones, and those of 2 MiB, go to lists of the CPU, and tell nobody either.
 */
void dlh_guest_reporting_again(struct page_reporting_dev_info *info, u32 ms)
{
	queue_delayed_work(system_freezable_wq, &info->work, msecs_to_jiffies(ms));
}

/* The same outside of a report: the caller sees to it that the registration is in force. */
void dlh_guest_reporting_soon(struct dlh_guest_reporting *reporting)
{
	dlh_guest_reporting_again(reporting_info(reporting), 0);
}

void dlh_guest_reporting_unregister(struct dlh_guest_reporting *reporting)
{
	page_reporting_unregister(reporting_info(reporting));
}

/* The order that is in force, or UINT_MAX where nothing has set one. */
u32 dlh_guest_reporting_order(void)
{
	return page_reporting_order;
}

void dlh_guest_reporting_set_order(u32 order)
{
	page_reporting_order = order;
}

u32 dlh_guest_pageblock_order(void)
{
	return pageblock_order;
}

u64 dlh_guest_sg_gpa(struct scatterlist *sg)
{
	return page_to_phys(sg_page(sg));
}

u64 dlh_guest_sg_bytes(const struct scatterlist *sg)
{
	return sg->length;
}

struct scatterlist *dlh_guest_sg_next(struct scatterlist *sg)
{
	return sg_next(sg);
}
