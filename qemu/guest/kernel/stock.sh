#!/usr/bin/env bash
# Debian's own kernels of other releases and for other machines, as they are:
# guests that nobody patched. They are fetched into the cache; nothing is
# installed.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

usage() {
	cat >&2 <<-USAGE
	usage: stock.sh 5.10-uml | 5.10-cloud | 6.1-arm64 | RELEASE
	RELEASE is what uname -r says, of Debian 12 or its backports.
	Prints lines name=path: kernel, modules (lib/modules/VERSION) and, for
	another machine than this, busybox; for that one it installs QEMU and gcc.
	What is in the cache stays in use: remove its folder to move on to a newer
	package.
	USAGE
	exit 2
}

case ${1:-} in
5.10-uml) release=bullseye pattern='user-mode-linux' ;;
5.10-cloud) release=bullseye pattern='linux-image-5\.10\.0-[0-9]+-cloud-amd64' ;;
6.1-arm64) release=bookworm/arm64 pattern='linux-image-6\.1\.0-[0-9]+-cloud-arm64' ;;
*-amd64) release=bookworm pattern=linux-image-$(sed 's/[.+]/\\&/g' <<<"$1") ;;
*) usage ;;
esac

# Unpacks the newest package whose name matches.
fetch() { # FOLDER PATTERN
	local name version package
	[ ! -d "$1" ] || return 0
	mkdir -p "$CACHE/guest"
	lock "stock-${1##*/}"
	[ ! -d "$1" ] || return 0
	[ -n "$(ls "$CACHE/apt/${release/\//-}/lists" 2>/dev/null | grep Packages)" ] || debian_update "$release"
	name=$(debian_apt "$release" apt-cache pkgnames | grep -xE "$2" | sort -V | tail -n1)
	[ -n "$name" ] || die "Debian ${release%/*} has no package $2"
	version=$(debian_version "$release" "$name")
	package=$(debian_package "$release" "$name" "$version")
	publish "$package" "$1"
}

folder=$CACHE/guest/debian-$1
fetch "$folder" "$pattern"
for kernel in "$folder"/boot/vmlinuz-* "$folder"/usr/bin/linux.uml; do
	[ ! -e "$kernel" ] || echo "kernel=$kernel"
done
for modules in "$folder"/lib/modules/* "$folder"/usr/lib/uml/modules/*; do
	[ ! -d "$modules" ] || echo "modules=$modules"
done
if [ "$1" = 6.1-arm64 ]; then
	need_tools qemu-system-aarch64=qemu-system-arm aarch64-linux-gnu-gcc=gcc-aarch64-linux-gnu \
		/usr/aarch64-linux-gnu/include/stdio.h=libc6-dev-arm64-cross
	fetch "$CACHE/guest/busybox-arm64" busybox-static
	echo "busybox=$CACHE/guest/busybox-arm64/bin/busybox"
fi
