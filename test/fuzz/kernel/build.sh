#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Compile the guest kernel's parser of notifications, as the patches of a series make it, for user space.
# usage: build.sh SERIES OUTPUT COMPILER OPTION...
set -eu
here=$(cd "$(dirname "$0")" && pwd)
series=$1 output=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git init -q "$work"
# The parser's file is a new one: it needs no kernel source to be patched.
for patch in "$here/../../../qemu/guest/kernel/patches/$series"/000[1-9]-*.patch "$here/../../../qemu/guest/kernel/patches/$series"/00[1-9]?-*.patch; do
	git -C "$work" apply --allow-empty --include='fs/fuse/fsnotify.*' "$patch"
done
# kernel.h stands for all of these.
mkdir -p "$work/empty/linux"
for header in fsnotify fsnotify_backend mm module slab syscalls types workqueue xarray; do : >"$work/empty/linux/$header.h"; done
: >"$work/fs/fuse/fuse_i.h"
sed -i 's|#include "fuse_i.h"|#include "fsnotify.h"|' "$work/fs/fuse/fsnotify.c"
"$@" -g -O1 -Wall -Wno-unused-function -Wno-pointer-arith -fsanitize=address,undefined -fno-sanitize-recover=all \
	-I "$here" -I "$work/fs/fuse" -I "$work/empty" -o "$output" "$here/parser.c"
