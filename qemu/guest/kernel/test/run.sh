#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
# Test the guest kernel's patch in User Mode Linux, without the daemon.
# usage: [TESTS="fsnotify cache carrier"] run.sh [SERIES [VARIANT]]...   default: 6.12 fsnotify 7.2 fsnotify
# The exit status is 0 if nothing failed.
# shellcheck source=../lib.sh
. "$(dirname "$0")/../lib.sh"

# In braces: a script that is changed while it runs goes on as it was.
{
here=$KERNEL_DIR/test
need_tools gcc=gcc cpio=cpio

built=$CACHE/test/$(hash_files "$here"/*.c "$here"/*.h)
if [ ! -d "$built" ]; then
	mkdir -p "$CACHE/test"
	tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
	for test in fsnotify cache carrier; do
		mkdir -p "$tmp/root/dev"
		gcc -O2 -Wall -Wextra -static -pthread -o "$tmp/root/init" "$here/$test-test.c" >&2
		(cd "$tmp/root" && find . | cpio -o -H newc --quiet) >"$tmp/$test.initrd"
		rm -rf "$tmp/root"
	done
	gcc -O2 -Wall -Wextra -o "$tmp/carrier-device" "$here/carrier-device.c" >&2
	publish "$tmp" "$built"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/fsnotify-test.XXXXXX")
device=
trap '[ -z "$device" ] || kill "$device" 2>/dev/null; rm -rf "$work"' EXIT
passed=0 failed=0

# One guest; its last line is the result. The limit is far above what it takes.
boot() { # SERIES VARIANT TEST ARGUMENT...
	local series=$1 variant=$2 initrd=$built/$3.initrd linux line memory=256M limit=300
	shift 3
	linux=$("$KERNEL_DIR/kernel.sh" uml "$series" --variant "$variant")
	[ "$series" != 7.2 ] || set -- "$@" seccomp=auto
	[ "$variant" != debug ] || { memory=1024M limit=900; set -- "$@" kasan_multi_shot; }
	{
		HOME=$work timeout -k 5 "$limit" "$linux" "mem=$memory" "variant=$variant" "$@" initrd="$initrd" rdinit=/init \
			con=null con0=fd:0,fd:1 quiet panic=-1 </dev/null || true
	} | tr -d '\r' | tee "$work/log" | sed -u 's/^/  /'
	line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$work/log" | tail -n1 || true)
	if [ -n "$line" ]; then
		passed=$((passed + ${line%% passed*}))
		line=${line#*, }
		failed=$((failed + ${line%% failed*}))
	else
		echo "the guest did not come to its end"
		failed=$((failed + 1))
	fi
}

# A guest with the test device.
boot_device() { # SERIES VARIANT MODE DEVICE-ARGUMENT...
	local series=$1 variant=$2 mode=$3 socket=$work/socket
	shift 3
	rm -f "$work/ready"
	"$built/carrier-device" "$@" "$socket" >"$work/ready" &
	device=$!
	until [ -s "$work/ready" ]; do sleep 0.05; done
	echo "== $series $variant, carrier: $mode $*"
	boot "$series" "$variant" carrier "virtio_uml.device=$socket:26" "mode=$mode"
	kill "$device" 2>/dev/null || true
	wait "$device" 2>/dev/null || true
	device=
}

[ $# -gt 0 ] || set -- 6.12 fsnotify 7.2 fsnotify
while [ $# -gt 0 ]; do
	series=$1 variant=fsnotify
	shift
	case ${1:-} in [a-z]*) variant=$1; shift ;; esac
	echo "== $series $variant"
	for test in ${TESTS:-fsnotify cache carrier}; do
		if [ "$test" = carrier ]; then
			boot_device "$series" "$variant" queue -q 4096
			boot_device "$series" "$variant" lent
			boot_device "$series" "$variant" lent -i
			boot_device "$series" "$variant" none -n
		else
			boot "$series" "$variant" "$test"
		fi
	done
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
exit
}
