#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
# Build fuse with remote fsnotify as modules for a stock Debian kernel; see
# README.md.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

# In braces: a script that is changed while it runs goes on as it was.
{
usage() {
	cat >&2 <<-USAGE
	usage: modules.sh SERIES [RELEASE] [--update]
	SERIES is 6.1 (fuse.ko and virtiofs.ko, replacing the stock ones) or 6.12 (one
	vfuse.ko, for kernels that have fuse built in). RELEASE is what uname -r says in
	the guest; default: the newest cloud kernel. Prints the paths of the modules, in
	the order in which they are to be loaded.
	USAGE
	exit 2
}

series=${1:-} release=
[ -n "$series" ] || usage
shift
while [ $# -gt 0 ]; do
	case $1 in
	--update) UPDATE=1 ;;
	-*) usage ;;
	*) release=$1 ;;
	esac
	shift
done
case $series in
6.1) layout=separate default=linux-headers-cloud-amd64 default_version='6\.1\.' ;;
6.12) layout=combined default=linux-headers-cloud-amd64 default_version='6\.12\.' ;;
*) die "no modules for series $series (known: 6.1 6.12)" ;;
esac
debian=$(series_release "$series")
case $layout in separate) modules=(fuse virtiofs) ;; combined) modules=(vfuse) ;; esac

# The newest release of a series, by the dependency of the meta package.
newest_release() {
	[ -n "$(ls "$CACHE/apt/$debian/lists" 2>/dev/null | grep Packages)" ] && [ -z "${UPDATE:-}" ] || debian_update "$debian"
	debian_apt "$debian" apt-cache show "$default" |
		sed -n "s/^Depends:.* linux-headers-\\($default_version[^ ,]*\\).*/\\1/p" |
		sort -V | tail -n1
}

mkdir -p "$CACHE/modules"
if [ -z "$release" ]; then
	[ -s "$CACHE/modules/$series.release" ] && [ -z "${UPDATE:-}" ] ||
		newest_release >"$CACHE/modules/$series.release"
	release=$(cat "$CACHE/modules/$series.release")
	[ -n "$release" ] || die "Debian $debian has no $default of series $series"
fi

mapfile -t patches < <(series_patches "$series" fsnotify)
[ -s "$CACHE/source/$series.version" ] || { lock "source-$series"; kernel_source "$series" >/dev/null; flock -u "$LOCK_FD"; }
source=$(kernel_source "$series")
key=$(hash_files "${patches[@]}" "$KERNEL_DIR"/combined/*)
result=$CACHE/modules/$release-$(basename "$source")-$key

print_result() {
	printf "$result/%s.ko\n" "${modules[@]}"
}
if [ -d "$result" ]; then
	print_result
	exit
fi

lock "modules-$release"
clean_cache
need_tools "${BUILD_TOOLS[@]}"
[ ! -d "$result" ] || { print_result; exit; }

# The headers, unpacked into one root; their Makefiles expect them below /usr.
headers=$CACHE/headers/$release
if [ ! -d "$headers" ]; then
	version=$(debian_version "$debian" "linux-headers-$release")
	[ -n "$version" ] || die "Debian $debian has no linux-headers-$release"
	tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
	common=$(debian_apt "$debian" apt-cache show "linux-headers-$release=$version" |
		sed -n 's/^Depends: //p' | grep -o 'linux-headers-[^ ,]*-common' | head -n1)
	kbuild=$(debian_apt "$debian" apt-cache show "linux-headers-$release=$version" |
		sed -n 's/^Depends: //p' | grep -o 'linux-kbuild-[^ ,]*' | head -n1)
	for package in "linux-headers-$release" "$common" "$kbuild"; do
		dir=$(debian_package "$debian" "$package" "$(debian_version "$debian" "$package")")
		cp -a "$dir/." "$tmp"
		rm -rf "$dir"
	done
	build=$tmp/usr/src/linux-headers-$release
	grep -rlI -e '/usr/src/' -e '/usr/lib/linux-kbuild' "$build"/Makefile "$tmp/usr/src/$common/Makefile" 2>/dev/null |
		xargs -r sed -i "s,/usr/\\(src\\|lib\\)/,$headers/usr/\\1/,g"
	for link in "$build/scripts" "$build/tools" "$tmp/usr/src/$common/scripts" "$tmp/usr/src/$common/tools"; do
		if [ -L "$link" ]; then
			ln -sfn "$headers/usr/lib/$(basename "$(dirname "$(readlink "$link")")")/$(basename "$link")" "$link"
		fi
	done
	publish "$tmp" "$headers"
fi

say "building ${modules[*]} for $release"
work=$CACHE/build/modules-$release
rm -rf "$work"
mkdir -p "$work/tree"
mkdir -p "$work/tree/fs" && cp -r "$source/fs/fuse" "$work/tree/fs/"
for patch in "${patches[@]}"; do
	patch -d "$work/tree" -p1 -s -f <"$patch" >&2 || die "$patch does not apply"
done
fuse=$work/tree/fs/fuse
[ "$layout" = separate ] || "$KERNEL_DIR/combined/combine.sh" "$fuse"
make=(nice make -C "$headers/usr/src/linux-headers-$release" M="$fuse" CONFIG_CUSE= CONFIG_DEBUG_INFO_BTF_MODULES=)
"${make[@]}" -s -j"$(nproc)" modules >"$work/make.log" 2>&1 ||
	{ grep -E 'error|Error|undefined' "$work/make.log" | head -n 40 >&2; die "build failed: $work/make.log"; }
tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
for module in "${modules[@]}"; do
	strip --strip-debug -o "$tmp/$module.ko" "$fuse/$module.ko"
done
publish "$tmp" "$result"
print_result
exit
}
