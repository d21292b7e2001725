# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# in_root: runs a command in a Debian root, in a mount namespace of its own.

# The mounts are made after unshare, so they are seen by nobody else and vanish with the last
# process of the command, however it ends.
# shellcheck disable=SC2016  # expanded by the inner shell
IN_ROOT_SCRIPT='
set -euo pipefail
root=$1 repo=$2 cache=$3 cwd=$4 ca=$5
shift 5
bind() {
	mkdir -p "$2"
	mount --bind "$1" "$2"
}
bind_file() {
	if [[ -e $1 ]]; then
		[[ -e $2 ]] || { mkdir -p "${2%/*}" && : >"$2"; }
		mount --bind "$1" "$2"
	fi
}
# The root without what is mounted below it: what a virtual machine gets as its file system.
bind "$root" "$root/root-image"
mount -o remount,bind,ro "$root/root-image"
bind "$repo" "$root/src/kvm-dlh"
bind "$cache/kernel" "$root/kernel"
bind "$cache/cargo" "$root/cargo"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
bind_file /etc/resolv.conf "$root/etc/resolv.conf"
bind_file /etc/hosts "$root/etc/hosts"
# A host behind an intercepting proxy trusts more than Debian does.
[[ -z $ca ]] || bind_file "$ca" "$root/etc/ssl/certs/ca-certificates.crt"
exec chroot "$root" /usr/bin/env --chdir="$cwd" -- "$@"
'

host_ca_bundle() {
	local file
	for file in "${SSL_CERT_FILE:-}" "${CURL_CA_BUNDLE:-}" /etc/ssl/certs/ca-certificates.crt \
		/etc/pki/tls/certs/ca-bundle.crt; do
		if [[ -n $file && -r $file ]]; then
			realpath -- "$file"
			return
		fi
	done
}

# in_root ROOT CWD [NAME=VALUE...] COMMAND [ARG...]: replaces the shell, so call it in a
# subshell where more is to follow.
in_root() {
	local root=$1 cwd=$2 name
	shift 2
	local ca_inside=/etc/ssl/certs/ca-certificates.crt
	local environment=(
		PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
		HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}"
		DEBIAN_FRONTEND=noninteractive
		CARGO_HOME=/cargo CARGO_TARGET_DIR=/src/kvm-dlh/build/cargo
		CARGO_HTTP_CAINFO="$ca_inside" SSL_CERT_FILE="$ca_inside"
	)
	for name in http_proxy https_proxy ftp_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY \
		ALL_PROXY NO_PROXY RUST_BACKTRACE SOURCE_DATE_EPOCH "${!KVM_DLH_@}"; do
		[[ -z ${!name:-} ]] || environment+=("$name=${!name}")
	done
	mkdir -p "$CACHE/kernel" "$CACHE/cargo"
	exec env -i "${environment[@]}" unshare --mount --propagation private -- \
		bash -c "$IN_ROOT_SCRIPT" in_root "$root" "$REPO" "$CACHE" "$cwd" "$(host_ca_bundle)" "$@"
}
