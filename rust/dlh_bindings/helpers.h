/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the Rust crates call of the kernel beyond the kernel crate's own bindings: wrappers around
 * inline functions and macros, one file below helpers/ for each C concept. bindgen reads this header.
 * No policy lives here: a helper does what one line of C would.
 */
#ifndef DLH_BINDINGS_HELPERS_H
#define DLH_BINDINGS_HELPERS_H

#include <linux/types.h>
#include <linux/kvm_dlh.h>

struct callback_head;
struct dentry;
struct file;
struct kobject;
struct kvm;
struct kvm_vcpu;
struct mm_struct;
struct notifier_block;
struct page;
struct page_reporting_dev_info;
struct scatterlist;
struct task_struct;
struct tracepoint;
struct vm_area_struct;
struct workqueue_struct;

/* helpers/kvm.c: struct kvm and struct kvm_vcpu. */
int dlh_vcpu_idx(const struct kvm_vcpu *vcpu);
int dlh_vcpu_id(const struct kvm_vcpu *vcpu);
bool dlh_vcpu_in_run(const struct kvm_vcpu *vcpu);
bool dlh_vcpu_runs_here(const struct kvm_vcpu *vcpu);
bool dlh_vcpu_will_block(const struct kvm_vcpu *vcpu);
bool dlh_vcpu_is_refused(const struct kvm_vcpu *vcpu);
void dlh_vcpu_srcu_unlock(struct kvm_vcpu *vcpu);
void dlh_vcpu_srcu_lock(struct kvm_vcpu *vcpu);
u64 dlh_vcpu_guest_tsc(const struct kvm_vcpu *vcpu);
int dlh_kvm_pid(const struct kvm *kvm);
#define DLH_KVM_NAME 32U
void dlh_kvm_name(const struct kvm *kvm, char name[DLH_KVM_NAME]);
bool dlh_kvm_is_current(const struct kvm *kvm);
int dlh_kvm_read_lock(struct kvm *kvm);
void dlh_kvm_read_unlock(struct kvm *kvm, int idx);
bool dlh_kvm_get_safe(struct kvm *kvm);
void dlh_kvm_put(struct kvm *kvm);

enum dlh_slot {
	DLH_SLOT_USABLE,
	DLH_SLOT_NONE,
	DLH_SLOT_READONLY,
	DLH_SLOT_PRIVATE,
};
enum dlh_slot dlh_kvm_translate(struct kvm *kvm, u64 gfn, unsigned long *hva, u64 *pages);
u64 dlh_kvm_slot_start(struct kvm *kvm, u64 gfn);
bool dlh_kvm_logs_writes(struct kvm *kvm, u64 gfn);
void dlh_kvm_mark_dirty(struct kvm *kvm, u64 gfn);
bool dlh_kvm_has_assigned_devices(struct kvm *kvm);

/* helpers/debugfs.c: files in debugfs that hold the module while they are open. */
struct dlh_text;
#define DLH_SINK_BYTES 16U
/* One of the three is set. They may sleep, but whoever removes the file waits for them. */
struct dlh_file {
	/* Makes the text, by dlh_text_append(). 0 or an errno. */
	int (*show)(const void *data, struct dlh_text *text);
	/* How many bytes there are from offset on, at most room. */
	ssize_t (*read)(const void *data, u64 offset, void *to, size_t room);
	/* At most DLH_SINK_BYTES. 0 or an errno. */
	int (*write)(const void *data, const void *bytes, size_t length);
	const void *data;
};
int dlh_text_append(struct dlh_text *text, const char *bytes, size_t length);
struct dentry *dlh_debugfs_dir(const char *name, struct dentry *parent);
struct dentry *dlh_debugfs_file(const char *name, struct dentry *parent, const struct dlh_file *file);
void dlh_debugfs_remove(struct dentry *entry);
bool dlh_debugfs_has(struct dentry *parent, const char *name);

