// virtiofsd-ts-sandbox: locks a program in and stays as its parent.
//
// Node has a dozen threads before the first line of JavaScript runs, and namespaces, capabilities and roots belong to threads: so the
// daemon makes what it needs from outside (its sockets), becomes this program, and this one starts it again inside.
// Which options mean what was decided before, in src/sandbox.ts; the flags here are internal and the files named are trusted.
//
//   outer      the process that the user (libvirt) started: forwards signals, ends as the daemon ends, removes the sockets then
//   └ inner    --mode namespace only: process 1 of the pid namespace; makes the file tree, keeps the namespaces
//     ├ worker the daemon itself (node)
//     └ keeper made by the worker (keeper.cc): has what the worker has open, for the next one
//
// In the other modes these are the children of outer. Whichever is their parent starts the next worker when one has ended, or is to be
// replaced by a newer program: see "workers" below, and src/RESTART.md.
#define _GNU_SOURCE
#include "sandbox.h"
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <linux/securebits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_LIST = 512 };

// A part of the host's tree that the daemon sees at the same path, read-only.
struct bind {
  const char *path;
  bool executable; // may be mapped executable (node, its libraries, the add-on)
  int tree;        // detached copy of the mount
  bool directory;
};

// A socket in the host's tree, removed at the end if it is still the same.
struct leftover {
  const char *path;
  ino_t inode;
};

static struct {
  bool namespaces;
  const char *share, *share_at;
  bool readonly;
  struct bind binds[MAX_LIST];
  int bind_count;
  const char *uid_map, *gid_map; // lines of /proc/PID/uid_map: no user namespace without them
  const char *new_uid_map, *new_gid_map; // helpers that write what an ordinary user may not
  long set_uid, set_gid;         // ids to take inside the user namespace, or -1
  bool set_caps;
  uint64_t caps;
  const char *seccomp;
  int seccomp_fd;
  int keep[MAX_LIST];
  int keep_count;
  struct leftover leftovers[16];
  int leftover_count;
  char **command;
} options = {.set_uid = -1, .set_gid = -1, .seccomp_fd = -1};

// The first words of every message.
static const char *where = "--sandbox";

static void complain(const char *format, ...) {
  char text[PATH_MAX + 512];
  int n = snprintf(text, sizeof(text), "virtiofsd-ts: %s: ", where);
  va_list list;
  va_start(list, format);
  n += vsnprintf(text + n, sizeof(text) - n, format, list);
  va_end(list);
  if (n > (int)sizeof(text) - 2) n = sizeof(text) - 2;
  text[n++] = '\n';
  if (write(2, text, n) < 0) return; // there is nobody else to tell
}

static void remove_leftovers(void) {
  struct stat now;
  for (int i = 0; i < options.leftover_count; i++) {
    struct leftover *left = &options.leftovers[i];
    if (lstat(left->path, &now) == 0 && S_ISSOCK(now.st_mode) && now.st_ino == left->inode) unlink(left->path);
  }
}

static pid_t outer;

static void fail(void) __attribute__((noreturn));
static void fail(void) {
  if (getpid() == outer) remove_leftovers();
  _exit(1); // parents pass it on
}

#define FAIL(...) (complain(__VA_ARGS__), fail())
#define CHECK(call, ...) ((call) < 0 ? FAIL(__VA_ARGS__) : (void)0)

// --- flags ---

// An eventfd that counts the requests to stop that came before we could take them.
static int stop_fd = -1;

// INODE:PATH; the number is not given to another file while we hold the socket.
static void add_leftover(const char *value) {
  char *end;
  ino_t inode = strtoull(value, &end, 10);
  if (options.leftover_count == 16 || *end != ':') FAIL("--remove %s", value);
  options.leftovers[options.leftover_count++] = (struct leftover){end + 1, inode};
}

static void add_bind(const char *path, bool executable) {
  if (options.bind_count == MAX_LIST) FAIL("too many files to show to the daemon");
  options.binds[options.bind_count++] = (struct bind){path, executable, -1, false};
}

