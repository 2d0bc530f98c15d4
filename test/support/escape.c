// Tries to get out of the sandbox, in the daemon's place: started by the launcher with the daemon's flags and nothing else.
//   escape SHARE FILTER-FD|-1 ROOT|- HOST-PID HANDLE-HEX|- [ATTEMPT...]
// ROOT: a directory to chroot to first, as the daemon does. Each attempt prints "NAME RESULT": 0 when it got through, else an errno.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/mount.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *share, *handle;
static int host_pid, share_fd;
extern char **environ;

static int opened(int fd) {
  if (fd >= 0) close(fd);
  return fd;
}

static int host_file(void) { return opened(open("/etc/passwd", O_RDONLY)); }
static int host_directory(void) { return opened(open("/home", O_PATH)) >= 0 || opened(open("/var", O_PATH)) >= 0 ? 0 : -1; }
static int above_the_share(void) { return opened(openat(share_fd, "../../../../../../etc/passwd", O_RDONLY)); }

static int above_a_descriptor(void) {
  for (int fd = 0; fd < 1024; fd++)
    if (fcntl(fd, F_GETFD) >= 0 && opened(openat(fd, "../../../../../../../../../etc/passwd", O_RDONLY)) >= 0) return 0;
  errno = ENOENT;
  return -1;
}

static int root_of_another(void) {
  const char *paths[] = {"/proc/1/root/etc/passwd", "/proc/1/cwd/etc/passwd", "/proc/self/root/etc/passwd"};
  for (int i = 0; i < 3; i++)
    if (opened(open(paths[i], O_RDONLY)) >= 0) return 0;
  return -1;
}

static int other_processes(void) {
  char path[64];
  snprintf(path, sizeof(path), "/proc/%d/status", host_pid);
  return opened(open(path, O_RDONLY));
}

static int kernel_settings(void) {
  const char *paths[] = {"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sysrq-trigger", "/sys/kernel/uevent_helper", "/proc/self/oom_score_adj"};
  for (int i = 0; i < 5; i++)
    if (opened(open(paths[i], O_WRONLY)) >= 0) return 0;
  return -1;
}

static int kernel_memory(void) {
  return opened(open("/dev/mem", O_RDONLY)) >= 0 || opened(open("/proc/kcore", O_RDONLY)) >= 0 || opened(open("/dev/kmsg", O_RDONLY)) >= 0 ? 0 : -1;
}

// With CAP_MKNOD a device can be made in the share: the guest may, and it must be good for nothing here.
static int device_in_the_share(void) {
  struct stat disk;
  dev_t device = stat(share, &disk) == 0 && major(disk.st_dev) != 0 ? disk.st_dev : makedev(1, 3);
  mode_t type = device == makedev(1, 3) ? S_IFCHR : S_IFBLK;
  if (mknodat(share_fd, "disk", type | 0600, device) < 0) return -1;
  int result = opened(openat(share_fd, "disk", O_RDONLY));
  int error = errno;
  unlinkat(share_fd, "disk", 0);
  errno = error;
  return result;
}

static int file_in_the_root(void) { return opened(open("/written", O_CREAT | O_WRONLY, 0600)); }

static int own_code(void) {
  char path[4096];
  ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);
  if (n < 0) return -1;
  path[n] = 0;
  return fchmodat(AT_FDCWD, path, 0777, 0) == 0 ? 0 : opened(open(path, O_WRONLY | O_APPEND));
}

static int by_handle(void) {
  struct {
    struct file_handle head;
    unsigned char bytes[128];
  } file;
  unsigned n = strlen(handle) / 2;
  for (unsigned i = 0; i < n; i++) {
    unsigned byte;
    sscanf(handle + 2 * i, "%2x", &byte);
    ((unsigned char *)&file)[i] = byte;
  }
  int mount = openat(share_fd, ".", O_RDONLY | O_DIRECTORY);
  return opened(open_by_handle_at(mount, &file.head, O_RDONLY));
}

// With a filter everything about sockets is forbidden; without one there is nobody to reach.
static int connect_to(int family, const void *address, socklen_t length) {
  int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  int result = connect(fd, address, length), error = errno;
  close(fd);
  errno = error;
  return result;
}

