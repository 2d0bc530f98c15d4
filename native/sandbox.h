// The launcher's two files: sandbox.c (processes, namespaces, privileges) and filter.c (system calls).
#pragma once

// Writes the seccomp filter for an action ("kill", "log", "trap", or "chroot": all is allowed but chroot(2)) as BPF to `fd`.
// It is for the process that calls this: process ids are compared with its own. Negative: it cannot be made.
int write_filter(const char *action, int fd);
