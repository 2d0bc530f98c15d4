// The system calls that the daemon makes once it serves: those that strace saw in the test suites, and near relatives that another
// libc, kernel or version of Node takes in their place. All others end the process, or what else --seccomp says. The filter is made
// here and loaded by the daemon itself, for all its threads, when it is ready: what only its start needs (execve, socket) is then behind it.
#define _GNU_SOURCE
#include "sandbox.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sched.h>
#include <seccomp.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <termios.h>
#include <unistd.h>

// Files of the share, and files of our own that are loaded late (the first line of the log).
static const char *const FILES[] = {
    "access", "close", "copy_file_range", "dup", "faccessat", "faccessat2", "fallocate", "fanotify_init",
    "fanotify_mark", "fchdir", "fchmod", "fchmodat", "fchownat", "fcntl", "fdatasync", "fgetxattr",
    "flistxattr", "flock", "fremovexattr", "fsetxattr", "fstat", "fstatfs", "fsync", "ftruncate",
    "getcwd", "getdents64", "getxattr", "inotify_add_watch", "inotify_init1", "inotify_rm_watch", "linkat", "listxattr",
    "lseek", "lstat", "mkdirat", "mknodat", "name_to_handle_at", "newfstatat", "open", "open_by_handle_at",
    "openat", "pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "read",
    "readlink", "readlinkat", "readv", "removexattr", "renameat", "renameat2", "setxattr", "stat",
    "statfs", "statx", "symlinkat", "syncfs", "umask", "unlinkat", "utimensat", "write",
    "writev",
};

// Sockets that are there: none can be made or connected. Waiting, time, memory, threads.
static const char *const PROCESS[] = {
    "accept4", "getpeername", "getsockname", "getsockopt", "recvmsg", "sendmsg", "setsockopt", "shutdown",
    "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait", "eventfd2", "pipe2", "poll",
    "ppoll", "brk", "madvise", "mmap", "mprotect", "mremap", "munmap", "membarrier",
    "memfd_create", "pkey_alloc", "pkey_free", "pkey_mprotect", "clock_getres", "clock_gettime", "clock_nanosleep", "gettimeofday",
    "nanosleep", "restart_syscall", "futex", "set_robust_list", "rseq", "sched_getaffinity", "sched_yield", "set_tid_address",
    "getcpu", "gettid", "getpid", "getuid", "geteuid", "getgid", "getegid", "setresuid",
    "setresgid", "setgroups", "capget", "capset", "getrandom", "getrusage", "getrlimit", "sysinfo",
    "uname", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "sigaltstack", "exit", "exit_group",
    "sched_getparam", "sched_getscheduler", "sched_get_priority_max", "sched_get_priority_min", "get_robust_list", "getppid", "getgroups", "getresuid",
    "getresgid", "mincore", "time", "times",
};

static const uint32_t IOCTLS[] = {FIONBIO, FIONREAD, FIOCLEX, TCGETS, TIOCGWINSZ, FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR};

static const int PRCTLS[] = {PR_SET_NAME, PR_GET_NAME, PR_GET_SECUREBITS, PR_SET_VMA, PR_SET_TIMERSLACK, PR_CAPBSET_READ};

#define COUNT(list) (sizeof(list) / sizeof((list)[0]))

// Not every architecture has every call: those that it lacks are left out.
static int add(scmp_filter_ctx ctx, uint32_t action, const char *name, unsigned count, const struct scmp_arg_cmp *args) {
  int number = seccomp_syscall_resolve_name(name);
  if (number == __NR_SCMP_ERROR || number < 0) return 0;
  return seccomp_rule_add_array(ctx, action, number, count, args);
}

#define ADD(action, name, ...) add(ctx, action, name, COUNT(((struct scmp_arg_cmp[]){__VA_ARGS__})), (struct scmp_arg_cmp[]){__VA_ARGS__})

