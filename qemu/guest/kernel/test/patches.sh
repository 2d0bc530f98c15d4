#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
# Every series applies to its kernel patch by patch, and the kernel's own
# checkpatch.pl has nothing to say about it.
# usage: patches.sh [SERIES]...
# shellcheck source=../lib.sh
. "$(dirname "$0")/../lib.sh"

# In braces: a script that is changed while it runs goes on as it was.
{
[ $# -gt 0 ] || set -- 6.1 6.12 7.2
passed=0 failed=0
result() { # STATUS TEXT
	if [ "$1" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED: $2"; fi
}
for series; do
	source=$("$KERNEL_DIR/kernel.sh" source "$series")
	tree=$(mktemp -d "$CACHE/tmp.XXXXXX")
	mapfile -t patches < <(series_patches "$series" core)
	# shellcheck disable=SC2046 # a list of file names
	(cd "$source" && cp --parents $(sed -n 's,^--- a/\([^\t]*\).*,\1,p' "${patches[@]}" | sort -u |
		while read -r file; do [ ! -e "$file" ] || echo "$file"; done) "$tree")
	for patch in "${patches[@]}"; do
		status=0
		patch -d "$tree" -p1 -f --no-backup-if-mismatch <"$patch" >"$tree/out" 2>&1 || status=1
		! grep -q -e fuzz -e offset "$tree/out" || status=1
		result $status "$series: $(basename "$patch") applies exactly: $(cat "$tree/out")"
		status=0
		# A new file below fs/fuse needs no entry of its own in MAINTAINERS.
		(cd "$source" && scripts/checkpatch.pl --ignore FILE_PATH_CHANGES --no-summary --terse "$patch") \
			>"$tree/out" 2>&1 || status=1
		[ ! -s "$tree/out" ] || status=1
		result $status "$series: $(cat "$tree/out")"
	done
	rm -rf "$tree"
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
exit
}