static void parse(int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    const char *flag = argv[i];
    if (strcmp(flag, "--") == 0) {
      options.command = argv + i + 1;
      break;
    }
    if (strcmp(flag, "--readonly") == 0) {
      options.readonly = true;
      continue;
    }
    const char *value = ++i < argc ? argv[i] : "";
    if (strcmp(flag, "--mode") == 0) options.namespaces = strcmp(value, "namespace") == 0;
    else if (strcmp(flag, "--where") == 0) where = value;
    else if (strcmp(flag, "--share") == 0) options.share = value;
    else if (strcmp(flag, "--share-at") == 0) options.share_at = value;
    else if (strcmp(flag, "--bind") == 0) add_bind(value, false);
    else if (strcmp(flag, "--bind-exec") == 0) add_bind(value, true);
    else if (strcmp(flag, "--uid-map") == 0) options.uid_map = value;
    else if (strcmp(flag, "--gid-map") == 0) options.gid_map = value;
    else if (strcmp(flag, "--newuidmap") == 0) options.new_uid_map = value;
    else if (strcmp(flag, "--newgidmap") == 0) options.new_gid_map = value;
    else if (strcmp(flag, "--uid") == 0) options.set_uid = strtol(value, NULL, 10);
    else if (strcmp(flag, "--gid") == 0) options.set_gid = strtol(value, NULL, 10);
    else if (strcmp(flag, "--caps") == 0) options.set_caps = true, options.caps = strtoull(value, NULL, 16);
    else if (strcmp(flag, "--seccomp") == 0) options.seccomp = value;
    else if (strcmp(flag, "--seccomp-fd") == 0) options.seccomp_fd = atoi(value);
    else if (strcmp(flag, "--keep") == 0 && options.keep_count < MAX_LIST) options.keep[options.keep_count++] = atoi(value);
    else if (strcmp(flag, "--remove") == 0) add_leftover(value);
    else if (strcmp(flag, "--stop-fd") == 0) stop_fd = atoi(value);
    else FAIL("unknown flag %s", flag);
  }
  if (options.command == NULL || options.command[0] == NULL) FAIL("started without a command: start virtiofsd-ts instead");
}

// --- descriptors and signals ---

static bool kept(int fd) {
  if (fd <= 2) return true;
  for (int i = 0; i < options.keep_count; i++)
    if (options.keep[i] == fd) return true;
  return false;
}

// Only outer goes on holding what the daemon does not use but the starter wants to stay open: libvirt locks a pid file.
static void close_others(int except) {
  int highest = 2;
  for (int i = 0; i < options.keep_count; i++)
    if (options.keep[i] > highest) highest = options.keep[i];
  if (except > highest) highest = except;
  for (int fd = 3; fd < highest; fd++)
    if (!kept(fd) && fd != except) close(fd);
  syscall(SYS_close_range, (unsigned)highest + 1, ~0u, 0);
}

static sigset_t forwarded;

static void unblock_signals(void) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
}

static void block_signals(void) {
  sigemptyset(&forwarded);
  const int signals[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGCHLD};
  for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++) sigaddset(&forwarded, signals[i]);
  sigprocmask(SIG_SETMASK, &forwarded, NULL);
}

// How long the daemon may take to end. It gives up what it waits for before (END_WITHIN_MS in src/daemon.ts), unless it hangs itself in
// a system call on a file system that does not answer; libvirt would kill us, and nobody remove the sockets, after ten.
enum { END_WITHIN_SECONDS = 8 };

static time_t seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec;
}

static bool ends(int signal) { return signal == SIGTERM || signal == SIGINT || signal == SIGHUP; }

