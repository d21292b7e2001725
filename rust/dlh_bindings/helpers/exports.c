// SPDX-License-Identifier: GPL-2.0
/* The operation interface of kvm_dlh.ko; its functions are in rust/kvm_registry. */

#include <linux/export.h>
#include <linux/kvm_dlh.h>

EXPORT_SYMBOL_GPL(kvm_dlh_register_ops);
EXPORT_SYMBOL_GPL(kvm_dlh_unregister_ops);
EXPORT_SYMBOL_GPL(kvm_dlh_complete);
EXPORT_SYMBOL_GPL(kvm_dlh_complete_all);
