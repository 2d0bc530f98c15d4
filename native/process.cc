// Things of the process as a whole: limits, group names, ownership of the socket file.
#include "addon.h"
#include <grp.h>
#include <sys/resource.h>
#include <unistd.h>

namespace {

int64_t getPid(Env &) { return getpid(); }

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

int64_t groupId(Env &e, uint32_t name) {
  char buffer[65536];
  group entry, *found = nullptr;
  int error = getgrnam_r(e.at(name), &entry, buffer, sizeof(buffer), &found);
  if (error) return -error;
  return found ? static_cast<int64_t>(found->gr_gid) : -ENOENT;
}

int64_t changeOwner(Env &e, uint32_t path, uint32_t uid, uint32_t gid) { return sys(lchown(e.at(path), uid, gid)); }

} // namespace

void initProcess(napi_env env, napi_value exports, Env *data) {
  add<&getPid>(env, exports, data, "getpid");
  add<&setOpenFilesLimit>(env, exports, data, "setOpenFilesLimit");
  add<&openFilesLimit>(env, exports, data, "openFilesLimit");
  add<&groupId>(env, exports, data, "groupId");
  add<&changeOwner>(env, exports, data, "lchown");
}
