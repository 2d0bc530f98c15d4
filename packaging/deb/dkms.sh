#!/bin/bash
# Builds build/deb/virtiofs-fsnotify-dkms_VERSION_all.deb: fs/fuse of Debian's 6.1 and 6.12 kernels with remote fsnotify, which DKMS
# compiles for each kernel of these series on the machine (a guest) that it is installed on.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=common.sh
. packaging/deb/common.sh
# shellcheck source=../../qemu/guest/kernel/lib.sh
. qemu/guest/kernel/lib.sh

name=virtiofs-fsnotify
root=$PWD/build/deb/$name-dkms
src=$root/usr/src/$name-$VERSION
rm -rf "$root"
install -d "$src" "$root/usr/lib/$name"
for series in 6.1 6.12; do
    mapfile -t patches < <(series_patches "$series" fsnotify)
    install -d "$src/$series/fs"
    cp -r "$(kernel_source "$series")/fs/fuse" "$src/$series/fs/"
    for patch in "${patches[@]}"; do
        patch -d "$src/$series" -p1 -s -f --no-backup-if-mismatch <"$patch" || die "$patch does not apply"
    done
    mv "$src/$series/fs/fuse" "$src/$series/fuse"
    rmdir "$src/$series/fs"
done
cp -r qemu/guest/kernel/combined "$src/"
cp packaging/deb/dkms/prepare.sh "$src/"
sed "s/@NAME@/$name/g; s/@VERSION@/$VERSION/g" packaging/deb/dkms/dkms.conf >"$src/dkms.conf"
find "$root" -type f -exec chmod 644 {} +
chmod 755 "$src/prepare.sh" "$src/combined/combine.sh"
install -m 755 qemu/guest/kernel/dkms/boot.sh "$root/usr/lib/$name/boot.sh"
documents "$root" $name-dkms GPL-2.0

control "$root" <<CONTROL
Package: $name-dkms
Version: $VERSION
Architecture: all
Depends: dkms
Recommends: linux-headers-amd64 | linux-headers-cloud-amd64
Section: kernel
Description: file events of virtio-fs for guests (kernel modules, DKMS)
 For the guest: fuse and virtiofs of Linux 6.1 and 6.12 with remote fsnotify.
 What changes on the host arrives as inotify and fanotify events, if the host
 shares the directory with virtiofsd-ts.
 .
 Kernels that have fuse built in get one module vfuse and a kernel parameter
 by which their own fuse stays away, so they must be started anew once.
CONTROL
for script in postinst prerm postrm; do
    sed "s/@NAME@/$name/g; s/@VERSION@/$VERSION/g" "packaging/deb/dkms/$script" >"$root/DEBIAN/$script"
    chmod 755 "$root/DEBIAN/$script"
done
pack "$root"
