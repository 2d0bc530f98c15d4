#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
# Run as root inside a Debian guest: build fuse and virtiofs with remote fsnotify
# for the running kernel and install them with DKMS, which rebuilds them when the
# kernel is updated. See README.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=virtiofs-fsnotify
release=$(uname -r) load=yes

say() { printf 'install.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
usage() {
	cat >&2 <<-USAGE
	usage: install.sh [--kernel RELEASE] [--no-load]
	       install.sh --uninstall
	Builds for the running kernel, or for RELEASE. --no-load leaves the modules alone
	that are in use now.
	USAGE
	exit 2
}

uninstall() {
	local version
	dkms status "$name" 2>/dev/null | sed -n "s,^$name[/, ]*\([^,: ]*\).*,\1,p" | sort -u |
		while read -r version; do
			dkms remove "$name/$version" --all || true
			rm -rf "/usr/src/$name-$version"
		done
	sh "$here/dkms/boot.sh" off
}

while [ $# -gt 0 ]; do
	case $1 in
	--kernel) release=${2:-}; shift ;;
	--no-load) load= ;;
	--uninstall) [ "$(id -u)" = 0 ] || die "must be root"; uninstall; exit ;;
	*) usage ;;
	esac
	shift
done
[ "$(id -u)" = 0 ] || die "must be root"
[ -n "$release" ] || usage
command -v apt-get >/dev/null || die "this needs Debian's apt-get"

# The patches are for three series; headers and source are the distribution's.
series=$(echo "$release" | sed -n 's/^\([0-9]*\.[0-9]*\)\..*/\1/p')
[ -d "$here/patches/$series" ] ||
	die "no patches for Linux $series, there are: $(cd "$here/patches" && echo *)"
say "installing headers, source and tools for $release"
packages=(dkms patch xz-utils make gcc "linux-headers-$release")
export DEBIAN_FRONTEND=noninteractive
apt-get install -qy --no-install-recommends "${packages[@]}" ||
	{ apt-get update -q && apt-get install -qy --no-install-recommends "${packages[@]}"; } ||
	die "cannot install ${packages[*]}: is $release a kernel of this machine's package sources?"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -e "/usr/src/linux-source-$series.tar.xz" ]; then
	source=/usr/src/linux-source-$series.tar.xz
else
	# Only fs/fuse of it is needed, so it is not installed.
	(cd "$work" && apt-get download -q -o APT::Sandbox::User=root "linux-source-$series") ||
		die "cannot fetch linux-source-$series: its release must be among the package sources"
	dpkg-deb --fsys-tarfile "$work"/linux-source-*.deb |
		tar -C "$work" --wildcards -xf - "*/linux-source-$series.tar.xz"
	source=$(echo "$work"/usr/src/linux-source-"$series".tar.xz)
fi
say "unpacking fs/fuse"
tar -C "$work" --wildcards -xf "$source" "linux-source-$series/fs/fuse"
tree=$work/linux-source-$series
for patch in "$here/patches/$series"/0*.patch; do
	case $patch in */0000-*) continue ;; esac
	patch -d "$tree" -p1 -s -f <"$patch" || die "$patch does not apply to linux-source-$series"
done

# A kernel with fuse built in cannot have it replaced: there the two modules are
# one with another name, and the kernel is told not to start its own.
layout=separate
if grep -q '/fuse\.ko$' "/lib/modules/$release/modules.builtin" 2>/dev/null; then
	layout=combined
	sh "$here/combined/combine.sh" "$tree/fs/fuse"
fi
version=1.$(cat "$here/patches/$series"/0*.patch "$here"/combined/* | sha256sum | cut -c1-8)
cuse=
if grep -q '^CONFIG_CUSE=m' "/usr/src/linux-headers-$release/.config" 2>/dev/null; then
	cuse='BUILT_MODULE_NAME[2]="cuse"
DEST_MODULE_LOCATION[2]="/updates/dkms"'
fi

uninstall
target=/usr/src/$name-$version
rm -rf "$target"
cp -r "$tree/fs/fuse" "$target"
conf=$(cat "$here/dkms/dkms.conf.$layout")
conf=${conf//@NAME@/$name}
conf=${conf//@VERSION@/$version}
conf=${conf//@SERIES@/${series//./\\.}}
printf '%s\n' "${conf//@CUSE@/$cuse}" >"$target/dkms.conf"

dkms add "$name/$version"
dkms build "$name/$version" -k "$release" || { tail -n 30 "/var/lib/dkms/$name/$version/build/make.log"; die "build failed"; }
dkms install "$name/$version" -k "$release" --force

[ "$layout" != combined ] || sh "$here/dkms/boot.sh" on
! command -v update-initramfs >/dev/null || update-initramfs -u -k "$release" || true

[ "$load" = yes ] && [ "$release" = "$(uname -r)" ] || exit 0
if [ "$layout" = combined ]; then
	say "installed; fuse is built into $release, so reboot with the kernel parameter"
	say "initcall_blacklist=fuse_init,virtio_fs_init (set in /etc/default/grub.d/vfuse.cfg)"
elif modprobe -r virtiofs cuse fuse 2>/dev/null || modprobe -r virtiofs fuse 2>/dev/null; then
	modprobe virtiofs
	say "installed and loaded: mount virtio-fs again"
else
	say "installed; fuse is in use: unmount all FUSE and virtio-fs and load it again, or reboot"
fi