// Returns false when nobody is to be waited for any longer.
static bool too_late(pid_t child, time_t *deadline) {
  static bool killed;
  bool first = !killed;
  killed = true;
  *deadline = seconds() + 1;
  kill(child, SIGKILL);
  if (getpid() != outer) return true;
  if (first) complain("the daemon has not ended within %d seconds (a file system that does not answer?): killed", END_WITHIN_SECONDS);
  // A system call that nothing interrupts (FUSE, once its server has the request): what is left ends with it.
  else complain("the daemon is dead but for a system call that the kernel waits for: not waited for");
  return first;
}

// Waits until inner has ended; what comes meanwhile goes to it. Signals stay blocked: one that came before the child
// is passed on, too, and process 1 of a namespace does not ignore what it blocks. Returns the wait status.
static int supervise_inner(pid_t child) {
  time_t deadline = 0;
  for (;;) {
    int status;
    for (pid_t ended; (ended = waitpid(-1, &status, WNOHANG)) > 0;)
      if (ended == child) return status;
    int signal = sigtimedwait(&forwarded, NULL, deadline != 0 ? &(struct timespec){.tv_sec = 1} : NULL);
    if (deadline != 0 && seconds() >= deadline && !too_late(child, &deadline)) return 1 << 8;
    if (signal <= 0 || signal == SIGCHLD) continue;
    if (ends(signal) && deadline == 0) deadline = seconds() + END_WITHIN_SECONDS;
    kill(child, signal);
  }
}

// A shell's way to say it: process 1 cannot end by a signal itself.
static int exit_code(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status); }

// --- user namespace ---

static void write_file(pid_t pid, const char *name, const char *text) {
  char path[64];
  snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0 || write(fd, text, strlen(text)) < 0)
    FAIL("%s \"%s\" is refused: %s: ordinary users may map their own id only, or ranges of /etc/subuid and /etc/subgid by newuidmap and "
         "newgidmap (package uidmap)", name, text, strerror(errno));
  close(fd);
}

// newuidmap PID INSIDE OUTSIDE COUNT ...: set-user-id programs that know what /etc/subuid grants.
static void run_helper(const char *program, pid_t pid, const char *map) {
  char *words = strdup(map), number[16];
  const char *argv[64] = {program, number};
  int n = 2;
  snprintf(number, sizeof(number), "%d", pid);
  for (char *word = strtok(words, " \n"); word != NULL && n < 63; word = strtok(NULL, " \n")) argv[n++] = word;
  pid_t child = fork();
  if (child == 0) {
    unblock_signals();
    execv(program, (char **)argv);
    FAIL("cannot run %s: %s", program, strerror(errno));
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) < 0 || status != 0)
    FAIL("%s does not grant the map \"%s\": it must be in /etc/subuid and /etc/subgid", program, map);
  free(words);
}

static void write_maps(pid_t pid) {
  if (options.new_uid_map != NULL) run_helper(options.new_uid_map, pid, options.uid_map);
  else write_file(pid, "uid_map", options.uid_map);
  if (options.new_gid_map != NULL) {
    run_helper(options.new_gid_map, pid, options.gid_map);
    return;
  }
  // Who may not map groups freely may not drop groups either: they can deny access.
  if (geteuid() != 0) write_file(pid, "setgroups", "deny");
  write_file(pid, "gid_map", options.gid_map);
}

// --- the file tree ---

static int open_tree_copy(const char *path) {
  return syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
}

static void set_attributes(int tree, uint64_t attributes, const char *path) {
  struct mount_attr attr = {.attr_set = attributes};
  CHECK(syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof(attr)),
        "%s cannot be protected: %s (Linux 5.12 is needed)", path, strerror(errno));
}

