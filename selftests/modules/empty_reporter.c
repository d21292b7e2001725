// SPDX-License-Identifier: GPL-2.0
/*
 * For bench/cases/reclaim.py: is handed a guest's free blocks as any reporter is, and tells nobody. What the guest
 * executes with it is what reporting costs before anything has been reported.
 */

#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/page_reporting.h>

static unsigned int order;
module_param(order, uint, 0444);
MODULE_PARM_DESC(order, "The smallest blocks to be handed over are of 2^order pages");

static unsigned long bytes;
module_param(bytes, ulong, 0444);
MODULE_PARM_DESC(bytes, "What has been handed over, to be read");

static int empty_report(struct page_reporting_dev_info *info, struct scatterlist *list,
			unsigned int count)
{
	struct scatterlist *entry;
	unsigned int i;

	for_each_sg(list, entry, count, i)
		bytes += entry->length;
	return 0;
}

static struct page_reporting_dev_info info = { .report = empty_report };

static int __init empty_init(void)
{
	info.order = order;
	return page_reporting_register(&info);
}

static void __exit empty_exit(void)
{
	page_reporting_unregister(&info);
}

module_init(empty_init);
module_exit(empty_exit);
MODULE_DESCRIPTION("A reporter of free pages that tells nobody, to measure what is left then");
MODULE_LICENSE("GPL");
