#!/usr/bin/env bash
# The files of a Debian 13 with systemd and its own Node.js, for machine.sh: made once, by debootstrap, and kept. Prints the folder.
# shellcheck source=../../qemu/guest/kernel/lib.sh
. "$(dirname "$0")/../../qemu/guest/kernel/lib.sh"

folder=$CACHE/debian13
if [ ! -d "$folder" ]; then
	lock debian13
	if [ ! -d "$folder" ]; then
		need_tools debootstrap
		say "making a Debian 13 in $folder"
		mirror=$(apt-get indextargets --format '$(REPO_URI)|$(LABEL)' 'Created-By: Packages' | sed -n 's/|Debian$//p' | head -n1)
		tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
		debootstrap --variant=minbase --include=systemd,nodejs,man-db trixie "$tmp" "$mirror" >&2 || die "debootstrap failed"
		publish "$tmp" "$folder"
	fi
fi
echo "$folder"
