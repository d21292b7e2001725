/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Numbers that a module takes as parameters, each within a range. The kernel crate's can be set once and
 * not be read. These behave as parameters of modules in C do: they are in /sys/module/<module>/parameters,
 * and of one that is given twice the last counts. modinfo shows type, range and default.
 *
 * Each defines dlh_param_<name>(), which helpers.h declares. All are set before the module's init runs, and
 * never after.
 */
#ifndef DLH_HELPERS_PARAM_H
#define DLH_HELPERS_PARAM_H

#include <linux/moduleparam.h>

#include "../helpers.h"

struct dlh_param {
	int value;
	int min;
	int max;
	/* Allowed beside the range, or a value in it. */
	int also;
	bool power_of_two;
};

extern const struct kernel_param_ops dlh_param_ops;

#define DLH_PARAM_DEFINE(_type, _name, _min, _max, _also, _power_of_two, _default, _description)	\
	static struct dlh_param _name = {								\
		.value = _default,									\
		.min = _min,										\
		.max = _max,										\
		.also = _also,										\
		.power_of_two = _power_of_two,								\
	};												\
	module_param_cb(_name, &dlh_param_ops, &_name, 0444);						\
	__MODULE_PARM_TYPE(_name, #_type);								\
	MODULE_PARM_DESC(_name, _description);								\
	_type dlh_param_##_name(void)									\
	{												\
		return _name.value;									\
	}

/* From _min to _max. */
#define DLH_PARAM(_type, _name, _min, _max, _default, _text)						\
	DLH_PARAM_DEFINE(_type, _name, _min, _max, _min, false, _default,				\
			 _text " (" #_min " to " #_max "; default " #_default ")")

/* Another value has a meaning of its own. */
#define DLH_PARAM_ALSO(_type, _name, _min, _max, _also, _meaning, _default, _text)			\
	DLH_PARAM_DEFINE(_type, _name, _min, _max, _also, false, _default,				\
			 _text " (" #_min " to " #_max ", or " #_also ": " _meaning "; default " #_default ")")

/* Powers of two. */
#define DLH_PARAM_POWER_OF_TWO(_type, _name, _min, _max, _default, _text)				\
	DLH_PARAM_DEFINE(_type, _name, _min, _max, _min, true, _default,				\
			 _text " (a power of two, " #_min " to " #_max "; default " #_default ")")

#endif
