/* SPDX-License-Identifier: GPL-2.0 */
/* Attaching an ftrace hook to one function, and taking it off. */
#ifndef DLH_HELPERS_FTRACE_H
#define DLH_HELPERS_FTRACE_H

#include <linux/ftrace.h>

/* -ENOENT: there is no such function; -EBUSY: another hook changes where it leads. May sleep. */
static inline int dlh_ftrace_hook(struct ftrace_ops *ops, const char *symbol)
{
	char name[KSYM_NAME_LEN];
	int err;

	strscpy(name, symbol, sizeof(name));
	err = ftrace_set_filter(ops, name, strlen(name), 1);
	if (err)
		return -ENOENT;
	err = register_ftrace_function(ops);
	if (err)
		ftrace_free_filter(ops);
	return err;
}

/* On return nobody is inside the callback, unless it sleeps. May sleep. */
static inline void dlh_ftrace_unhook(struct ftrace_ops *ops)
{
	unregister_ftrace_function(ops);
	ftrace_free_filter(ops);
}

#endif