/* helpers/params/: the parameters of each module. All but allow never change once its init runs. */
u32 dlh_param_budget_entries(void);
u32 dlh_param_budget_us(void);
u32 dlh_param_max_defer_us(void);
u32 dlh_param_worker_cpu_percent(void);
bool dlh_param_merge_share(void);
u32 dlh_param_ring_entries(void);
int dlh_param_order(void);
u32 dlh_param_batch(void);
u32 dlh_param_pace_mib(void);
u32 dlh_param_timeout_ms(void);
#define DLH_ALLOW_DEFAULT "all"
u32 dlh_allow_generation(void);
const char *dlh_allow_text(size_t *bytes);
struct dlh_allow_bad {
	/* What is meant of the value. */
	const char *word;
	size_t word_bytes;
	/* Why it is no good; NULL: it is good. Both are not terminated. */
	const char *why;
	size_t why_bytes;
};
/* In Rust (rust/kvm_control): checks a value, and returns its length without a newline at its end. */
size_t dlh_allow_check(const char *value, size_t bytes, struct dlh_allow_bad *bad);

/* helpers/user.c: the VMM's memory, as far as it is there; words of it each in one access. */
struct dlh_ring_words {
	u64 cookie;
	u32 tail;
	u32 done;
};
int dlh_get_user_ring_words(unsigned long ring, struct dlh_ring_words *words);
int dlh_get_user_bytes(void *to, unsigned long address, size_t bytes);
int dlh_get_user_u32(unsigned long address, u32 *value);
int dlh_get_user_u64(unsigned long address, u64 *value);
int dlh_put_user_u32(unsigned long address, u32 value);
int dlh_put_user_u64(unsigned long address, u64 value);
int dlh_fault_in(unsigned long address, bool write);

/* helpers/hypercall.c: the ftrace hook on the hypercall exit. */
struct dlh_hypercall {
	u64 function;
	u64 arg[3];
};
typedef int (*dlh_hypercall_fn)(struct kvm_vcpu *vcpu, int cpl, void *complete);
int dlh_hypercall_hook(dlh_hypercall_fn entry);
void dlh_hypercall_unhook(void);
const char *dlh_hypercall_symbol(void);
void dlh_hypercall_read(const struct kvm_vcpu *vcpu, struct dlh_hypercall *call);
void dlh_hypercall_return(struct kvm_vcpu *vcpu, s64 result);

/* helpers/lifetime.c: the ftrace hooks on the beginning and the end of a VM. */
typedef void (*dlh_lifetime_fn)(struct kvm *kvm);
int dlh_create_hook(dlh_lifetime_fn entry);
void dlh_create_unhook(void);
const char *dlh_create_symbol(void);
int dlh_destroy_hook(dlh_lifetime_fn entry);
void dlh_destroy_unhook(void);
const char *dlh_destroy_symbol(void);

/* helpers/tracepoint.c: the probes on the exit path. */
typedef void (*dlh_exit_fn)(void *data, struct kvm_vcpu *vcpu, u32 isa);
typedef void (*dlh_left_fn)(void *data, u32 reason, int error);
struct tracepoint *dlh_tracepoint_left(void);
int dlh_tracepoint_attach_exit(dlh_exit_fn probe, void *data);
void dlh_tracepoint_detach_exit(dlh_exit_fn probe, void *data);
int dlh_tracepoint_attach_left(struct tracepoint *tp, dlh_left_fn probe, void *data);
void dlh_tracepoint_detach_left(struct tracepoint *tp, dlh_left_fn probe, void *data);
void dlh_tracepoint_synchronize(void);

/* helpers/trace.c: the tracepoints. */
bool dlh_trace_guest_event_enabled(void);
void dlh_trace_guest_event(u64 vm, int pid, u32 vcpu, u64 tsc, const u64 payload[2]);

/* helpers/task.c: work on the vCPU thread, and what concerns tasks. */
struct dlh_task_work {
	void *opaque[2];
};
int dlh_task_work_add_current(struct dlh_task_work *work, void (*func)(struct dlh_task_work *));
void dlh_synchronize_rcu_tasks(void);
bool dlh_may_go_on(void);
bool dlh_wait_until(void *object, bool (*done)(void *data), void *data, bool killable);
bool dlh_sleep_killable(u32 us);
void dlh_wake(void *object);
u64 dlh_random_u64(void);

/* helpers/work.c: works of the module's own. */
struct workqueue_struct *dlh_workqueue_create(void);
void dlh_workqueue_flush(struct workqueue_struct *queue);
void dlh_workqueue_destroy(struct workqueue_struct *queue);
struct dlh_later;
struct dlh_later *dlh_later_create(void (*func)(void *data), void *data);
void dlh_later_queue(struct dlh_later *later, struct workqueue_struct *queue, u32 ms);
void dlh_later_cancel(struct dlh_later *later);
void dlh_later_destroy(struct dlh_later *later);

