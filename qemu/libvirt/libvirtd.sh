#!/bin/sh
# libvirtd without systemd and apart from the machine's own: with its files below FOLDER, in mount and process namespaces of
# its own. Killed, it takes everything with it: guests, daemons, virtlogd.
#
#   libvirtd.sh FOLDER        its socket is FOLDER/run/libvirt/libvirt-sock; FOLDER/vhost-user, if there is one, describes
#                             the vhost-user programs to be found
set -eu

if [ "${2:-}" != inside ]; then
    exec unshare --mount --pid --fork --mount-proc --kill-child --propagation private "$0" "$1" inside
fi
folder=$1
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
echo 'auth_unix_rw = "none"' >etc/libvirtd.conf
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
    cp $modules/accel-*.so modules
    mount --bind modules $modules
fi

virtlogd &
libvirtd &
wait $!
