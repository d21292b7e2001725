# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Finds the Debian mirror this machine is configured to use, so that none is written down here.

# "URI suite" for each binary source of apt, in both of its formats.
apt_sources() {
	local file
	for file in /etc/apt/sources.list.d/*.sources; do
		[[ -r $file ]] || continue
		awk '
			function flush(    i, j, n, m, u, s) {
				n = split(uris, u); m = split(suites, s)
				if (types ~ /(^| )deb( |$)/ && enabled != "no")
					for (i = 1; i <= n; i++) for (j = 1; j <= m; j++) print u[i], s[j]
				types = uris = suites = enabled = field = ""
			}
			/^#/ { next }
			/^[ \t]*$/ { flush(); next }
			/^[^ \t]/ { field = tolower($1); sub(/^[^:]*:[ \t]*/, "") }
			field == "types:" { types = types " " $0 }
			field == "uris:" { uris = uris " " $0 }
			field == "suites:" { suites = suites " " $0 }
			field == "enabled:" { enabled = $0 }
			END { flush() }' "$file"
	done
	for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
		[[ -r $file ]] || continue
		sed -nE 's/^[[:space:]]*deb[[:space:]]+(\[[^]]*\][[:space:]]+)?([^[:space:]]+)[[:space:]]+([^[:space:]]+).*/\2 \3/p' "$file"
	done
}

# True where URI carries the suite we build the root from.
# shellcheck disable=SC2153  # SUITE is in cache.sh
has_our_suite() {
	local file
	file=$(mktemp)
	# apt's own downloader: it knows this machine's proxies, and needs nothing installed
	if /usr/lib/apt/apt-helper download-file "${1%/}/dists/$SUITE/Release" "$file" >/dev/null 2>&1; then
		rm -f "$file"
	else
		rm -f "$file"
		return 1
	fi
}

find_mirror() {
	local uri suite seen=' '
	while read -r uri suite; do
		# Security archives hold updates only; `mirror+file:` and the like mean nothing in a chroot.
		[[ $suite != *security* && $uri =~ ^https?:// && $seen != *" $uri "* ]] || continue
		seen+="$uri "
		if has_our_suite "$uri"; then
			printf '%s\n' "${uri%/}"
			return
		fi
	done < <(apt_sources)
	echo "none of the archives in /etc/apt carries Debian $SUITE; add one there" >&2
	return 1
}

# The proxies apt is told to use here, as apt options for the root.
apt_proxy_options() {
	apt-config dump | grep -E '^Acquire::(http|https)::Proxy(::[^ ]+)? ".+";$' || :
}