/* helpers/ticker.c: a thread that looks periodically, and what it does to those it finds. */
struct dlh_ticker;
struct dlh_ticker *dlh_ticker_start(bool (*tick)(void *data), void *data, u64 period_ns);
void dlh_ticker_wake(struct dlh_ticker *ticker);
void dlh_ticker_stop(struct dlh_ticker *ticker);
u32 dlh_tick_period_us(void);
void dlh_task_kick(struct task_struct *task, bool all);

/* helpers/doorbell.c: a word of guest memory that can be read with interrupts off. */
struct dlh_doorbell {
	/* NULL: stale. Read once, inside an RCU read section. */
	const u32 *word;
};
struct dlh_doorbell *dlh_doorbell_create(unsigned long hva);
void dlh_doorbell_destroy(struct dlh_doorbell *bell);
void dlh_doorbell_barrier(void);
int dlh_doorbell_rearm(struct dlh_doorbell *bell);

/* helpers/faults.c: the probe on page faults of guests. */
typedef void (*dlh_fault_fn)(void *data, struct kvm_vcpu *vcpu, u64 address, u64 error);
int dlh_tracepoint_attach_fault(dlh_fault_fn probe, void *data);
void dlh_tracepoint_detach_fault(dlh_fault_fn probe, void *data);
bool dlh_fault_writes_gpa(const struct kvm_vcpu *vcpu, u64 error);

/* helpers/merge.c: what may be released, and how. */
enum dlh_vma {
	DLH_VMA_ANONYMOUS,
	DLH_VMA_SHARED_FILE,
	DLH_VMA_PRIVATE_FILE,
	DLH_VMA_PRIVATE_OTHER,
	DLH_VMA_KIND,
	DLH_VMA_PFNMAP,
	DLH_VMA_LOCKED,
	DLH_VMA_UFFD,
};
struct mm_struct *dlh_mmap_trylock(void);
void dlh_mmap_unlock(struct mm_struct *mm);
struct vm_area_struct *dlh_vma_lookup(struct mm_struct *mm, unsigned long address);
unsigned long dlh_vma_end(const struct vm_area_struct *vma);
enum dlh_vma dlh_vma_judge(struct vm_area_struct *vma);
unsigned long dlh_unmapped_bytes(struct mm_struct *mm, unsigned long address);
bool dlh_mm_has_pinned(struct mm_struct *mm);
unsigned long dlh_vma_page_bytes(const struct vm_area_struct *vma);
void dlh_vma_zap(struct vm_area_struct *vma, unsigned long start, unsigned long bytes);
unsigned long dlh_pinned_front(struct mm_struct *mm, unsigned long start, unsigned long bytes,
			       unsigned long page_bytes, bool *pinned);
void dlh_map_zero_page(unsigned long start, unsigned long bytes);
struct file *dlh_vma_file(const struct vm_area_struct *vma, unsigned long address, u64 *offset);
bool dlh_file_is_shmem(const struct file *file);
struct file *dlh_file_get(struct file *file);
void dlh_file_put(struct file *file);
unsigned long dlh_file_zero_bytes(struct file *file, u64 offset, unsigned long bytes);
unsigned long dlh_file_loose_bytes(struct file *file, u64 offset, unsigned long bytes, bool *locked);
int dlh_shmem_punch(struct file *file, u64 offset, unsigned long bytes);
bool dlh_file_is_busy(struct file *file);
int dlh_file_punch(struct file *file, u64 offset, unsigned long bytes);
u64 dlh_mm_in_shared_file(struct mm_struct *mm, unsigned long address, u64 pages);

/* helpers/worker.c: a thread that works for one VM. */
#define DLH_WORKER_NAP_US 1000U
struct dlh_worker;
struct dlh_worker *dlh_worker_start(struct kvm *kvm, bool (*is_due)(void *data),
				    void (*work)(void *data, struct dlh_worker *worker), void *data);