// Makes the directories that lead to `path` (absolute) below the working directory, and what is mounted on.
static void make_place(const char *path, bool directory) {
  char part[PATH_MAX];
  snprintf(part, sizeof(part), "%s", path + 1);
  for (char *slash = strchr(part, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
    *slash = 0;
    mkdir(part, 0755); // it may be there, or lie in a tree that is mounted already
    *slash = '/';
  }
  if (directory) {
    mkdir(part, 0755);
    return;
  }
  int fd = open(part, O_CREAT | O_RDONLY | O_CLOEXEC, 0444);
  if (fd >= 0) close(fd);
}

static void attach(int tree, const char *path, bool directory) {
  make_place(path, directory);
  CHECK(syscall(SYS_move_mount, tree, "", AT_FDCWD, path + 1, MOVE_MOUNT_F_EMPTY_PATH), "%s cannot be mounted: %s", path, strerror(errno));
  close(tree);
}

static void make_tree(void) {
  // Mounts of the host below the share go on to appear; nothing of ours appears in the host.
  if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0) {
    if (errno == EINVAL) FAIL("/ is no mount point, as in a plain chroot: chroot to one (mount --bind DIR DIR), or take another --sandbox");
    FAIL("mounts cannot be made private: %s", strerror(errno));
  }
  int share = open_tree_copy(options.share);
  CHECK(share, "%s cannot be taken along: %s", options.share, strerror(errno));
  // Devices that a guest makes are for the guest alone: opened here, they would be the host's.
  set_attributes(share, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (options.readonly ? MOUNT_ATTR_RDONLY : 0), options.share);
  for (int i = 0; i < options.bind_count; i++) {
    struct bind *bind = &options.binds[i];
    struct stat st;
    bind->tree = open_tree_copy(bind->path);
    if (bind->tree < 0 || fstat(bind->tree, &st) < 0) FAIL("%s cannot be taken along: %s", bind->path, strerror(errno));
    bind->directory = S_ISDIR(st.st_mode);
    set_attributes(bind->tree, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (bind->executable ? 0 : MOUNT_ATTR_NOEXEC), bind->path);
  }
  // A process in /proc/sys or with another one's files would be outside: only processes, only ours, nothing to write to. Before the
  // host's /proc is hidden, because a user namespace gets a new one only where it sees an old one.
  int proc = syscall(SYS_fsopen, "proc", FSOPEN_CLOEXEC);
  CHECK(proc, "proc cannot be mounted: %s", strerror(errno));
  syscall(SYS_fsconfig, proc, FSCONFIG_SET_STRING, "subset", "pid", 0);
  CHECK(syscall(SYS_fsconfig, proc, FSCONFIG_CMD_CREATE, NULL, NULL, 0), "proc cannot be mounted: %s", strerror(errno));
  int proc_tree = syscall(SYS_fsmount, proc, FSMOUNT_CLOEXEC, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
  CHECK(proc_tree, "a new /proc is refused: %s: containers that hide parts of /proc forbid this: use --sandbox=chroot or none there",
        strerror(errno));
  // Any directory would do as the place.
  CHECK(mount("virtiofsd-ts", "/proc", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=1m,mode=0755"), "tmpfs cannot be mounted: %s", strerror(errno));
  CHECK(chdir("/proc"), "tmpfs: %s", strerror(errno));
  umask(022);
  for (int i = 0; i < options.bind_count; i++) attach(options.binds[i].tree, options.binds[i].path, options.binds[i].directory);
  attach(share, options.share_at, true);
  attach(proc_tree, "/proc", true);
  close(proc);
  // The old root is stacked on the new one and then taken away (pivot_root(2), "pivot_root(".", ".")").
  CHECK(syscall(SYS_pivot_root, ".", "."), "pivot_root: %s", strerror(errno));
  CHECK(umount2(".", MNT_DETACH), "the old root stays mounted: %s", strerror(errno));
  CHECK(chdir("/"), "chdir: %s", strerror(errno));
  struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY};
  CHECK(syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, &attr, sizeof(attr)), "the new root cannot be made read-only: %s", strerror(errno));
}

// --- privileges ---

static void read_caps(uint64_t *permitted) {
  struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  struct __user_cap_data_struct data[2];
  CHECK(syscall(SYS_capget, &header, data), "capget: %s", strerror(errno));
  *permitted = data[0].permitted | (uint64_t)data[1].permitted << 32;
}

static void drop_privileges(void) {
  uint64_t have;
  read_caps(&have);
  if (have & 1ull << CAP_SETPCAP) {
    // The daemon takes on the ids of guest users for a moment and must not lose its capabilities by that.
    CHECK(prctl(PR_SET_SECUREBITS, prctl(PR_GET_SECUREBITS) | SECBIT_NO_SETUID_FIXUP), "securebits: %s", strerror(errno));
    // What is not in the bounding set does not come back by an exec as root.
    for (int cap = 0; options.set_caps && prctl(PR_CAPBSET_READ, cap) >= 0; cap++)
      if (!(options.caps >> cap & 1)) CHECK(prctl(PR_CAPBSET_DROP, cap), "bounding set: %s", strerror(errno));
  }
  if (options.set_caps) {
    uint64_t want = options.caps & have;
    // As root the daemon gets them by its exec; as another user of a user namespace it must inherit them.
    uint64_t inherit = geteuid() == 0 ? 0 : want;
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {
        {(uint32_t)want, (uint32_t)want, (uint32_t)inherit},
        {(uint32_t)(want >> 32), (uint32_t)(want >> 32), (uint32_t)(inherit >> 32)},
    };
    CHECK(syscall(SYS_capset, &header, data), "capset: %s", strerror(errno));
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    for (int cap = 0; cap < 64; cap++)
      if (inherit >> cap & 1) CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0), "ambient capabilities: %s", strerror(errno));
  }
  CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs: %s", strerror(errno));
}

