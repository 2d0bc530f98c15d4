# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
# Shared by the scripts that fetch and build: the cache, Debian packages and
# sources of any release, kernel sources and the patch series. Source it, do not
# run it.

set -euo pipefail

KERNEL_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/virtiofsd-ts

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { say "$*"; exit 1; }

# A directory made under a temporary name and renamed when complete, so that an
# interrupted run never leaves a half-filled one behind.
publish() { # TEMPORARY FINAL
	rm -rf "$2"
	mkdir -p "$(dirname "$2")"
	mv "$1" "$2"
}

# Hold a lock of the cache for the rest of this (sub)shell: several callers may
# build at once, the second then finds what the first one made.
lock() { # NAME
	mkdir -p "$CACHE/lock"
	exec {LOCK_FD}>"$CACHE/lock/$1"
	flock -n "$LOCK_FD" || { say "waiting for another build of $1"; flock "$LOCK_FD"; }
}

# What interrupted runs left behind.
clean_cache() {
	find "$CACHE" -maxdepth 1 -name 'tmp.*' -mmin +300 -exec rm -rf {} + 2>/dev/null || true
}

need_tools() { # COMMAND=PACKAGE...
	local pair missing=()
	for pair; do
		case $pair in
		/*) [ -e "${pair%%=*}" ] || missing+=("${pair#*=}") ;;
		*) command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}") ;;
		esac
	done
	[ ${#missing[@]} = 0 ] && return
	say "needs ${missing[*]}: installing with apt-get"
	[ "$(id -u)" = 0 ] || die "not root: please install: ${missing[*]}"
	{
		DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}" ||
		{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"; }
	} >&2
}

BUILD_TOOLS=(gcc=gcc make=make flex=flex bison=bison bc=bc xz=xz-utils patch=patch
	perl=perl /usr/include/libelf.h=libelf-dev /usr/include/openssl/ssl.h=libssl-dev
	cpio=cpio zstd=zstd)

# apt-get for one Debian release, with lists, cache and state of its own: the
# machine's own package lists stay as they are. The mirror is the machine's own.
# RELEASE/source is about its source packages instead, RELEASE/arm64 about those
# of that architecture.
debian_apt() { # RELEASE(bullseye|bookworm|trixie|sid)[/source|/ARCHITECTURE] ARGUMENT...
	local release=${1%/*} state=$CACHE/apt/${1/\//-} type=deb mirror security suite architecture=()
	case $1 in
	*/source) type=deb-src ;;
	*/*) architecture=(-o "APT::Architecture=${1#*/}" -o "APT::Architectures=${1#*/}") ;;
	esac
	shift
	mkdir -p "$state"/{etc,lists/partial,cache/archives/partial}
	if [ ! -s "$state/etc/sources.list" ]; then
		mirror=$(apt-get indextargets --format '$(REPO_URI)|$(LABEL)' 'Created-By: Packages' |
			sed -n 's/|Debian$//p' | head -n1)
		security=$(apt-get indextargets --format '$(REPO_URI)|$(LABEL)' 'Created-By: Packages' |
			sed -n 's/|Debian-Security$//p' | head -n1)
		[ -n "$mirror" ] || die "no Debian mirror in this machine's apt configuration"
		{
			echo "$type [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release main"
			if [ "$release" != sid ]; then
				for suite in updates backports; do
					# It has gone from the mirrors.
					[ "$release-$suite" != bullseye-backports ] || continue
					echo "$type [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release-$suite main"
				done
				[ -z "$security" ] ||
				echo "$type [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $security $release-security main"
			fi
		} >"$state/etc/sources.list"
	fi
	: >"$state/status"
	"$@" "${architecture[@]}" \
		-o "Dir::Etc::SourceList=$state/etc/sources.list" \
		-o Dir::Etc::SourceParts=- \
		-o "Dir::State=$state" -o "Dir::State::Lists=$state/lists" \
		-o "Dir::State::status=$state/status" \
		-o "Dir::Cache=$state/cache" \
		-o Acquire::Languages=none -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0
}

