// SPDX-License-Identifier: GPL-2.0
/*
 * What root says of a VM while it runs, and what tools ask about it: /sys/kernel/<module>/<VM>/, one value a
 * file.
 *
 * A file of sysfs that is open does not keep the module. It need not: the kobjects, and all that an open file
 * points to, belong to the kernel, and our functions and struct dlh_control are reached only while a file's
 * directory is held active, which its removal waits for. Therefore nothing here may wait: not for a VM, nor for
 * what removes the directory. The kernel copies to and from its user outside of these functions.
 */

#include <linux/err.h>
#include <linux/kernfs.h>
#include <linux/kobject.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/sysfs.h>

#include "../helpers.h"

/* The directory of one VM. Whoever has it owns what the pointers point to, too. */
struct dlh_control {
	struct kobject *kobj;
	struct dlh_said said;
	int pid;
	struct kobj_attribute allow;
	struct kobj_attribute again;
	struct kobj_attribute vmm_pid;
};

static const char * const choices[] = {
	[DLH_CHOICE_DEFAULT] = "default",
	[DLH_CHOICE_YES] = "yes",
	[DLH_CHOICE_NO] = "no",
};

static ssize_t allow_show(struct kobject *kobj, struct kobj_attribute *attr, char *buffer)
{
	const struct dlh_control *control = container_of(attr, struct dlh_control, allow);

	return sysfs_emit(buffer, "%s\n", choices[READ_ONCE(*control->said.choice)]);
}

static ssize_t allow_store(struct kobject *kobj, struct kobj_attribute *attr, const char *buffer, size_t bytes)
{
	const struct dlh_control *control = container_of(attr, struct dlh_control, allow);
	int choice = sysfs_match_string(choices, buffer);

	if (choice < 0)
		return choice;
	WRITE_ONCE(*control->said.choice, choice);
	return bytes;
}

static ssize_t again_store(struct kobject *kobj, struct kobj_attribute *attr, const char *buffer, size_t bytes)
{
	const struct dlh_control *control = container_of(attr, struct dlh_control, again);

	if (!sysfs_streq(buffer, "1"))
		return -EINVAL;
	control->said.again(control->said.data);
	return bytes;
}

static ssize_t vmm_pid_show(struct kobject *kobj, struct kobj_attribute *attr, char *buffer)
{
	const struct dlh_control *control = container_of(attr, struct dlh_control, vmm_pid);

	return sysfs_emit(buffer, "%d\n", control->pid);
}

/* Makes the directory of the module that this is linked into; NULL: it cannot be made. May sleep. */
struct kobject *dlh_control_root_create(void)
{
	return kobject_create_and_add(THIS_MODULE->name, kernel_kobj);
}

/* Removes it; those of VMs are gone. May sleep. */
void dlh_control_root_remove(struct kobject *root)
{
	kobject_put(root);
}

static bool is_taken(struct kobject *root, const char *name)
{
	struct kernfs_node *node = kernfs_find_and_get(root->sd, name);

	kernfs_put(node);
	return node;
}

static void set_file(struct kobj_attribute *file, const char *name, umode_t mode)
{
	sysfs_attr_init(&file->attr);
	file->attr.name = name;
	file->attr.mode = mode;
}

/*
 * Makes the directory of a VM, for the process pid, for what root says of it. -EEXIST: the name is taken. May sleep; whoever lists a directory of sysfs is waited for, who may take long over it.
 */
struct dlh_control *dlh_control_add(struct kobject *root, const char *name, int pid,
				    const struct dlh_said *said)
{
	struct dlh_control *control;
	int error;

	/* Not left to the kernel, which warns of it, and is there for whoever takes the name meanwhile. */
	if (is_taken(root, name))
		return ERR_PTR(-EEXIST);
	control = kzalloc(sizeof(*control), GFP_KERNEL);
	if (!control)
		return ERR_PTR(-ENOMEM);
	control->said = *said;
	control->pid = pid;
	set_file(&control->allow, "allow", 0644);
	control->allow.show = allow_show;
	control->allow.store = allow_store;
	set_file(&control->again, "again", 0200);
	control->again.store = again_store;
	set_file(&control->vmm_pid, "vmm_pid", 0444);
	control->vmm_pid.show = vmm_pid_show;

	error = -ENOMEM;
	control->kobj = kobject_create_and_add(name, root);
	if (control->kobj) {
		const struct attribute * const files[] = {
			&control->allow.attr,
			&control->again.attr,
			&control->vmm_pid.attr,
			NULL,
		};

		error = sysfs_create_files(control->kobj, files);
	}
	if (error) {
		kobject_put(control->kobj);
		kfree(control);
		return ERR_PTR(error);
	}
	return control;
}

/* Removes the directory, and waits for those inside its files, and as adding does. */
void dlh_control_remove(struct dlh_control *control)
{
	kobject_del(control->kobj);
	kobject_put(control->kobj);
	kfree(control);
}
