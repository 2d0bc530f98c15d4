#!/usr/bin/env bash
# A Debian 13 with its libvirt (11.3) and QEMU (10.0), which can migrate guests with shares, in a folder of the cache; prints the
# folder. libvirtd.sh FOLDER ROOT starts what is in it. Needs root.
# shellcheck source=../guest/kernel/lib.sh
. "$(dirname "$0")/../guest/kernel/lib.sh"

root=$CACHE/debian/trixie-libvirt
if [ ! -d "$root" ]; then
	need_tools debootstrap=debootstrap
	lock trixie-libvirt
	tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
	say "making a Debian 13 with libvirt in $root"
	mirror=$(apt-get indextargets --format '$(REPO_URI)|$(LABEL)' 'Created-By: Packages' | sed -n 's/|Debian$//p' | head -n1)
	{
		debootstrap --variant=minbase trixie "$tmp/root" "$mirror"
		cp /etc/resolv.conf "$tmp/root/etc/"
		# Nothing is to be started by what is installed.
		printf '#!/bin/sh\nexit 101\n' >"$tmp/root/usr/sbin/policy-rc.d"
		chmod 755 "$tmp/root" "$tmp/root/usr/sbin/policy-rc.d"
		unshare --mount --pid --fork --mount-proc sh -c 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"' "$tmp/root" \
			env DEBIAN_FRONTEND=noninteractive sh -c 'apt-get update -q && apt-get install -qy --no-install-recommends "$@" && apt-get clean' sh \
			libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-log libvirt-clients qemu-system-x86 nodejs
	} >"$tmp/log" 2>&1 || { tail -n 20 "$tmp/log" >&2; rm -rf "$tmp"; die "cannot make it"; }
	publish "$tmp/root" "$root"
	rm -rf "$tmp"
fi
echo "$root"
