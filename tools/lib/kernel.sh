# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Steps of tools/setup that fetch a stock kernel and prepare its source for Rust modules.

# Release names of the stock amd64 kernels the archive has, newest first.
list_kernels() {
	(in_root "$1" / apt-cache pkgnames linux-image-) |
		sed -nE 's/^linux-image-([0-9]+\.[0-9]+[^_]*-amd64)$/\1/p' |
		grep -vE -- '-(rt|cloud)-amd64$' | sort -rV
}

# Downloads the headers, which are small and hold the configuration, and tells from that whether
# the kernel can load Rust modules. Writes the answer to $CACHE/kernel/KREL/.rust.
fetch_config() {
	local root=$1 krel=$2
	mkdir -p "$CACHE/kernel/$krel"
	# shellcheck disable=SC2016  # expanded inside
	(in_root "$root" / KREL="$krel" bash -ec '
		cd "/kernel/$KREL"
		rm -rf headers deb-headers && mkdir headers deb-headers
		(cd deb-headers && apt-get -o APT::Sandbox::User=root download "linux-headers-$KREL")
		dpkg -x deb-headers/*.deb headers && rm -r deb-headers
		config=$(find headers -name .config)
		if grep -qx CONFIG_RUST=y "$config"; then echo y >.rust; else echo n >.rust; fi')
}

# Unpacks the kernel image, its modules and its configuration; no package is installed. Which
# packages hold them is what the image package says: the split has changed over the years.
fetch_kernel() {
	local root=$1 krel=$2
	# shellcheck disable=SC2016  # expanded inside
	(in_root "$root" / KREL="$krel" bash -ec '
		cd "/kernel/$KREL"
		rm -rf unpacked deb modules && mkdir unpacked deb modules
		mapfile -t packages < <(apt-cache depends --recurse --important --no-recommends \
			--no-suggests "linux-image-$KREL" | grep -E "^linux-[a-z-]+-${KREL//+/\\+}\$" | sort -u)
		echo "packages: ${packages[*]}"
		(cd deb && apt-get -o APT::Sandbox::User=root download "${packages[@]}")
		for deb in deb/*.deb; do dpkg -x "$deb" unpacked; done
		rm -r deb
		# one place for either side of the /usr merge
		mkdir -p unpacked/usr/lib/modules
		[[ ! -d unpacked/lib/modules ]] || cp -a unpacked/lib/modules/. unpacked/usr/lib/modules/
		rm -rf unpacked/lib && ln -s usr/lib unpacked/lib
		tree=unpacked/usr/lib/modules/$KREL
		for file in "$tree/vmlinuz" "unpacked/boot/vmlinuz-$KREL"; do
			[[ ! -f $file ]] || cp "$file" vmlinuz
		done
		for file in "$tree/config" "unpacked/boot/config-$KREL"; do
			[[ ! -f $file ]] || cp "$file" config
		done
		[[ -s vmlinuz && -s config ]] || { echo "no kernel image or configuration in them"; exit 1; }
		depmod -b unpacked "$KREL"
		rm -f "$tree"/{build,source}
		ln -s "/kernel/$KREL/build" "$tree/build"
		mv "$tree" modules/
		rm -r unpacked')
	: >"$CACHE/kernel/$krel/.fetched"
}

# Extracts the source of exactly this kernel and gives it the configuration and symbol versions it
# was built with.
fetch_source() {
	local root=$1 krel=$2
	# shellcheck disable=SC2016  # expanded inside
	(in_root "$root" / KREL="$krel" bash -euo pipefail -c '
		cd "/kernel/$KREL"
		version=$(apt-cache show "linux-headers-$KREL" | sed -n "s/^Version: //p" | head -n 1)
		upstream=${KREL%%[+-]*} name=
		for candidate in "$upstream" "${upstream%.*}"; do
			if apt-cache show "linux-source-$candidate=$version" >/dev/null 2>&1; then
				name=linux-source-$candidate
			fi
		done
		[[ -n $name ]] || { echo "the archive has no linux-source package of version $version"; exit 1; }
		rm -rf build.partial build deb && mkdir build.partial deb
		(cd deb && apt-get -o APT::Sandbox::User=root download "$name=$version")
		# Kconfig reads Documentation/Kconfig; nothing reads what is below it.
		dpkg-deb --fsys-tarfile deb/*.deb | tar -xO "./usr/src/$name.tar.xz" | xz -dc -T0 |
			tar -x -C build.partial --strip-components=1 --exclude="$name/Documentation/*/*"
		rm -r deb
		headers=$(dirname "$(find headers -name Module.symvers)")
		cp "$headers"/{.config,Module.symvers} build.partial/
		# the stock kernel without code, for the type information of modules
		[[ ! -f $headers/vmlinux ]] || cp "$headers/vmlinux" build.partial/
		cp "$headers/.config" build.partial/.config.stock
		[[ ! -f $headers/.kernelvariables ]] || cp "$headers/.kernelvariables" build.partial/.kernelvariables
		echo "${KREL#"$upstream"}" >build.partial/localversion
		mv build.partial build')
	: >"$CACHE/kernel/$krel/.extracted"
}

# Builds what the headers packages lack: the host tools and the metadata of the kernel crates.
prepare_source() {
	local root=$1 krel=$2
	(in_root "$root" "/kernel/$krel/build" KREL="$krel" KBUILD_BUILD_USER=kvm-dlh \
		KBUILD_BUILD_HOST=debian bash /src/kvm-dlh/tools/lib/prepare-source)
	local dir=$CACHE/kernel/$krel
	rm -rf "$dir/headers"
	: >"$dir/.done"
}
