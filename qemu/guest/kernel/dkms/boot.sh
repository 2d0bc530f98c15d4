#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Kernels that have fuse built in: vfuse is loaded in its place, and the kernel is told not to start its own.
# usage: boot.sh on|off
set -eu
case ${1:-} in
on)
	printf 'alias fs-fuse vfuse\nalias fs-fuseblk vfuse\nalias fs-virtiofs vfuse\n' >/etc/modprobe.d/vfuse.conf
	mkdir -p /etc/modules-load.d
	echo vfuse >/etc/modules-load.d/vfuse.conf
	[ -d /etc/default/grub.d ] || exit 0
	echo 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX initcall_blacklist=fuse_init,virtio_fs_init"' \
		>/etc/default/grub.d/vfuse.cfg
	;;
off)
	rm -f /etc/modprobe.d/vfuse.conf /etc/modules-load.d/vfuse.conf
	[ -e /etc/default/grub.d/vfuse.cfg ] || exit 0
	rm -f /etc/default/grub.d/vfuse.cfg
	;;
*) echo "usage: boot.sh on|off" >&2; exit 2 ;;
esac
! command -v update-grub >/dev/null || update-grub
