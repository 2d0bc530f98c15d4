// Things of the process as a whole: limits, group names, ownership of the socket file; what the sandbox needs before (becoming the
// launcher) and after (the last locks, from inside).
#include "addon.h"
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <link.h>
#include <semaphore.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>

namespace {

int64_t getPid(Env &) { return getpid(); }

// Without the destructors that wait for threads.
int64_t exitNow(Env &, int32_t status) { _exit(status); }

int64_t setOpenFilesLimit(Env &, int64_t limit) {
  rlimit r = {static_cast<rlim_t>(limit), static_cast<rlim_t>(limit)};
  if (setrlimit(RLIMIT_NOFILE, &r) == 0) return limit;
  rlimit have;
  if (getrlimit(RLIMIT_NOFILE, &have) < 0) return -errno;
  have.rlim_cur = have.rlim_max < r.rlim_cur ? have.rlim_max : r.rlim_cur;
  if (setrlimit(RLIMIT_NOFILE, &have) < 0) return -errno;
  return static_cast<int64_t>(have.rlim_cur);
}

int64_t openFilesLimit(Env &) {
  rlimit r;
  if (getrlimit(RLIMIT_NOFILE, &r) < 0) return -errno;
  return r.rlim_cur == RLIM_INFINITY ? 1ll << 53 : static_cast<int64_t>(r.rlim_cur);
}

// RLIM_INFINITY as -1.
double limitOf(rlim_t value) { return value == RLIM_INFINITY ? -1 : static_cast<double>(value); }
rlim_t limitFrom(int64_t value) { return value < 0 ? RLIM_INFINITY : static_cast<rlim_t>(value); }

int64_t fileSizeLimit(Env &e, uint32_t out) {
  rlimit r;
  if (getrlimit(RLIMIT_FSIZE, &r) < 0) return -errno;
  e.at<double>(out)[0] = limitOf(r.rlim_cur);
  e.at<double>(out)[1] = limitOf(r.rlim_max);
  return 0;
}

int64_t setFileSizeLimit(Env &, int64_t soft, int64_t hard) {
  rlimit r = {limitFrom(soft), limitFrom(hard)};
  return sys(setrlimit(RLIMIT_FSIZE, &r));
}

int64_t groupId(Env &e, uint32_t name) {
  char buffer[65536];
  group entry, *found = nullptr;
  int error = getgrnam_r(e.at(name), &entry, buffer, sizeof(buffer), &found);
  if (error) return -error;
  return found ? static_cast<int64_t>(found->gr_gid) : -ENOENT;
}

int64_t changeOwner(Env &e, uint32_t path, uint32_t uid, uint32_t gid) { return sys(lchown(e.at(path), uid, gid)); }

int64_t setInheritable(Env &, int32_t fd, int32_t on) {
  int flags = fcntl(fd, F_GETFD);
  if (flags < 0) return -errno;
  return sys(fcntl(fd, F_SETFD, on ? flags & ~FD_CLOEXEC : flags | FD_CLOEXEC));
}

// Replaces the process; node's other threads end with it. Words lie one after the other, each with its NUL.
int64_t becomeProgram(Env &e, uint32_t words, uint32_t wordCount, uint32_t environment, uint32_t environmentCount) {
  std::vector<char *> argv, envp;
  char *p = e.at(words);
  for (uint32_t i = 0; i < wordCount; i++, p += strlen(p) + 1) argv.push_back(p);
  p = e.at(environment);
  for (uint32_t i = 0; i < environmentCount; i++, p += strlen(p) + 1) envp.push_back(p);
  argv.push_back(nullptr);
  envp.push_back(nullptr);
  signal(SIGPIPE, SIG_DFL); // node ignores it
  // What comes during the exec waits for the next program, which must unblock it.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  execve(argv[0], argv.data(), envp.data());
  int error = errno;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return -error;
}

// The files that the dynamic loader has mapped, under the names by which it found them.
int64_t sharedObjects(Env &e, uint32_t out, uint32_t size) {
  struct List {
    char *to, *end;
    int64_t count;
  } list = {e.at(out), e.at(out) + size, 0};
  dl_iterate_phdr(
      [](dl_phdr_info *info, size_t, void *p) {
        List *list = static_cast<List *>(p);
        size_t length = strlen(info->dlpi_name) + 1;
        if (info->dlpi_name[0] != '/' || static_cast<size_t>(list->end - list->to) < length) return 0;
        memcpy(list->to, info->dlpi_name, length);
        list->to += length;
        list->count++;
        return 0;
      },
      &list);
  return list.count;
}

// Loads the filter that `fd` holds, in every thread at once; it cannot be taken back.
int64_t loadFilter(Env &, int32_t fd) {
  static sock_filter code[BPF_MAXINSNS];
  ssize_t bytes = pread(fd, code, sizeof(code), 0);
  if (bytes <= 0) return bytes < 0 ? -errno : -EINVAL;
  sock_fprog program = {static_cast<unsigned short>(bytes / sizeof(sock_filter)), code};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return -errno;
  // Without SPEC_ALLOW kernels before 5.16 make every memory access of the process slower.
  long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program);
  return result > 0 ? -ESRCH : sys(result);
}

// The root directory belongs to a structure that threads share until one of them leaves it (unshare(CLONE_FS), see fsops.cc), as the
// device thread does. A thread that was started before stands for those that have not: node's own.
struct RootChanger {
  sem_t wanted, done;
  int fd = -1;
  int64_t result = 0;
};
RootChanger *changer = nullptr;

int64_t enterRoot(int fd) { return fchdir(fd) < 0 || chroot(".") < 0 ? -errno : 0; }

int64_t prepareChroot(Env &) {
  if (changer) return 0;
  changer = new RootChanger();
  sem_init(&changer->wanted, 0, 0);
  sem_init(&changer->done, 0, 0);
  std::thread([] {
    while (sem_wait(&changer->wanted) < 0) continue;
    changer->result = enterRoot(changer->fd);
    sem_post(&changer->done);
  }).detach();
  return 0;
}

int64_t chrootAll(Env &e, int32_t fd) {
  if (!changer) return -EINVAL;
  changer->fd = fd;
  sem_post(&changer->wanted);
  while (sem_wait(&changer->done) < 0) continue;
  int64_t own = enterRoot(fd);
  e.inProcFd = false; // the working directory is another one now
  e.rootChanged = true;
  return changer->result < 0 ? changer->result : own;
}

} // namespace

void initProcess(napi_env env, napi_value exports, Env *data) {
  add<&getPid>(env, exports, data, "getpid");
  add<&exitNow>(env, exports, data, "exitNow");
  add<&setOpenFilesLimit>(env, exports, data, "setOpenFilesLimit");
  add<&openFilesLimit>(env, exports, data, "openFilesLimit");
  add<&fileSizeLimit>(env, exports, data, "fileSizeLimit");
  add<&setFileSizeLimit>(env, exports, data, "setFileSizeLimit");
  add<&groupId>(env, exports, data, "groupId");
  add<&changeOwner>(env, exports, data, "lchown");
  add<&setInheritable>(env, exports, data, "setInheritable");
  add<&becomeProgram>(env, exports, data, "become");
  add<&sharedObjects>(env, exports, data, "sharedObjects");
  add<&loadFilter>(env, exports, data, "loadFilter");
  add<&prepareChroot>(env, exports, data, "prepareChroot");
  add<&chrootAll>(env, exports, data, "chrootAll");
}
