# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Steps of tools/setup that make the Debian root.

install_mmdebstrap() {
	command -v apt-get >/dev/null || die "no mmdebstrap and no apt-get: install mmdebstrap by hand"
	apt-get update
	DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends mmdebstrap debian-archive-keyring
}

make_root() {
	local partial=$1 mirror option options=() include
	mirror=$(find_mirror)
	echo "mirror: $mirror"
	while read -r option; do options+=(--aptopt="$option"); done < <(apt_proxy_options)
	include=$(IFS=, && echo "${ROOT_PACKAGES[*]}")
	rm -rf --one-file-system "$partial"
	# shellcheck disable=SC2016  # expanded by mmdebstrap
	# In a mount namespace: a killed mmdebstrap leaves no mounts behind.
	unshare --mount --propagation private -- \
		mmdebstrap --mode=root --variant=minbase --include="$include" "${options[@]}" \
		--keyring=/usr/share/keyrings \
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--customize-hook='printf "[safe]\n\tdirectory = *\n" >"$1/etc/gitconfig"' \
		"$SUITE" "$partial" \
		"deb $mirror $SUITE main" "deb $mirror $SUITE-updates main" "deb $mirror $SUITE-backports main"
	: >"$partial/.bootstrapped"
}

finish_root() {
	local partial=$1 final=$2
	# shellcheck disable=SC2016  # expanded inside
	(in_root "$partial" / bash -ec '
		apt-get update
		apt-get install -y --no-install-recommends -t "$0" "$@"
		apt-get clean' "$SUITE-backports" "${BACKPORTS_PACKAGES[@]}")
	mv -T "$partial" "$final"
}

update_index() {
	(in_root "$1" / apt-get update -o APT::Update::Error-Mode=any)
}