static int host_tcp(void) {
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(getenv("HOST_PORT"))), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  return connect_to(AF_INET, &to, sizeof(to));
}

static int host_abstract(void) {
  struct sockaddr_un to = {.sun_family = AF_UNIX};
  int n = snprintf(to.sun_path + 1, sizeof(to.sun_path) - 1, "%s", getenv("HOST_ABSTRACT"));
  return connect_to(AF_UNIX, &to, offsetof(struct sockaddr_un, sun_path) + 1 + n);
}

static int host_unix(void) {
  struct sockaddr_un to = {.sun_family = AF_UNIX};
  snprintf(to.sun_path, sizeof(to.sun_path), "%s", getenv("HOST_SOCKET"));
  return connect_to(AF_UNIX, &to, sizeof(to));
}

static int packets(void) { return opened(socket(AF_PACKET, SOCK_RAW, htons(3))); }

static int run_shell(void) {
  pid_t child = fork();
  if (child < 0) return -1;
  if (child == 0) {
    execl("/bin/sh", "sh", "-c", "true", NULL);
    _exit(errno);
  }
  int status;
  waitpid(child, &status, 0);
  errno = WEXITSTATUS(status);
  return errno == 0 ? 0 : -1;
}

static int run_in_place(void) {
  char *argv[] = {"sh", NULL};
  return execve("/bin/sh", argv, environ);
}

static int kill_host(void) { return kill(host_pid, 0); }
static int kill_launcher(void) { return kill(1, SIGKILL) == 0 && getppid() != 1 ? 0 : (errno = EPERM, -1); }
static int kill_all(void) { return kill(-1, 0); }
static int trace_host(void) { return ptrace(PTRACE_ATTACH, host_pid, 0, 0); }
static int trace_launcher(void) { return ptrace(PTRACE_ATTACH, 1, 0, 0); }

static int read_host(void) {
  char byte;
  struct iovec here = {&byte, 1}, there = {(void *)0x400000, 1};
  return process_vm_readv(host_pid, &here, 1, &there, 1, 0);
}

static int pidfd_of_host(void) { return opened(syscall(SYS_pidfd_open, host_pid, 0)); }
static int mount_something(void) { return mount("none", share, "tmpfs", 0, NULL); }
static int mount_proc(void) { return mount("none", share, "proc", 0, NULL); }
static int make_writable(void) { return mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL); }
static int unmount_root(void) { return umount2("/", MNT_DETACH) == 0 || umount2(share, MNT_DETACH) == 0 ? 0 : -1; }
static int new_namespace(void) { return unshare(CLONE_NEWNS); }

// A user namespace makes everybody root in it; nothing hidden may come to light by that.
static int user_namespace(void) {
  pid_t child = fork();
  if (child < 0) return -1;
  if (child == 0) {
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0) _exit(errno);
    umount2("/proc", MNT_DETACH);
    umount2(share, MNT_DETACH);
    mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL);
    if (umount2("/", MNT_DETACH) == 0 && open("/etc/passwd", O_RDONLY) >= 0) _exit(0);
    _exit(open("/etc/passwd", O_RDONLY) >= 0 || open("/written", O_CREAT | O_WRONLY, 0600) >= 0 ? 0 : errno);
  }
  int status;
  waitpid(child, &status, 0);
  errno = WEXITSTATUS(status);
  return errno == 0 ? 0 : -1;
}

// The classic: a second root below the first one, and ".." from a directory above it.
static int chroot_out(void) {
  mkdirat(share_fd, "jail", 0700);
  int here = open(".", O_PATH);
  char path[4096];
  snprintf(path, sizeof(path), "%s/jail", strcmp(share, "/") == 0 ? "" : share);
  int result = chroot(path), error = errno;
  unlinkat(share_fd, "jail", AT_REMOVEDIR);
  errno = error;
  if (result < 0) return -1;
  if (fchdir(here) < 0) return -1;
  for (int i = 0; i < 64; i++)
    if (chdir("..") < 0) return -1;
  return chroot(".") < 0 ? -1 : opened(open("/etc/passwd", O_RDONLY));
}