void dlh_worker_wake(struct dlh_worker *worker);
void dlh_worker_stop(struct dlh_worker *worker);
bool dlh_worker_may_go_on(struct dlh_worker *worker);
bool dlh_worker_enter(struct dlh_worker *worker);
void dlh_worker_leave(struct dlh_worker *worker);
void dlh_worker_nap(void);
u64 dlh_worker_cpu_ns(void);

/* helpers/vmm.c: who a VMM is. */
u32 dlh_current_uid(void);
u64 dlh_cgroup_id(const struct mm_struct *mm);
size_t dlh_cgroup_path(const struct mm_struct *mm, char *path, size_t room);

/* helpers/control.c: what root says of a VM, in sysfs. */
enum dlh_choice {
	DLH_CHOICE_DEFAULT,
	DLH_CHOICE_YES,
	DLH_CHOICE_NO,
};
/* What root says goes here. */
struct dlh_said {
	/* One of enum dlh_choice. */
	u32 *choice;
	/* The guest is to report all that is free once more. Must not wait. */
	void (*again)(const void *data);
	const void *data;
};
struct dlh_control;
struct kobject *dlh_control_root_create(void);
void dlh_control_root_remove(struct kobject *root);
struct dlh_control *dlh_control_add(struct kobject *root, const char *name, int pid,
				    const struct dlh_said *said);
void dlh_control_remove(struct dlh_control *control);

/* helpers/guest.c: what the guest's driver needs. */
s64 dlh_guest_hypercall(u64 function, u64 arg0, u64 arg1, u64 arg2);
s64 dlh_guest_unknown_hypercall(void);
bool dlh_guest_on_kvm(void);
bool dlh_guest_memory_encrypted(void);
bool dlh_guest_free_pages_poisoned(void);
bool dlh_guest_free_pages_zeroed(void);
void *dlh_guest_ring_alloc(size_t bytes);
void dlh_guest_ring_free(void *ring, size_t bytes);
u64 dlh_guest_ring_gpa(void *ring);
u32 dlh_guest_cpu_get(void);
void dlh_guest_cpu_put(void);
void dlh_guest_sleep(u32 us, bool to_tick);
bool dlh_guest_cpu_is_ours(void);
u64 dlh_guest_tsc(void);
u32 dlh_guest_tsc_khz(void);
int dlh_guest_cpuhp_create(const char *name,
			   int (*online)(unsigned int cpu, struct hlist_node *node),
			   int (*offline)(unsigned int cpu, struct hlist_node *node));
int dlh_guest_cpuhp_add(int state, struct hlist_node *node);
void dlh_guest_cpuhp_remove(int state, struct hlist_node *node);
void dlh_guest_cpuhp_destroy(int state);
int dlh_guest_reboot_register(struct notifier_block *block);
void dlh_guest_reboot_unregister(struct notifier_block *block);
struct dlh_guest_reporting {
	void *opaque[24];
};
typedef int (*dlh_guest_report_fn)(struct page_reporting_dev_info *info, struct scatterlist *list,
				   unsigned int count);
int dlh_guest_reporting_register(struct dlh_guest_reporting *reporting, dlh_guest_report_fn report,
				 u32 order, u32 capacity);
void dlh_guest_reporting_again(struct page_reporting_dev_info *info, u32 ms);
void dlh_guest_reporting_unregister(struct dlh_guest_reporting *reporting);
u32 dlh_guest_reporting_order(void);
void dlh_guest_reporting_set_order(u32 order);
u32 dlh_guest_pageblock_order(void);
u64 dlh_guest_sg_gpa(struct scatterlist *sg);
u64 dlh_guest_sg_bytes(const struct scatterlist *sg);
struct scatterlist *dlh_guest_sg_next(struct scatterlist *sg);
void dlh_guest_reporting_soon(struct dlh_guest_reporting *reporting);

/* helpers/guest_marks.c: blocks that have been reported, and work that is done from time to time. */
int dlh_guest_marks_watch(void);
void dlh_guest_marks_unwatch(void);
u64 dlh_guest_marks_end(void);
u64 dlh_guest_unmark(u64 pfn, u32 *unmarked);
struct dlh_guest_rounds;
struct dlh_guest_rounds *dlh_guest_rounds_start(u32 (*round)(void *data), void *data, u32 ms);
void dlh_guest_rounds_stop(struct dlh_guest_rounds *rounds);

#endif