debian_update() { # RELEASE
	say "reading the package lists of Debian $1"
	debian_apt "$1" apt-get -q update >&2
}

# Newest version of a package in a release (empty: no such package); of those
# that start with PREFIX.
debian_version() { # RELEASE[/source] PACKAGE [PREFIX]
	[ -n "$(ls "$CACHE/apt/${1/\//-}/lists" 2>/dev/null | grep -e Packages -e Sources)" ] || debian_update "$1"
	debian_apt "$1" apt-cache madison "$2" | awk -F' *[|] *' -v prefix="${3:-}" 'index($2, prefix) == 1 || prefix == "" {print $2}' |
		while read -r v; do
			[ -n "${best:-}" ] && dpkg --compare-versions "$v" lt "$best" || best=$v
			echo "$best"
		done | tail -n1
}

# Fetch PACKAGE[=VERSION] of a release and unpack it into a folder of the cache,
# whose path is printed.
debian_package() { # RELEASE PACKAGE VERSION
	local out="$CACHE/deb/$2_$3" tmp
	if [ ! -d "$out" ]; then
		tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
		say "fetching $2 $3 (Debian $1)"
		(cd "$tmp" && debian_apt "$1" apt-get -q download "$2=$3" >&2) ||
		{ debian_update "$1"; (cd "$tmp" && debian_apt "$1" apt-get -q download "$2=$3" >&2); }
		mkdir "$tmp/root"
		dpkg-deb -x "$tmp"/*.deb "$tmp/root"
		publish "$tmp/root" "$out"
		rm -rf "$tmp"
	fi
	echo "$out"
}

# A program of a release with everything that it depends on, unpacked into
# FOLDER, and FOLDER/run, which runs it with that folder's own loader and
# libraries: nothing of it is installed. ARGUMENTS go before those of the caller
# and ENVIRONMENT is NAME=VALUE words; both are shell, in which $folder is FOLDER.
debian_program() { # FOLDER RELEASE PACKAGE=VERSION PROGRAM [ARGUMENTS [ENVIRONMENT]]
	local folder=$1 release=$2 package=$3 program=$4 arguments=${5:-} environment=${6:-} tmp deb loader
	tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
	mkdir -p "$tmp/deb/partial" "$tmp/root"
	say "fetching ${package/=/ } (Debian $release) and its libraries"
	debian_apt "$release" apt-get -q -y install --download-only --no-install-recommends \
		-o "Dir::Cache::archives=$tmp/deb/" "$package" >"$tmp/log" 2>&1 ||
		{ tail -n 3 "$tmp/log" >&2; die "cannot fetch $package"; }
	for deb in "$tmp"/deb/*.deb; do
		dpkg-deb -x "$deb" "$tmp/root"
	done
	loader=$(cd "$tmp/root" && find . -name 'ld-linux-x86-64.so.2' -printf '%P\n' | head -n1)
	cat >"$tmp/root/run" <<-RUN
	#!/bin/sh
	folder='$folder'
	${environment:+export $environment}
	exec "\$folder/$loader" --library-path "\$folder/usr/lib/x86_64-linux-gnu:\$folder/lib/x86_64-linux-gnu" \\
	    "\$folder/$program" $arguments "\$@"
	RUN
	chmod 755 "$tmp/root/run"
	publish "$tmp/root" "$folder"
	rm -rf "$tmp"
}

# A source package with Debian's patches applied, unpacked into the cache; prints
# its path. Versions have a colon, which search paths do not like: it goes.
debian_source() { # RELEASE PACKAGE VERSION
	local out=$CACHE/source/$2-${3#*:} tmp
	if [ ! -d "$out" ]; then
		need_tools dpkg-source=dpkg-dev patch=patch xz=xz-utils
		tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
		say "fetching the source of $2 $3 (Debian $1)"
		(cd "$tmp" && debian_apt "$1/source" apt-get -q source --download-only "$2=$3") >"$tmp/log" 2>&1 ||
			{ tail -n 3 "$tmp/log" >&2; die "cannot fetch the source of $2 $3"; }
		say "unpacking it"
		(cd "$tmp" && dpkg-source --no-check -x ./*.dsc tree) >"$tmp/log" 2>&1 ||
			{ tail -n 3 "$tmp/log" >&2; die "cannot unpack the source of $2 $3"; }
		publish "$tmp/tree" "$out"
		rm -rf "$tmp"
	fi
	echo "$out"
}

# The Debian release that has linux-source of a series.
series_release() { # SERIES
	case $1 in
	6.1) echo bookworm ;;
	6.12) echo bookworm ;; # bookworm-backports
	7.2) echo sid ;;
	*) die "unknown kernel series $1 (known: 6.1 6.12 7.2)" ;;
	esac
}

# The pristine source tree of a series; prints its path. The newest version
# found on the mirror once is kept until --update.
kernel_source() { # SERIES
	local series=$1 release version tree tmp pkg
	release=$(series_release "$series")
	if [ -s "$CACHE/source/$series.version" ] && [ -z "${UPDATE:-}" ]; then
		version=$(cat "$CACHE/source/$series.version")
	else
		[ -z "${UPDATE:-}" ] || debian_update "$release"
		version=$(debian_version "$release" "linux-source-$series")
		[ -n "$version" ] || die "Debian $release has no linux-source-$series"
	fi
	tree=$CACHE/source/$version
	if [ ! -d "$tree" ]; then
		pkg=$(debian_package "$release" "linux-source-$series" "$version")
		say "unpacking the source of $version"
		tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
		tar -C "$tmp" --strip-components=1 -xf "$pkg/usr/src/linux-source-$series.tar.xz"
		publish "$tmp" "$tree"
		rm -rf "$pkg"
	fi
	echo "$version" >"$CACHE/source/$series.version"
	echo "$tree"
}

# The patch files of a series for a variant, one a line, in order.
series_patches() { # SERIES VARIANT
	local dir=$KERNEL_DIR/patches/$1
	[ "$2" = plain ] && return
	find "$dir" -maxdepth 1 -name '0*.patch' ! -name '0000-*' | sort
	[ "$2" != core ] || find "$dir/core" -maxdepth 1 -name '0*.patch' ! -name '0000-*' | sort
}

# Bring a work tree to "pristine + patches", touching only files whose content
# changes, so that make rebuilds no more than needed.
sync_tree() { # PRISTINE TREE PATCH...
	local pristine=$1 tree=$2 tmp file
	shift 2
	[ -d "$tree" ] || {
		tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
		cp -al "$pristine/." "$tmp"
		publish "$tmp" "$tree"
	}
	tmp=$(mktemp -d "$CACHE/tmp.XXXXXX")
	{
		cat "$tree/.patched" 2>/dev/null || true
		[ $# = 0 ] || sed -n 's,^+++ b/\([^\t]*\).*,\1,p' "$@"
	} | sort -u >"$tmp/.patched"
	while read -r file; do
		mkdir -p "$tmp/$(dirname "$file")"
		[ ! -e "$pristine/$file" ] || cp "$pristine/$file" "$tmp/$file"
	done <"$tmp/.patched"
	for file; do
		patch -d "$tmp" -p1 -s -f <"$file" >&2 || die "$file does not apply to $pristine"
	done
	# Noted first: an interrupted run must not forget what it has changed.
	cp "$tmp/.patched" "$tree/.patched"
	while read -r file; do
		if [ ! -e "$tmp/$file" ]; then
			rm -f "$tree/$file"
		elif ! cmp -s "$tmp/$file" "$tree/$file"; then
			rm -f "$tree/$file" # it may be a hard link into the pristine tree
			cp "$tmp/$file" "$tree/$file"
		fi
	done <"$tmp/.patched"
	rm -rf "$tmp"
}

hash_files() { # FILE...
	cat "$@" /dev/null | sha256sum | cut -c1-16
}
