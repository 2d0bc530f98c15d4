#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
# Build a guest kernel from Debian's linux-source; see README.md.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

usage() {
	cat >&2 <<-USAGE
	usage: kernel.sh uml SERIES [--variant plain|fsnotify|core|debug] [--update]
	       kernel.sh source SERIES [--update]
	SERIES is 6.1, 6.12 or 7.2. Prints the path of the "linux" binary (uml) or of
	the unpatched source tree (source). --update asks the mirror for a newer version.
	USAGE
	exit 2
}

build_uml() { # SERIES VARIANT
	local series=$1 variant=$2 source version group tree out patches configs key result
	mapfile -t patches < <(series_patches "$series" "$variant")
	configs=("$KERNEL_DIR/config/uml.config")
	[ "$variant" != debug ] || configs+=("$KERNEL_DIR/config/debug.config")
	key=$(hash_files "${patches[@]}" "${configs[@]}")

	# Fast path: nothing to fetch, nothing to build.
	if [ -z "${UPDATE:-}" ] && [ -s "$CACHE/source/$series.version" ]; then
		version=$(cat "$CACHE/source/$series.version")
		result=$CACHE/uml/$version-$variant-$key/linux
		[ ! -x "$result" ] || { echo "$result"; return; }
	fi

	mkdir -p "$CACHE"
	lock "source-$series"
	source=$(kernel_source "$series")
	flock -u "$LOCK_FD"
	version=$(basename "$source")

	# plain and fsnotify differ in a few files only and share a build; core
	# changes a header that everything includes, debug the configuration.
	case $variant in plain | fsnotify) group=main ;; *) group=$variant ;; esac
	lock "uml-$series-$group"
	result=$CACHE/uml/$version-$variant-$key/linux
	[ ! -x "$result" ] || { echo "$result"; return; }

	clean_cache
	need_tools "${BUILD_TOOLS[@]}"
	tree=$CACHE/tree/$version-$group
	out=$CACHE/build/uml-$version-$group
	sync_tree "$source" "$tree" "${patches[@]}"
	mkdir -p "$out"
	if [ "$(cat "$out/.config.key" 2>/dev/null)" != "$(hash_files "${configs[@]}")" ]; then
		make -C "$tree" ARCH=um O="$out" -s tinyconfig >&2
		(cd "$tree" && scripts/kconfig/merge_config.sh -m -O "$out" "$out/.config" "${configs[@]}") >"$out/merge.log" 2>&1
		make -C "$tree" ARCH=um O="$out" -s olddefconfig >&2
		hash_files "${configs[@]}" >"$out/.config.key"
	fi
	say "building User Mode Linux $version, $variant"
	nice make -C "$tree" ARCH=um O="$out" -s -j"$(nproc)" linux >"$out/make.log" 2>&1 ||
		{ grep -E 'error|Error|undefined' "$out/make.log" | head -n 40 >&2; die "build failed: $out/make.log"; }
	mkdir -p "$(dirname "$result")"
	cp "$out/linux" "$result.tmp"
	strip --strip-debug "$result.tmp"
	cp "$out/.config" "$(dirname "$result")/config"
	mv "$result.tmp" "$result"
	echo "$result"
}

main() {
	local what=${1:-} series=${2:-} variant=fsnotify
	[ -n "$what" ] && [ -n "$series" ] || usage
	shift 2
	while [ $# -gt 0 ]; do
		case $1 in
		--variant) variant=${2:-}; shift ;;
		--variant=*) variant=${1#*=} ;;
		--update) UPDATE=1 ;;
		*) usage ;;
		esac
		shift
	done
	case $variant in plain | fsnotify | core | debug) ;; *) usage ;; esac
	series_release "$series" >/dev/null

	case $what in
	uml) build_uml "$series" "$variant" ;;
	source) mkdir -p "$CACHE"; lock "source-$series"; kernel_source "$series" ;;
	*) usage ;;
	esac
}

# A script that is changed while it runs goes on as it was.
main "$@"
exit
