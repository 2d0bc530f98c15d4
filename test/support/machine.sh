#!/bin/bash
# A machine inside this one, with systemd as its first process: the files are this host's, and what is changed in them is in memory
# and gone with it. Of the host's own services none is started. Needs root and Debian's systemd. Ends when it is killed.
#   [ROOT=FOLDER [CHANGED=1]] machine.sh [HIDDEN...]
#       HIDDEN: folders of the host that are empty in the machine
#       FOLDER: the files of another Debian, with systemd, instead of this host's; with CHANGED=1 what is changed is changed in it
set -eu
case ${STAGE:-} in
'')
    # Nothing that is mounted here is seen outside.
    STAGE=groups exec unshare --mount --propagation private bash "$0" "$@"
    ;;
groups)
    # A control group of its own, which the machine takes for the root of them all.
    mount -t cgroup2 none /mnt
    group=/mnt/machine-$$
    mkdir "$group"
    trap : TERM
    (
        echo "$BASHPID" >"$group/cgroup.procs"
        STAGE=machine exec unshare --cgroup --mount --pid --uts --ipc --fork --kill-child bash "$0" "$@"
    ) &
    wait $! || { kill -KILL $! 2>/dev/null; wait $! || true; }
    # What was in it takes a moment to end.
    for ((i = 0; i < 100; i++)); do
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null && break
        sleep 0.1
    done
    ;;
machine)
    mount -t tmpfs -o mode=755 machine /mnt
    cd /mnt
    mkdir upper work root
    own=etc/systemd/system
    if [ -n "${CHANGED:-}" ]; then
        mount --bind "$ROOT" root
        own=
    else
        mount -t overlay -o lowerdir="${ROOT:-/}",upperdir=upper,workdir=work machine root
    fi
    cd root
    mount -t proc proc proc
    mount -t sysfs -o ro sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    # The kernel's variables are the host's.
    mount --bind -o ro proc/sys proc/sys
    for at in run tmp dev $own "$@"; do
        # What is hidden may be in one that has just become empty.
        mkdir -p "./$at"
        mount -t tmpfs -o mode=755 tmpfs "./$at"
    done
    chmod 1777 tmp
    for unit in systemd-modules-load.service systemd-journald-audit.socket; do ln -sf /dev/null "etc/systemd/system/$unit"; done
    for device in null zero full random urandom tty; do
        touch "dev/$device"
        mount --bind "/dev/$device" "dev/$device"
    done
    ln -s /proc/self/fd dev/fd
    mkdir -p dev/pts dev/shm old
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
    ln -s pts/ptmx dev/ptmx
    pivot_root . old
    umount -l /old
    exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=basic.target </dev/null
    ;;
esac
