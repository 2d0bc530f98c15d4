#!/usr/bin/env bash
# The daemons to compare with, unpacked into the cache and run with their own release's libraries and loader:
#
#   peers.sh rust     virtiofsd, the newest in Debian
#   peers.sh c        QEMU's old virtiofsd in C, as Debian 12 has it
#
# Prints two lines: the path of a program to start, and its version. Nothing is installed.
# shellcheck source=../../qemu/guest/kernel/lib.sh
. "$(dirname "$0")/../../qemu/guest/kernel/lib.sh"

# peer NAME RELEASE PROGRAM PACKAGE...: the first package is the daemon's, the others are its libraries.
peer() {
	local name=$1 release=$2 program=$3 package=$4 folder=$CACHE/peers/$1 tmp version p
	shift 3
	if [ ! -x "$folder/run" ]; then
		mkdir -p "$CACHE"
		lock "peer-$name"
		if [ ! -x "$folder/run" ]; then
			say "fetching $package of Debian $release"
			tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
			for p; do
				version=$(stable_version "$release" "$p")
				[ -n "$version" ] || die "Debian $release has no $p"
				[ "$p" != "$package" ] || echo "$version" >"$tmp/version"
				(cd "$tmp" && debian_apt "$release" apt-get -q download "$p=$version" >&2)
				dpkg-deb -x "$tmp"/*.deb "$tmp"
				rm "$tmp"/*.deb
			done
			# Replaces itself: the process that is measured is the daemon's.
			cat >"$tmp/run" <<-RUN
			#!/bin/sh
			exec "$folder/loader" --library-path "$folder/usr/lib/x86_64-linux-gnu:$folder/lib/x86_64-linux-gnu" "$folder/$program" "\$@"
			RUN
			chmod 755 "$tmp/run"
			ln -s "$(cd "$tmp" && find . -name 'ld-linux-x86-64.so.2' | sed -n '1s,^\./,,p')" "$tmp/loader"
			publish "$tmp" "$folder"
		fi
	fi
	echo "$folder/run"
	cat "$folder/version"
}

# The newest version of a package in a release itself: its backports no longer have the C daemon.
stable_version() { # RELEASE PACKAGE
	debian_version "$1" "$2" >/dev/null
	debian_apt "$1" apt-cache madison "$2" | awk -F' *[|] *' -v suite="$1-backports/" 'index($3, suite) == 0 {print $2}' | head -n1
}

case ${1:-} in
rust) peer rust sid usr/libexec/virtiofsd virtiofsd libc6 libgcc-s1 libcap-ng0 libseccomp2 ;;
c) peer c bookworm usr/lib/qemu/virtiofsd qemu-system-common libc6 libgcc-s1 libcap-ng0 libseccomp2 libglib2.0-0 libpcre2-8-0 libnuma1 ;;
*) echo "usage: peers.sh rust|c" >&2; exit 2 ;;
esac
