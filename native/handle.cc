// File handles: name_to_handle_at(2) and open_by_handle_at(2).
#include "addon.h"
#include <fcntl.h>
#include <unistd.h>

namespace {

constexpr uint32_t MAX_HANDLE = 128; // MAX_HANDLE_SZ
constexpr uint32_t MOUNT_ID_AT = 136;

int64_t nameToHandle(Env &e, int32_t dirfd, uint32_t name, int32_t flags, uint32_t out) {
  file_handle *handle = e.at<file_handle>(out);
  handle->handle_bytes = MAX_HANDLE;
  return sys(name_to_handle_at(dirfd, e.at(name), handle, e.at<int>(out + MOUNT_ID_AT), flags));
}

int64_t openByHandle(Env &e, int32_t mountFd, uint32_t handle, int32_t flags) {
  return sys(open_by_handle_at(mountFd, e.at<file_handle>(handle), flags | O_CLOEXEC));
}

} // namespace

void initHandle(napi_env env, napi_value exports, Env *data) {
  add<&nameToHandle>(env, exports, data, "nameToHandle");
  add<&openByHandle>(env, exports, data, "openByHandle");
}
