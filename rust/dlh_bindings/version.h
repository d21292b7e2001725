/* SPDX-License-Identifier: GPL-2.0 */
/* The version of all modules. */
#ifndef DLH_BINDINGS_VERSION_H
#define DLH_BINDINGS_VERSION_H

#define DLH_VERSION "0.1.0"

#endif
