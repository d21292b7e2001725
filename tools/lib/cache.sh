# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Where things live. Sourced by tools/setup and tools/enter.

# shellcheck disable=SC2034  # every name here is for the sourcing script
SUITE=trixie
CACHE=${KVM_DLH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kvm-dlh}
REPO=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)

# What the root holds. A change here gives another hash, so another root: an old one is never
# half-upgraded into a new one.
ROOT_PACKAGES=(
	# building kernel modules and their metadata
	ca-certificates make gcc libc6-dev flex bison bc xz-utils zstd cpio kmod rsync perl python3
	libelf-dev libssl-dev libdw-dev dwarves sparse
	# Rust: the toolchain the stock kernel was built with, and the tools around it
	rustc rust-src rustfmt rust-clippy cargo bindgen clang libclang-dev lld llvm
	# running machines and looking at them
	busybox-static procps iproute2 git
)
# QEMU comes from backports, like the kernel it runs.
BACKPORTS_PACKAGES=(qemu-system-x86)

root_dir() {
	local hash
	hash=$(printf '%s\n' "${ROOT_PACKAGES[@]}" -- "${BACKPORTS_PACKAGES[@]}" | sha256sum)
	printf '%s/root-%s-%s\n' "$CACHE" "$SUITE" "${hash:0:10}"
}

# The newest prepared kernel, or nothing.
current_kernel() {
	local krel
	krel=$(cat "$CACHE/current-kernel" 2>/dev/null) || return 0
	if [[ -e $CACHE/kernel/$krel/.done ]]; then printf '%s\n' "$krel"; fi
}

die() {
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}