static int load_module(void) { return syscall(SYS_init_module, "x", 1ul, ""); }
static int load_module_file(void) { return syscall(SYS_finit_module, share_fd, "", 0); }
static int ports(void) { return ioperm(0x80, 1, 1); }
static int restart(void) { return reboot(RB_DISABLE_CAD); }
static int swap(void) { return syscall(SYS_swapon, share, 0); }
static int host_name(void) { return sethostname("escaped", 7); }
static int host_clock(void) { return syscall(SYS_settimeofday, &(struct timeval){1, 0}, NULL); }
static int type_in_terminal(void) { return ioctl(0, TIOCSTI, "x") == 0 || ioctl(2, TIOCSTI, "x") == 0 ? 0 : -1; }
static int more_rights(void) { return prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0 || prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 21, 0, 0) == 0 ? 0 : -1; }
static int ring(void) { return opened(syscall(SYS_io_uring_setup, 8, (char[256]){0})); }
static int bpf(void) { return opened(syscall(SYS_bpf, 0, (char[128]){2, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 1}, 128)); }

static const struct {
  const char *name;
  int (*attempt)(void);
} ATTEMPTS[] = {
    {"host_file", host_file}, {"host_directory", host_directory}, {"above_the_share", above_the_share}, {"above_a_descriptor", above_a_descriptor},
    {"root_of_another", root_of_another}, {"other_processes", other_processes}, {"kernel_settings", kernel_settings}, {"kernel_memory", kernel_memory},
    {"device_in_the_share", device_in_the_share}, {"file_in_the_root", file_in_the_root}, {"own_code", own_code}, {"by_handle", by_handle},
    {"host_tcp", host_tcp}, {"host_abstract", host_abstract}, {"host_unix", host_unix}, {"packets", packets}, {"run_shell", run_shell},
    {"run_in_place", run_in_place}, {"kill_host", kill_host}, {"kill_launcher", kill_launcher}, {"kill_all", kill_all}, {"trace_host", trace_host},
    {"trace_launcher", trace_launcher}, {"read_host", read_host}, {"pidfd_of_host", pidfd_of_host}, {"mount_something", mount_something},
    {"mount_proc", mount_proc}, {"make_writable", make_writable}, {"unmount_root", unmount_root}, {"new_namespace", new_namespace},
    {"user_namespace", user_namespace}, {"chroot_out", chroot_out}, {"load_module", load_module}, {"load_module_file", load_module_file},
    {"ports", ports}, {"restart", restart}, {"swap", swap}, {"host_name", host_name}, {"host_clock", host_clock},
    {"type_in_terminal", type_in_terminal}, {"more_rights", more_rights}, {"ring", ring}, {"bpf", bpf},
};

int main(int argc, char **argv) {
  if (argc < 6) return 2;
  int filter = atoi(argv[2]);
  share = argv[1];
  host_pid = atoi(argv[4]);
  handle = argv[5];
  share_fd = open(share, O_PATH | O_DIRECTORY);
  if (share_fd < 0) return perror("share"), 3;
  if (strcmp(argv[3], "-") != 0) {
    if (fchdir(share_fd) < 0 || chroot(".") < 0) return perror("chroot"), 3;
    share = "/";
  }
  if (filter >= 0) {
    static struct sock_filter code[4096];
    struct sock_fprog program = {pread(filter, code, sizeof(code), 0) / sizeof(struct sock_filter), code};
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0) return perror("filter"), 3;
  }
  for (size_t i = 0; i < sizeof(ATTEMPTS) / sizeof(ATTEMPTS[0]); i++) {
    int wanted = argc == 6;
    for (int j = 6; j < argc; j++) wanted |= strcmp(argv[j], ATTEMPTS[i].name) == 0;
    if (!wanted) continue;
    errno = 0;
    int result = ATTEMPTS[i].attempt();
    printf("%s %d\n", ATTEMPTS[i].name, result >= 0 ? 0 : errno);
    fflush(stdout);
  }
  return 0;
}
