# SPDX-License-Identifier: GPL-2.0
#
#   make            builds the three modules against KDIR
#   make demo       shows the whole thing in an emulated host; sets everything up
#   make test       runs every test; sets everything up
#
# More in README.md. Nothing here needs hardware virtualisation.

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := modules

# Where `make` alone builds: a kernel build folder with Rust metadata.
KDIR ?= /lib/modules/$(shell uname -r)/build
# A test build that breaks a rule on purpose, see docs/testing.md; never to be used otherwise.
DLH_FAULT ?=
OUT := $(CURDIR)/build/modules$(addprefix -,$(DLH_FAULT))

.PHONY: modules
modules:
	@configs/check "$(KDIR)"
	@mkdir -p "$(OUT)"
	$(MAKE) -C "$(KDIR)" M="$(CURDIR)" MO="$(OUT)" DLH_FAULT="$(DLH_FAULT)" $(if $(CLIPPY),CLIPPY=1) $(if $(W),W=$(W)) $(if $(C),C=$(C)) modules
