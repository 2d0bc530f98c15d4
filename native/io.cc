// Data between files and guest memory: the iovecs point straight into it.
#include "addon.h"
#include <sys/uio.h>
#include <unistd.h>

namespace {

int64_t preadV2(Env &e, int32_t fd, uint32_t iov, uint32_t count, uint32_t skip, uint32_t length, int64_t offset, int32_t flags) {
  iovec part[IOV_MAX];
  int n = sliceIov(e.at<iovec>(iov), count, skip, length, part);
  return sys(preadv2(fd, part, n, offset, flags));
}

int64_t pwritevPlain(Env &e, int32_t fd, uint32_t iov, uint32_t count, uint32_t skip, uint32_t length, int64_t offset, int32_t flags) {
  iovec part[IOV_MAX];
  int n = sliceIov(e.at<iovec>(iov), count, skip, length, part);
  return sys(pwritev2(fd, part, n, offset, flags));
}

// The kernel clears set-user-id and set-group-id bits on a write only for callers without CAP_FSETID.
int64_t pwritevKillPriv(Env &e, int32_t fd, uint32_t iov, uint32_t count, uint32_t skip, uint32_t length, int64_t offset, int32_t flags) {
  bool dropped = dropFsetid();
  int64_t result = pwritevPlain(e, fd, iov, count, skip, length, offset, flags);
  if (dropped) raiseFsetid();
  return result;
}

int64_t ftruncateKillPriv(Env &, int32_t fd, int64_t size) {
  bool dropped = dropFsetid();
  int64_t result = sys(ftruncate(fd, size));
  if (dropped) raiseFsetid();
  return result;
}

} // namespace

void initIo(napi_env env, napi_value exports, Env *data) {
  add<&preadV2>(env, exports, data, "preadv2");
  add<&pwritevPlain>(env, exports, data, "pwritev2");
  add<&pwritevKillPriv>(env, exports, data, "pwritev2KillPriv");
  add<&ftruncateKillPriv>(env, exports, data, "ftruncateKillPriv");
}