// --- processes ---

static void run_command(void) {
  if (options.seccomp != NULL && (ftruncate(options.seccomp_fd, 0) < 0 || lseek(options.seccomp_fd, 0, SEEK_SET) < 0 || write_filter(options.seccomp, options.seccomp_fd) < 0 || refuse_rings() < 0))
    FAIL("the filter of system calls cannot be made: this kernel has no seccomp: use --seccomp=none");
  close_others(-1);
  for (int i = 0; i < options.keep_count; i++) fcntl(options.keep[i], F_SETFD, 0);
  unblock_signals();
  execv(options.command[0], options.command);
  FAIL("cannot run %s: %s", options.command[0], strerror(errno));
}

// --- workers ---
//
// A worker has a socket to us (control) and one that its keeper answers on. We hold the other ends. What is said, one byte each:
//
//   worker → us   H  loaded, and the state is of a kind it knows; waits for G (not the first worker)
//                 R  has all descriptors and a keeper, whose pid follows as a 32-bit number
//                 S  serves
//                 U  has stopped at a quiet point, all is written down; gives its descriptors to who asks
//                 X  cannot stop: a request is with a slow host
//   us → worker   G  take over; the wait status of the worker before (32 bits) and the time of its end (64 bits, CLOCK_MONOTONIC) follow
//                 Q  stop at a quiet point
//
// The end of our end of the keeper's socket is the end of the keeper, and of a worker that has said U.

struct worker {
  pid_t pid; // 0: there is none
  int control;
  int keep;
  pid_t keeper;
  bool loaded, ready, serves, stopped;
};

#define NO_WORKER ((struct worker){.control = -1, .keep = -1})

// The one that serves or served last, and the one that is to follow it.
static struct worker now = {.control = -1, .keep = -1}, next = {.control = -1, .keep = -1};
static unsigned generation;
static int last_status;
static uint64_t ended_at;
static int stopping; // the signal that ends us

enum { MOST_DEATHS = 5, DEATHS_WITHIN_S = 10, UNBEGUN_FOR_S = 30 };

