// SPDX-License-Identifier: GPL-2.0
/* Who a VMM is: its user, and its cgroup. */

#include <linux/cgroup.h>
#include <linux/cred.h>
#include <linux/mm_types.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/uidgid.h>
#include <linux/user_namespace.h>

#include "../helpers.h"

/* The effective user id of the current thread, as the first user namespace knows it. */
u32 dlh_current_uid(void)
{
	return from_kuid(&init_user_ns, current_euid());
}

/*
 * The cgroup that the memory of a process is charged to, the same for all of its threads: they may be in threaded
 * cgroups below it. NULL: there is none, as the process has ended, or the kernel does not charge memory. In an RCU
 * read section, for as long as that lasts.
 */
static struct cgroup *domain_cgroup(const struct mm_struct *mm)
{
#ifdef CONFIG_MEMCG
	struct task_struct *owner = rcu_dereference(mm->owner);

	return owner ? task_css_set(owner)->dom_cset->dfl_cgrp : NULL;
#else
	return NULL;
#endif
}

/* What distinguishes that cgroup from all others while it exists, and from those after it; 0: none. Any context. */
u64 dlh_cgroup_id(const struct mm_struct *mm)
{
	struct cgroup *cgroup;
	u64 id;

	rcu_read_lock();
	cgroup = domain_cgroup(mm);
	id = cgroup ? cgroup_id(cgroup) : 0;
	rcu_read_unlock();
	return id;
}

/* Its path from the root of the hierarchy on; returns how long it is, 0 where there is none or no room. Any context. */
size_t dlh_cgroup_path(const struct mm_struct *mm, char *path, size_t room)
{
	struct cgroup *cgroup;
	int bytes = 0;

	rcu_read_lock();
	cgroup = domain_cgroup(mm);
	if (cgroup)
		bytes = cgroup_path(cgroup, path, room);
	rcu_read_unlock();
	return bytes > 0 && bytes < room ? bytes : 0;
}
