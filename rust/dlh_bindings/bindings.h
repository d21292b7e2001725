/* SPDX-License-Identifier: GPL-2.0 */
/* What bindgen reads: our helpers, the ABI, and the operation interface. */

#include "helpers.h"