static uint64_t monotonic(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void let_go(struct worker *worker) {
  if (worker->control >= 0) close(worker->control);
  if (worker->keep >= 0) close(worker->keep);
  *worker = NO_WORKER;
}

static void keep_fd(int fd) {
  if (options.keep_count == MAX_LIST) FAIL("too many descriptors");
  options.keep[options.keep_count++] = fd;
}

// Starts a worker as a child that does not outlive us. `from`: where the descriptors of the one before it can be had, or -1.
static void start_worker(struct worker *worker, int from) {
  int control[2], keep[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, control), "socketpair: %s", strerror(errno));
  CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, keep), "socketpair: %s", strerror(errno));
  pid_t parent = getpid();
  generation++;
  pid_t child = fork();
  CHECK(child, "fork: %s", strerror(errno));
  if (child == 0) {
    if (!options.namespaces) {
      setsid();
      setgroups(0, NULL);
      drop_privileges();
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    char text[64];
    snprintf(text, sizeof(text), "%d %d %d %u", control[1], keep[1], from, generation);
    setenv("VIRTIOFSD_TS_WORKER", text, 1);
    keep_fd(control[1]);
    keep_fd(keep[1]);
    if (from >= 0) keep_fd(from);
    run_command();
  }
  close(control[1]);
  close(keep[1]);
  *worker = (struct worker){.pid = child, .control = control[0], .keep = keep[0]};
}

static void tell(const struct worker *worker, char what) {
  if (send(worker->control, &what, 1, MSG_NOSIGNAL) < 0 && errno != EPIPE) complain("the worker cannot be told: %s", strerror(errno));
}

// The next worker may begin: the one before it has ended or stopped.
static void go_on(void) {
  if (next.pid == 0 || !next.loaded || (now.pid != 0 && !now.stopped)) return;
  struct {
    char what;
    int32_t status;
    uint64_t ended_at;
  } __attribute__((packed)) message = {'G', last_status, ended_at};
  if (send(next.control, &message, sizeof(message), MSG_NOSIGNAL) < 0 && errno != EPIPE) complain("the worker cannot be told: %s", strerror(errno));
  next.loaded = false; // once
}

// The next worker has everything: the one before it, and its keeper, are not needed any more.
static void succeed(void) {
  let_go(&now);
  now = next;
  next = NO_WORKER;
}

// Starts a worker with what is in the program's files now; the one that serves goes on until it is loaded.
static void replace(void) {
  if (next.pid == 0 && now.ready) start_worker(&next, now.keep);
}

static void hear(struct worker *worker) {
  struct {
    char what;
    int32_t keeper;
  } __attribute__((packed)) message;
  while (worker->control >= 0 && recv(worker->control, &message.what, 1, MSG_DONTWAIT) == 1) {
    switch (message.what) {
    case 'H':
      worker->loaded = true;
      if (worker == &next && now.pid != 0 && !now.stopped) tell(&now, 'Q');
      go_on();
      if (stopping) kill(worker->pid, stopping); // it heeds it as soon as it serves
      break;
    case 'R':
      if (recv(worker->control, &message.keeper, sizeof(message.keeper), MSG_WAITALL) != sizeof(message.keeper)) break;
      worker->keeper = message.keeper;
      worker->ready = true;
      if (worker == &next) {
        succeed();
        worker = &now;
      }
      break;
    case 'S':
      worker->serves = true;
      break;
    case 'U':
      worker->stopped = true;
      ended_at = monotonic();
      last_status = 0;
      go_on();
      break;
    case 'X':
      if (next.pid != 0) kill(next.pid, SIGKILL);
      break;
    }
  }
}

// Whether a death is one too many: workers that fail one after the other, or none that could begin for long, whatever ended them.
static bool too_many(int status, bool had_begun) {
  static uint64_t deaths[MOST_DEATHS], unbegun_since;
  static unsigned count;
  if (had_begun || unbegun_since == 0) unbegun_since = ended_at;
  else if (ended_at - unbegun_since > UNBEGUN_FOR_S * 1000000000ull) return true;
  // What somebody kills has not failed.
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return false;
  deaths[count++ % MOST_DEATHS] = ended_at;
  // The oldest of the last ones.
  return count >= MOST_DEATHS && ended_at - deaths[count % MOST_DEATHS] < DEATHS_WITHIN_S * 1000000000ull;
}

