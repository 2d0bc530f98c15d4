#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-or-later
# Build Debian's QEMU 10.0 with the patches of this folder: vhost-user-fs gets the
# property `notification`; see README.md.
# shellcheck source=guest/kernel/lib.sh
. "$(dirname "$0")/guest/kernel/lib.sh"

usage() {
	cat >&2 <<-USAGE
	usage: build-qemu.sh [--update]
	Prints the path of qemu-system-x86_64. --update asks the mirror for a newer
	version of the source.
	USAGE
	exit 2
}

case ${1:-} in
'') ;;
--update) UPDATE=1 ;;
*) usage ;;
esac

DEBIAN=trixie VERSION=1:10.0.
FEATURES=(--enable-system --enable-tcg --enable-kvm --enable-vhost-user)

mapfile -t patches < <(find "$(cd "$(dirname "$0")" && pwd)/patches" -name '0*.patch' | sort)
key=$({ cat "${patches[@]}"; echo "${FEATURES[@]}"; } | sha256sum | cut -c1-16)
kept=$CACHE/source/qemu.version

result() { echo "$CACHE/qemu/${version#*:}-$key"; }

# Fast path: nothing to fetch, nothing to build.
if [ -z "${UPDATE:-}" ] && [ -s "$kept" ]; then
	version=$(cat "$kept")
	[ ! -x "$(result)/bin/qemu-system-x86_64" ] || { echo "$(result)/bin/qemu-system-x86_64"; exit; }
fi

mkdir -p "$CACHE/source"
lock qemu
if [ -n "${UPDATE:-}" ] || [ ! -s "$kept" ]; then
	[ -z "${UPDATE:-}" ] || debian_update $DEBIAN/source
	version=$(debian_version $DEBIAN/source qemu $VERSION)
	[ -n "$version" ] || die "Debian $DEBIAN has no source of QEMU ${VERSION#*:}"
fi
result=$(result)
if [ ! -x "$result/bin/qemu-system-x86_64" ]; then
	need_tools gcc=gcc make=make ninja=ninja-build flex=flex bison=bison perl=perl patch=patch pkg-config=pkg-config \
		/usr/bin/python3=python3 /usr/lib/python3/dist-packages/setuptools=python3-setuptools \
		/usr/lib/python3.11/ensurepip=python3-venv /usr/include/glib-2.0/glib.h=libglib2.0-dev /usr/include/zlib.h=zlib1g-dev
	source=$(debian_source $DEBIAN qemu "$version")
	tree=$CACHE/tree/qemu-${version#*:}
	out=$CACHE/build/qemu-${version#*:}
	sync_tree "$source" "$tree" "${patches[@]}"

	# QEMU 10.0 needs a newer Meson than Debian 12 has.
	meson=$(debian_version bookworm meson)
	export PYTHONPATH
	PYTHONPATH=$(debian_package bookworm meson "$meson")/usr/lib/python3/dist-packages

	mkdir -p "$out"
	if [ "$(cat "$out/.configured" 2>/dev/null)" != "$PYTHONPATH ${FEATURES[*]}" ]; then
		rm -rf "$out"
		mkdir "$out"
		say "configuring QEMU ${version#*:}"
		(cd "$out" && nice "$tree/configure" --python=/usr/bin/python3 --target-list=x86_64-softmmu \
			--without-default-features "${FEATURES[@]}" --disable-debug-info --disable-install-blobs \
			--disable-download --disable-docs) >"$out/configure.log" 2>&1 ||
			{ tail -n 20 "$out/configure.log" >&2; die "configure failed: $out/config.log"; }
		echo "$PYTHONPATH ${FEATURES[*]}" >"$out/.configured"
	fi
	say "building QEMU ${version#*:}"
	nice make -C "$out" -j"$(nproc)" qemu-system-x86_64 >"$out/make.log" 2>&1 ||
		{ grep -E 'error|Error|FAILED|undefined' "$out/make.log" | head -n 40 >&2; die "build failed: $out/make.log"; }

	# It looks for firmware at ../share/qemu. That of a PC is not in the source.
	tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
	mkdir -p "$tmp/bin" "$tmp/share/qemu"
	strip -o "$tmp/bin/qemu-system-x86_64" "$out/qemu-system-x86_64"
	roms=$(debian_package bookworm qemu-system-data "$(debian_version bookworm qemu-system-data $VERSION)")
	bios=$(debian_package bookworm seabios "$(debian_version bookworm seabios)")
	cp "$roms"/usr/share/qemu/{linuxboot_dma,kvmvapic}.bin "$bios"/usr/share/seabios/bios-256k.bin "$tmp/share/qemu"
	rm -rf "$roms" "$bios"
	chmod 755 "$tmp"
	publish "$tmp" "$result"
fi
echo "$version" >"$kept"
echo "$result/bin/qemu-system-x86_64"
