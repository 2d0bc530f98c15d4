#!/usr/bin/env bash
# Debian's newest QEMU, which has a device for any vhost-user back end
# (vhost-user-test-device, QEMU 10.2 or newer); see README.md. It is fetched with
# its libraries into the cache and installs nothing.
# shellcheck source=guest/kernel/lib.sh
. "$(dirname "$0")/guest/kernel/lib.sh"

usage() {
	cat >&2 <<-USAGE
	usage: newest-qemu.sh [--update] [RELEASE]
	Prints the path of the program, which is x86-64's. RELEASE is of Debian: sid, or
	trixie for QEMU 10.0. The version found once is kept until --update.
	USAGE
	exit 2
}

[ "${1:-}" != --update ] || { UPDATE=1; shift; }
release=${1:-sid}
case $release in
sid) kept=$CACHE/qemu/newest.version prefix= ;;
# Its backports have newer ones.
trixie) kept=$CACHE/qemu/$release.version prefix=1:10. ;;
*) usage ;;
esac

if [ -s "$kept" ] && [ -z "${UPDATE:-}" ]; then
	version=$(cat "$kept")
else
	mkdir -p "$CACHE/qemu"
	[ -z "${UPDATE:-}" ] || debian_update $release
	version=$(debian_version $release qemu-system-x86 "$prefix")
	[ -n "$version" ] || die "Debian $release has no qemu-system-x86"
fi
folder=$CACHE/qemu/${version#*:}

if [ ! -x "$folder/run" ]; then
	lock newest-qemu
	# Debian's QEMU looks for data and modules where it would be installed.
	# shellcheck disable=SC2016 # shell for later
	[ -x "$folder/run" ] ||
		debian_program "$folder" $release "qemu-system-x86=$version" usr/bin/qemu-system-x86_64 \
			'-L "$folder/usr/share/qemu" -L "$folder/usr/share/seabios"' \
			'QEMU_MODULE_DIR="$folder/usr/lib/x86_64-linux-gnu/qemu"'
fi
echo "$version" >"$kept"
echo "$folder/run"
