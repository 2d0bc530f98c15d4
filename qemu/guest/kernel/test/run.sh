#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
# Test the guest kernel's patch in User Mode Linux, without any back end.
# usage: run.sh [SERIES [VARIANT]]...   default: 6.12 fsnotify 7.2 fsnotify
# The exit status is 0 if nothing failed.
# shellcheck source=../lib.sh
. "$(dirname "$0")/../lib.sh"

here=$KERNEL_DIR/test
need_tools gcc=gcc cpio=cpio

rd=$CACHE/test/$(hash_files "$here/fsnotify-test.c").initrd
if [ ! -s "$rd" ]; then
	mkdir -p "$CACHE/test"
	tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
	mkdir "$tmp/dev"
	gcc -O2 -Wall -Wextra -static -pthread -o "$tmp/init" "$here/fsnotify-test.c" >&2
	(cd "$tmp" && find . | cpio -o -H newc --quiet) >"$rd.$$"
	mv "$rd.$$" "$rd"
	rm -rf "$tmp"
fi

# One kernel; prints what the guest prints. The limit is far above what it takes.
boot() { # SERIES VARIANT
	local linux work args=(mem=512M) limit=300
	linux=$("$KERNEL_DIR/kernel.sh" uml "$1" --variant "$2")
	work=$(mktemp -d "${TMPDIR:-/tmp}/fsnotify-test.XXXXXX")
	[ "$1" != 7.2 ] || args+=(seccomp=auto)
	[ "$2" != debug ] || { args=("${args[@]/512M/1024M}"); limit=900; }
	HOME=$work timeout -k 5 "$limit" "$linux" "${args[@]}" initrd="$rd" rdinit=/init \
		con=null con0=fd:0,fd:1 quiet panic=-1 </dev/null || true
	rm -rf "$work"
}

passed=0 failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
[ $# -gt 0 ] || set -- 6.12 fsnotify 7.2 fsnotify
while [ $# -gt 0 ]; do
	series=$1 variant=fsnotify
	shift
	case ${1:-} in [a-z]*) variant=$1; shift ;; esac
	echo "== $series $variant"
	boot "$series" "$variant" | tr -d '\r' | tee "$log" | sed -u 's/^/  /'
	line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$log" | tail -n1 || true)
	if [ -n "$line" ]; then
		passed=$((passed + ${line%% passed*}))
		line=${line#*, }
		failed=$((failed + ${line%% failed*}))
	else
		echo "the guest did not come to its end"
		failed=$((failed + 1))
	fi
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
