# SPDX-License-Identifier: GPL-2.0
#
#   make            builds the three modules against KDIR
#   make demo       shows the whole way of a free page; sets everything up
#   make test       runs every check and test; sets everything up
#   make bench      runs the benchmarks and renews docs/performance.md; sets everything up
#
# make test TESTS='2* 30' runs some of the tests, make bench BENCH='calls ksm' some benchmarks; the other targets are steps of these.

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := modules

# Where `make` alone builds: a kernel build folder with Rust metadata.
KDIR ?= /lib/modules/$(shell uname -r)/build
# A test build that breaks a rule on purpose (docs/testing.md); never for anything else.
DLH_FAULT ?=
TESTS ?=
BENCH ?=

OUT = $(CURDIR)/build/modules$(addprefix -,$(DLH_FAULT))
ENTER := tools/enter
# Static, for guests without libraries.
CARGO_BUILD = env RUSTFLAGS="-C target-feature=+crt-static" \
	cargo build --release --locked --target x86_64-unknown-linux-gnu
PROGRAMS := dlh-churn dlh-kexec dlh-vmm
FAULTS := report_early missing_hook no_vma_check

# Tools that the kernel's build is told, because they were given to this one: it takes none from the environment.
TOOLS = $(foreach t,CC LD RUSTC BINDGEN PAHOLE LLVM CROSS_COMPILE,$(if $(filter command line,$(origin $(t))),"$(t)=$($(t))"))

.PHONY: modules
modules:
	@configs/check "$(KDIR)" $(TOOLS)
	@mkdir -p "$(OUT)"
	@$(MAKE) -C "$(KDIR)" M="$(CURDIR)" MO="$(OUT)" DLH_FAULT="$(DLH_FAULT)" \
		$(addprefix CLIPPY=,$(CLIPPY)) $(addprefix W=,$(W)) $(addprefix C=,$(C)) modules

# Modules beside the three; they link against build/modules.
MAKE_BESIDE = $(MAKE) -C "$(KDIR)" KBUILD_EXTRA_SYMBOLS="$(CURDIR)/build/modules/Module.symvers" modules

.PHONY: samples
samples: modules
	@mkdir -p build/samples
	@$(MAKE_BESIDE) M="$(CURDIR)" MO="$(CURDIR)/build/samples" DLH_SAMPLES=1

.PHONY: test-modules
test-modules: modules
	@mkdir -p build/test-modules
	@$(MAKE_BESIDE) M="$(CURDIR)/selftests/modules" MO="$(CURDIR)/build/test-modules"

.PHONY: env
env:
	@tools/setup

.PHONY: modules-env
modules-env: env
	@$(ENTER) sh -c 'make modules KDIR="$$KDIR"'

.PHONY: samples-env
samples-env: env
	@$(ENTER) sh -c 'make samples test-modules KDIR="$$KDIR"'

.PHONY: modules-faulty
modules-faulty: modules-env
	@for fault in $(FAULTS); do $(ENTER) sh -c "make modules KDIR=\"\$$KDIR\" DLH_FAULT=$$fault" || exit 1; done

.PHONY: programs
programs: env
	@echo "Building the test programs (the first time: downloads about 10 MB of crates, 1 minute)"
	@$(ENTER) $(CARGO_BUILD) $(addprefix -p ,$(PROGRAMS))
	@mkdir -p build/bin
	@$(ENTER) sh -c 'cd "$$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release" && cp $(PROGRAMS) /src/kvm-dlh/build/bin/'

# For guests under pressure; not ours, and not built.
.PHONY: stress-ng
stress-ng: env
	@$(ENTER) tools/stress-ng

.PHONY: demo
demo: modules-env programs
	@tools/demo

.PHONY: lint
lint: env
	@$(ENTER) tools/lint

.PHONY: unit
unit: env
	@echo "Unit and property tests of the pure crates and of the test tools"
	@$(ENTER) cargo test --locked --quiet -p allow_rules -p counters -p dlh_abi -p free_map
	@$(ENTER) env PYTHONPATH=selftests python3 -B -m unittest discover -q -s selftests/vm/unit

.PHONY: test
test: modules-env modules-faulty samples-env programs stress-ng lint unit
	@selftests/run $(TESTS)

.PHONY: bench
bench: modules-env samples-env programs
	@$(ENTER) tools/pygal
	@bench/run $(BENCH)

.PHONY: clean
clean:
	rm -rf build
