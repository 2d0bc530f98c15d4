#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Turn a copy of fs/fuse into the source of the one module vfuse.ko.
# usage: combine.sh DIRECTORY
set -eu
here=$(dirname "$0")
cp "$here/combined.h" "$here/combined.c" "$1"
sed -i -e '/^obj-/d' -e '/^virtiofs-y/d' -e 's/^fuse-/vfuse-/' "$1/Makefile"
cat >>"$1/Makefile" <<'MAKEFILE'

ccflags-y += -include $(src)/combined.h
CFLAGS_combined.o := -DVFUSE_MAIN
obj-m += vfuse.o
vfuse-y += virtio_fs.o combined.o
MAKEFILE
