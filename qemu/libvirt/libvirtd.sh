#!/bin/sh
# libvirtd without systemd and apart from the machine's own: with its files below FOLDER, in mount and process namespaces of
# its own. Killed, it takes everything with it: guests, daemons, virtlogd.
#
#   libvirtd.sh FOLDER [ROOT] its socket is FOLDER/run/libvirt/libvirt-sock; FOLDER/vhost-user, if there is one, describes
#                             the vhost-user programs to be found; the programs are those of another Debian in ROOT, which
#                             sees of this one the repository, the folder around FOLDER, and those in $SHARED
set -eu

script=$(realpath "$0")
if [ "${2:-}" != inside ]; then
    exec unshare --mount --pid --uts --fork --mount-proc --kill-child --propagation private "$script" "$1" inside "${2:-}"
fi
folder=$1
root=${3:-}
if [ -n "$root" ]; then
    # What it has of this machine: the devices, its own programs' folder, and the one that its FOLDER is in.
    repository=${script%/qemu/*}
    mount --bind "$root" "$root"
    cd "$root"
    mount --rbind /dev dev
    mount --rbind /sys sys
    mount -t proc proc proc
    mount -t tmpfs tmpfs tmp
    for shared in "$repository" "${folder%/*}" ${SHARED:-}; do
        mkdir -p "./$shared" old
        mount --bind "$shared" "./$shared"
    done
    pivot_root . old
    umount -l old
fi
# Two of them that a guest goes between want to have different names.
basename "$folder" >/proc/sys/kernel/hostname
mkdir -p "$folder/etc" "$folder/var" "$folder/run/libvirt"
cd "$folder"

cat >etc/qemu.conf <<END
user = "root"
group = "root"
namespaces = [ ]
cgroup_controllers = [ ]
security_driver = "none"
remember_owner = 0
END
printf 'auth_unix_rw = "none"\nhost_uuid = "%s"\n' "$(cat /proc/sys/kernel/random/uuid)" >etc/libvirtd.conf
: >etc/virtlogd.conf
# It wants to know this user even if it is not to be used.
for file in passwd group; do
    { cat /etc/$file; grep -q ^libvirt-qemu: /etc/$file || echo 'libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin'; } >etc/$file
done
sed -i 's/^\(libvirt-qemu:x:64055:\).*/\1/' etc/group
# A /dev/kvm that opens but does not work costs a minute.
: >etc/kvm
chmod 0 etc/kvm

mount --bind etc /etc/libvirt
mount --bind etc/passwd /etc/passwd
mount --bind etc/group /etc/group
[ ! -e /dev/kvm ] || mount --bind etc/kvm /dev/kvm
for dir in lib cache log; do
    mkdir -p var/$dir
    mount --bind var/$dir /var/$dir
done
if [ -d vhost-user ]; then
    mkdir -p /usr/share/qemu/vhost-user
    mount --bind vhost-user /usr/share/qemu/vhost-user
fi
mount --bind run /run
# Of the installed QEMU's modules only what it cannot do without: another version would take the others for its own.
modules=/usr/lib/x86_64-linux-gnu/qemu
if [ -d $modules ]; then
    mkdir modules
    find $modules -name 'accel-*.so' -exec cp -t modules {} +
    mount --bind modules $modules
fi

virtlogd &
libvirtd &
wait $!
