#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# DKMS runs this where it builds: makes the folder fuse, the source for one kernel.
# usage: prepare.sh RELEASE
set -eu
release=$1
series=$(echo "$release" | sed 's/^\([0-9]*\.[0-9]*\).*/\1/')
rm -rf fuse
cp -r "$series/fuse" fuse
if grep -q '/fuse\.ko$' "/lib/modules/$release/modules.builtin" 2>/dev/null; then sh combined/combine.sh fuse; fi