static int add_rules(scmp_filter_ctx ctx) {
  int error = 0;
  for (size_t i = 0; i < COUNT(FILES); i++) error |= add(ctx, SCMP_ACT_ALLOW, FILES[i], 0, NULL);
  for (size_t i = 0; i < COUNT(PROCESS); i++) error |= add(ctx, SCMP_ACT_ALLOW, PROCESS[i], 0, NULL);
  // TIOCSTI would type into the terminal that the daemon was started from.
  for (size_t i = 0; i < COUNT(IOCTLS); i++) error |= ADD(SCMP_ACT_ALLOW, "ioctl", SCMP_A1_32(SCMP_CMP_EQ, IOCTLS[i]));
  error |= ADD(SCMP_ACT_ALLOW, "sched_setscheduler", SCMP_A1(SCMP_CMP_EQ, SCHED_BATCH));
  for (size_t i = 0; i < COUNT(PRCTLS); i++) error |= ADD(SCMP_ACT_ALLOW, "prctl", SCMP_A0_32(SCMP_CMP_EQ, PRCTLS[i]));
  // Threads, but no processes and no namespaces. What clone3 is asked for lies in memory that a filter cannot read; libc then uses clone.
  const uint64_t namespaces = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;
  error |= ADD(SCMP_ACT_ALLOW, "clone", SCMP_A0(SCMP_CMP_MASKED_EQ, CLONE_THREAD | namespaces, CLONE_THREAD));
  error |= add(ctx, SCMP_ACT_ERRNO(ENOSYS), "clone3", 0, NULL);
  error |= ADD(SCMP_ACT_ALLOW, "unshare", SCMP_A0(SCMP_CMP_EQ, CLONE_FS));
  // abort(3), and threads of libuv that wake each other; nobody else.
  error |= ADD(SCMP_ACT_ALLOW, "tgkill", SCMP_A0_32(SCMP_CMP_EQ, (uint32_t)getpid()));
  // Limits are read; setting them is for the start.
  error |= ADD(SCMP_ACT_ALLOW, "prlimit64", SCMP_A0_32(SCMP_CMP_EQ, 0), SCMP_A2(SCMP_CMP_EQ, 0));
  // What libuv tries before something older. Its first rings would be there before this filter: see refuse_rings.
  error |= add(ctx, SCMP_ACT_ERRNO(ENOSYS), "io_uring_setup", 0, NULL);
  error |= add(ctx, SCMP_ACT_ERRNO(ENOSYS), "openat2", 0, NULL);
  return error;
}

int refuse_rings(void) {
  scmp_filter_ctx ctx = seccomp_init(SCMP_ACT_ALLOW);
  if (ctx == NULL) return -1;
  int error = seccomp_attr_set(ctx, SCMP_FLTATR_CTL_SSB, 1); // see loadFilter in process.cc
  if (error == 0) error = add(ctx, SCMP_ACT_ERRNO(ENOSYS), "io_uring_setup", 0, NULL);
  if (error == 0) error = seccomp_load(ctx);
  seccomp_release(ctx);
  return error == 0 ? 0 : -1;
}

int write_filter(const char *action, int fd) {
  uint32_t otherwise = SCMP_ACT_KILL_PROCESS;
  if (strcmp(action, "log") == 0) otherwise = SCMP_ACT_LOG;
  if (strcmp(action, "trap") == 0) otherwise = SCMP_ACT_TRAP;
  int only_chroot = strcmp(action, "chroot") == 0;
  scmp_filter_ctx ctx = seccomp_init(only_chroot ? SCMP_ACT_ALLOW : otherwise);
  if (ctx == NULL) return -1;
  // Binary search instead of a list, where a kernel (before 5.11) does not remember what is always allowed.
  int error = only_chroot ? 0 : seccomp_attr_set(ctx, SCMP_FLTATR_CTL_OPTIMIZE, 2);
  // System calls of another architecture (int 0x80) are refused like unknown ones.
  if (error == 0) error = seccomp_attr_set(ctx, SCMP_FLTATR_ACT_BADARCH, only_chroot ? SCMP_ACT_ERRNO(EPERM) : otherwise);
  if (error == 0) error = only_chroot ? add(ctx, SCMP_ACT_ERRNO(EPERM), "chroot", 0, NULL) : add_rules(ctx);
  if (error == 0) error = seccomp_export_bpf(ctx, fd);
  seccomp_release(ctx);
  return error == 0 ? 0 : -1;
}
