#!/bin/sh
# Provides what a guest is booted from, and says on stderr what it fetches and why.
#
#   setup.sh qemu      QEMU and Debian's stock cloud kernel 6.1
#   setup.sh uml       Debian's prebuilt User Mode Linux 6.1
#   setup.sh openrc    Debian's OpenRC, for the test of the agent's script
#   setup.sh prometheus  Debian's Prometheus, for the test of monitoring/
#   setup.sh packages "reason" PACKAGE...      only installs the packages that are missing
#
# stdout is for the caller: one line `name=path` for each thing provided. What only the guest needs is unpacked into the
# cache and not installed, so that the host keeps its own kernel and its own busybox.
# The second call finds everything in place and takes a few milliseconds.
set -eu

cache=${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/virtiofsd-ts/guest

say() { echo "set-up: $*" >&2; }
die() { say "$*"; exit 1; }

case ${1:-} in
    packages) command -v apt-get >/dev/null || { shift 2; die "without Debian's apt-get these have to be installed by hand: $*"; } ;;
    *)
        [ "$(uname -m)" = x86_64 ] || die "the guests are x86-64 and need an x86-64 host; this one is $(uname -m)"
        command -v apt-get >/dev/null || die "this needs Debian's apt-get to fetch QEMU and guest kernels; set the guests up on Debian 12"
        ;;
esac

# Runs apt-get quietly, as root where that is needed; it waits for another apt-get rather than fail on its lock.
apt() {
    if [ "$(id -u)" = 0 ] || [ "$1" = download ]; then set -- apt-get "$@"; else set -- sudo apt-get "$@"; fi
    DEBIAN_FRONTEND=noninteractive "$@" -qq -o DPkg::Lock::Timeout=600 -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0 >"$log" 2>&1
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT TERM

# Runs a function that uses apt-get, once more after `apt-get update` if it fails: the package lists of a fresh machine are
# missing or stale.
retried() {
    "$@" && return
    say "refreshing the package lists, because that failed"
    apt update || { tail -n 3 "$log" >&2; die "apt-get update failed: check the machine's package sources"; }
    "$@" || { tail -n 3 "$log" >&2; return 1; }
}

# packages REASON PACKAGE...: installs those that are missing.
packages() {
    reason=$1; shift
    packages=
    for p; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || packages="$packages $p"
    done
    [ -n "$packages" ] || return 0
    say "installing$packages ($reason)"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
        die "root is needed to install packages: run as root, or first: apt-get install$packages"
    # shellcheck disable=SC2086 # a list of words
    retried apt install --yes --no-install-recommends $packages || die "cannot install$packages"
}

# unpacked NAME PACKAGE-REGEX REASON: unpacks the newest matching package into the cache and prints the folder.
# What is in the cache already stays in use: remove the folder to move on to a newer package.
unpacked() {
    dir=$cache/$1
    if [ ! -d "$dir" ]; then
        say "fetching $3 into $dir"
        mkdir -p "$cache"
        partial=$(mktemp -d "$cache/partial.XXXXXX")
        retried download "$partial" "$2" && dpkg-deb -x "$partial"/*.deb "$partial/root" || {
            rm -rf "$partial"
            die "cannot fetch the package $2: the machine's package sources must include Debian 12"
        }
        chmod 755 "$partial/root"
        # Two set-ups at once: the first to rename wins, the other's copy is as good.
        mv -T "$partial/root" "$dir" 2>/dev/null || [ -d "$dir" ]
        rm -rf "$partial"
    fi
    echo "$dir"
}

download() {
    name=$(apt-cache pkgnames 2>/dev/null | grep -Ex "$2" | sort -V | tail -n 1)
    [ -n "$name" ] && (cd "$1" && apt download "$name")
}

common() {
    packages "C compiler for the guest's agent, inotifywait for the guest" gcc libc6-dev inotify-tools
    busybox=$(unpacked busybox-1.35 busybox-static "busybox, the guest's shell and tools,")
    echo "busybox=$busybox/bin/busybox"
}

case ${1:-} in
    qemu)
        packages "the guest's machine" qemu-system-x86
        common
        kernel=$(unpacked debian-6.1-cloud 'linux-image-6\.1\.0-[0-9]+-cloud-amd64' "Debian's stock cloud kernel, which the guest boots,")
        echo "kernel=$(echo "$kernel"/boot/vmlinuz-*)"
        echo "modules=$(echo "$kernel"/lib/modules/*)"
        ;;
    uml)
        common
        kernel=$(unpacked debian-6.1-uml user-mode-linux "Debian's User Mode Linux, which the guest is,")
        echo "kernel=$kernel/usr/bin/linux.uml"
        echo "modules=$(echo "$kernel"/usr/lib/uml/modules/*)"
        ;;
    prometheus)
        prometheus=$(unpacked prometheus-2.42 prometheus "Debian's Prometheus")
        echo "prometheus=$prometheus/usr/bin/prometheus"
        echo "promtool=$prometheus/usr/bin/promtool"
        ;;
    openrc)
        for part in openrc librc1 libeinfo1; do
            echo "$part=$(unpacked "$part-0.45" "$part" "Debian's OpenRC ($part)")"
        done
        ;;
    packages) shift; packages "$@" ;;
    *) die "usage: setup.sh qemu|uml|openrc|prometheus, or setup.sh packages REASON PACKAGE..." ;;
esac
