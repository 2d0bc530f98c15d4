// fanotify and inotify: only the system calls; events are read with read() and parsed in TypeScript.
#include "addon.h"
#include <stdio.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

int64_t fanotifyInit(Env &, uint32_t flags, uint32_t eventFlags) { return sys(syscall(SYS_fanotify_init, flags, eventFlags)); }

int64_t fanotifyMark(Env &e, int32_t fd, uint32_t flags, uint32_t maskLow, uint32_t maskHigh, int32_t dirfd, uint32_t name) {
  uint64_t mask = static_cast<uint64_t>(maskHigh) << 32 | maskLow;
  const char *path = e.at(name);
  return sys(syscall(SYS_fanotify_mark, fd, flags, mask, dirfd, *path ? path : nullptr));
}

int64_t inotifyInit(Env &) { return sys(inotify_init1(IN_CLOEXEC | IN_NONBLOCK)); }

int64_t inotifyAddWatch(Env &e, int32_t fd, int32_t procfd, int32_t target, uint32_t mask) {
  // There is no inotify_add_watchat(2): the magic link of /proc names the object whatever happened to its path.
  if (e.rootChanged) return enterProcFd(e, procfd) ? sys(inotify_add_watch(fd, FdName(target).start, mask)) : -errno;
  char path[64];
  snprintf(path, sizeof(path), "/proc/self/fd/%d/%d", procfd, target);
  return sys(inotify_add_watch(fd, path, mask));
}

int64_t inotifyRemoveWatch(Env &, int32_t fd, int32_t watch) { return sys(inotify_rm_watch(fd, watch)); }
int64_t readFd(Env &e, int32_t fd, uint32_t out, uint32_t size) { return sys(read(fd, e.at(out), size)); }
int64_t writeFd(Env &e, int32_t fd, uint32_t source, uint32_t size) { return sys(write(fd, e.at(source), size)); }

} // namespace

void initWatch(napi_env env, napi_value exports, Env *data) {
  add<&fanotifyInit>(env, exports, data, "fanotifyInit");
  add<&fanotifyMark>(env, exports, data, "fanotifyMark");
  add<&inotifyInit>(env, exports, data, "inotifyInit");
  add<&inotifyAddWatch>(env, exports, data, "inotifyAddWatch");
  add<&inotifyRemoveWatch>(env, exports, data, "inotifyRemoveWatch");
  add<&readFd>(env, exports, data, "read");
  add<&writeFd>(env, exports, data, "write");
}
