// SPDX-License-Identifier: GPL-2.0
/* Words of the VMM's memory, each in one access; copy_from_user() may take them apart. */

#include <linux/uaccess.h>

#include "../helpers.h"

int dlh_get_user_u32(unsigned long address, u32 *value)
{
	return get_user(*value, (u32 __user *)address);
}

int dlh_get_user_u64(unsigned long address, u64 *value)
{
	return get_user(*value, (u64 __user *)address);
}

int dlh_put_user_u32(unsigned long address, u32 value)
{
	return put_user(value, (u32 __user *)address);
}

int dlh_put_user_u64(unsigned long address, u64 value)
{
	return put_user(value, (u64 __user *)address);
}
