/* SPDX-License-Identifier: GPL-2.0 */
/* Attaching an ftrace hook to one function of KVM, and taking it off: ftrace.c. */
#ifndef DLH_HELPERS_FTRACE_H
#define DLH_HELPERS_FTRACE_H

struct ftrace_ops;

int dlh_ftrace_hook(struct ftrace_ops *ops, const char *function);
void dlh_ftrace_unhook(struct ftrace_ops *ops);

#endif