// Whether it was told to end and something went wrong on the way (no memory is left, say): the first time, another one answers what was
// under way and ends in order.
static bool failed_on_its_end(int status) {
  static bool before;
  if (before || !WIFSIGNALED(status) || WTERMSIG(status) == SIGKILL || WTERMSIG(status) == stopping) return false;
  before = true;
  return true;
}

static bool was_first_start = true;

// A child has ended. Returns whether we end, too, with its status.
static bool buried(pid_t pid, int status) {
  hear(&now);
  hear(&next);
  if (now.serves) was_first_start = false;
  if (pid == now.keeper) {
    // Nobody would have the descriptors if the worker ended now: another worker makes another keeper.
    now.keeper = 0;
    if (now.pid != 0 && !stopping) replace();
    return false;
  }
  if (pid != now.pid && pid != next.pid) return false;
  bool replacing = pid == next.pid && now.pid != 0;
  if (pid == next.pid) let_go(&next);
  else now.pid = 0;
  if (stopping && (replacing || !failed_on_its_end(status))) return !replacing;
  if (replacing && !now.stopped) {
    complain("the worker is not replaced: the new one has ended before it served; the old one goes on");
    return false;
  }
  // It has ended in order, by its own decision or because it was told to.
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return true;
  last_status = status;
  ended_at = monotonic();
  // A system call that is not allowed may have been somebody's attempt: there is no second one.
  if (was_first_start || (WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS)) return true;
  if (now.keeper == 0 && !now.stopped) {
    complain("the worker has ended, and so has the process that kept its descriptors: nobody can go on");
    return true;
  }
  if (too_many(status, now.serves)) {
    complain("workers end one after the other: no more are started (%d within %d s, or none that could begin for %d s)", MOST_DEATHS, DEATHS_WITHIN_S,
             UNBEGUN_FOR_S);
    return true;
  }
  now.serves = false;
  if (next.pid == 0) start_worker(&next, now.keep);
  go_on();
  return false;
}

// Starts workers, one after the other, until one has ended in order or nothing helps. Returns the wait status of the last one.
static int supervise(void) {
  int signals = signalfd(-1, &forwarded, SFD_CLOEXEC | SFD_NONBLOCK);
  CHECK(signals, "signalfd: %s", strerror(errno));
  start_worker(&now, -1);
  for (time_t deadline = 0;;) {
    int status;
    for (pid_t ended; (ended = waitpid(-1, &status, WNOHANG)) > 0;) {
      if (!buried(ended, status)) continue;
      for (struct worker *left = &now; left != NULL; left = left == &now ? &next : NULL) {
        if (left->pid != 0) kill(left->pid, SIGKILL);
        let_go(left);
      }
      // It was told to end before it could hear of that: so it has ended in order.
      return stopping && WIFSIGNALED(status) && WTERMSIG(status) == stopping ? 0 : status;
    }
    struct pollfd fds[] = {{signals, POLLIN, 0}, {now.control, POLLIN, 0}, {next.control, POLLIN, 0}};
    // A worker's end of its control socket is known before its death is: no need to hear that again and again.
    if (poll(fds, 3, deadline != 0 ? 1000 : -1) < 0) continue;
    if (deadline != 0 && seconds() >= deadline && !too_late(now.pid != 0 ? now.pid : next.pid, &deadline)) return 1 << 8;
    struct signalfd_siginfo info;
    while (read(signals, &info, sizeof(info)) == sizeof(info)) {
      int signal = info.ssi_signo;
      if (signal == SIGCHLD) continue;
      if (signal == SIGUSR2) {
        replace();
        continue;
      }
      if (ends(signal)) {
        if (deadline == 0) deadline = seconds() + END_WITHIN_SECONDS;
        stopping = signal;
      }
      if (now.pid != 0) kill(now.pid, signal);
      // One that only waits for its turn is not needed any more.
      if (next.pid != 0) kill(next.pid, stopping && now.pid != 0 && !now.stopped ? SIGKILL : signal);
    }
    struct worker *worker[] = {&now, &next};
    for (int i = 1; i < 3; i++)
      if (fds[i].revents != 0) hear(worker[i - 1]);
    for (int i = 1; i < 3; i++) {
      if ((fds[i].revents & POLLHUP) == 0) continue;
      // Closed by its death (or about to be): what there was to hear is heard.
      struct worker *gone = worker[i - 1];
      if (gone->control == fds[i].fd) close(gone->control), gone->control = -1;
    }
  }
}

