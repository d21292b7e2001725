/* SPDX-License-Identifier: GPL-2.0 */
/* What bindgen reads: our helpers, the ABI, the operation interface, and the version. */

#include "helpers.h"
#include "version.h"
