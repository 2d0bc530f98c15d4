// The launcher's two files: sandbox.c (processes, namespaces, privileges) and filter.c (system calls).
#pragma once

// Writes the seccomp filter for an action ("kill", "log", "trap", or "chroot": all is allowed but chroot(2)) as BPF to `fd`.
// It is for the process that calls this: process ids are compared with its own. Negative: it cannot be made.
int write_filter(const char *action, int fd);

// Makes io_uring_setup fail for this process and the program that it becomes: through a ring libuv (Node 22 and later) would go on to
// make system calls that no filter sees. Needs no_new_privs. Negative: it cannot be done.
int refuse_rings(void);