static void inner(int go) __attribute__((noreturn));
static void inner(int go) {
  char byte;
  if (read(go, &byte, 1) != 1) _exit(1); // outer has said why
  // The daemon has our ids and capabilities: it must not trace us or read our memory.
  prctl(PR_SET_DUMPABLE, 0);
  // Without a terminal nothing can be typed into it.
  setsid();
  if (options.set_gid >= 0) {
    prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP);
    CHECK(syscall(SYS_setresgid, options.set_gid, options.set_gid, options.set_gid), "group id %ld: %s", options.set_gid, strerror(errno));
    CHECK(syscall(SYS_setresuid, options.set_uid, options.set_uid, options.set_uid), "user id %ld: %s", options.set_uid, strerror(errno));
  }
  setgroups(0, NULL); // refused where the groups may deny access
  make_tree();
  drop_privileges();
  // After the last change of ids, which would clear it. The pipe tells whether outer is gone already.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (fcntl(go, F_SETFL, O_NONBLOCK) == 0 && read(go, &byte, 1) == 0) _exit(1);
  _exit(exit_code(supervise()));
}

// The descriptor from which inner reads that its ids are mapped; outer's end stays open as long as outer lives.
static pid_t start_inner(void) {
  int go[2];
  CHECK(pipe2(go, O_CLOEXEC), "pipe: %s", strerror(errno));
  unsigned long flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | (options.uid_map != NULL ? CLONE_NEWUSER : 0);
  // Not clone3: where a filter looks at the flags (RestrictNamespaces= of systemd, containers), it is not there.
  pid_t child = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
  if (child < 0) {
    const char *why = strerror(errno);
    if (options.uid_map != NULL)
      complain("this host permits no user namespaces (%s): start as root, allow them (sysctl user.max_user_namespaces, "
               "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns), or use --sandbox=none", why);
    else complain("no namespaces without CAP_SYS_ADMIN (%s): grant it to the container, or use --sandbox=chroot or none", why);
    fail();
  }
  if (child == 0) {
    close(go[1]);
    close_others(go[0]);
    inner(go[0]);
  }
  close(go[0]);
  if (options.uid_map != NULL) write_maps(child);
  if (write(go[1], "g", 1) != 1) complain("the inner process has ended");
  return child;
}

int main(int argc, char **argv) {
  prctl(PR_SET_NAME, "virtiofsd-ts");
  outer = getpid();
  // Whoever starts us without standard streams must not get a socket in their place.
  for (int fd = 0; fd <= 2; fd++)
    if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDWR);
  parse(argc, argv);
  block_signals();
  uint64_t stops;
  if (stop_fd >= 0 && read(stop_fd, &stops, sizeof(stops)) > 0) {
    remove_leftovers();
    return 0;
  }
  int code = exit_code(options.namespaces ? supervise_inner(start_inner()) : supervise());
  remove_leftovers();
  if (code > 128) {
    int signal = code - 128;
    if (signal == SIGSYS) complain("the daemon was ended for a system call that --seccomp=%s does not allow (the kernel's log has its number)", options.seccomp);
    // Our own end looks like the daemon's, but for a core of this program.
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    unblock_signals();
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigaction(signal, &action, NULL);
    raise(signal);
  }
  return code;
}
