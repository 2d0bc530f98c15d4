// Shared memory: the arena, mappings of a peer's memory, copies between them.
#include "addon.h"
#include <atomic>
#include <linux/magic.h>
#include <mutex>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <time.h>
#include <unistd.h>

namespace {

constexpr int MAX_REGIONS = 2048;

// Read by the SIGBUS handler: entries are only ever published whole (length last) and withdrawn length first.
struct Region {
  std::atomic<uintptr_t> address{0};
  std::atomic<size_t> length{0};
  std::atomic<bool> broken{false};
  bool writable = false;
};

Region regions[MAX_REGIONS];
std::atomic<int> regionTop{0};
std::atomic<int> brokenTotal{0};
std::mutex regionLock; // add and remove only

void *zeroPages(uintptr_t from, uintptr_t end) {
  return mmap(reinterpret_cast<void *>(from), end - from, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}

// A peer shrank the file behind a mapping, or its huge pages are not to be had: without this, touching the lost pages would end
// the process. Zero pages take their place up to the region's end, and the region counts as broken, so that the device can stop in
// good order.
void onSigbus(int, siginfo_t *info, void *) {
  uintptr_t fault = reinterpret_cast<uintptr_t>(info->si_addr);
  int top = regionTop.load(std::memory_order_acquire);
  for (int i = 0; i < top; i++) {
    size_t length = regions[i].length.load(std::memory_order_acquire);
    uintptr_t start = regions[i].address.load(std::memory_order_relaxed);
    if (length == 0 || fault < start || fault >= start + length) continue;
    // A mapping of huge pages cannot be cut within one of them.
    if (zeroPages(fault & ~static_cast<uintptr_t>(4095), start + length) == MAP_FAILED && zeroPages(start, start + length) == MAP_FAILED) break;
    if (!regions[i].broken.exchange(true)) brokenTotal.fetch_add(1);
    return;
  }
  signal(SIGBUS, SIG_DFL); // not ours: the instruction runs again and ends the process as it would have
}

std::once_flag sigbusOnce;

void installSigbus() {
  struct sigaction action = {};
  action.sa_sigaction = onSigbus;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigaction(SIGBUS, &action, nullptr);
}

bool valid(int id) { return id >= 0 && id < MAX_REGIONS && regions[id].length.load() != 0; }

napi_value arena(napi_env env, napi_callback_info info) {
  size_t argc = 1;
  napi_value argv[1], out = nullptr;
  void *data;
  napi_get_cb_info(env, info, &argc, argv, nullptr, &data);
  Env *e = static_cast<Env *>(data);
  int64_t bytes = 0;
  napi_get_value_int64(env, argv[0], &bytes);
  if (!e->arena) {
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      napi_throw_error(env, nullptr, "arena: out of memory");
      return nullptr;
    }
    e->arena = static_cast<char *>(p);
    e->arenaBytes = bytes;
  }
  napi_create_external_arraybuffer(env, e->arena, e->arenaBytes, nullptr, nullptr, &out);
  return out;
}

int64_t arenaAddress(Env &e) { return reinterpret_cast<int64_t>(e.arena); }

int64_t regionMap(Env &, int32_t fd, int64_t offset, int64_t length, int32_t writable) {
  std::call_once(sigbusOnce, installSigbus);
  struct stat st;
  if (length <= 0 || offset < 0) return -EINVAL;
  if (fstat(fd, &st) < 0) return -errno;
  if (S_ISREG(st.st_mode) && (offset > st.st_size || length > st.st_size - offset)) return -EINVAL;
  // Huge pages are mapped and unmapped whole.
  struct statfs fs;
  if (fstatfs(fd, &fs) < 0) return -errno;
  if (fs.f_type == HUGETLBFS_MAGIC) length = (length + fs.f_bsize - 1) / fs.f_bsize * fs.f_bsize;
  std::lock_guard<std::mutex> guard(regionLock);
  int id = 0;
  while (id < MAX_REGIONS && regions[id].length.load() != 0) id++;
  if (id == MAX_REGIONS) return -ENOSPC;
  int protection = PROT_READ | (writable ? PROT_WRITE : 0);
  void *p = mmap(nullptr, length, protection, MAP_SHARED | MAP_NORESERVE, fd, offset);
  if (p == MAP_FAILED) return -errno;
  madvise(p, length, MADV_DONTDUMP);
  regions[id].writable = writable != 0;
  regions[id].broken.store(false);
  regions[id].address.store(reinterpret_cast<uintptr_t>(p), std::memory_order_relaxed);
  regions[id].length.store(length, std::memory_order_release);
  if (id >= regionTop.load()) regionTop.store(id + 1, std::memory_order_release);
  return id;
}

int64_t regionAddress(Env &, int32_t id) { return valid(id) ? static_cast<int64_t>(regions[id].address.load()) : -EBADF; }
int64_t regionBroken(Env &, int32_t id) { return valid(id) ? regions[id].broken.load() : -EBADF; }
int64_t brokenCount(Env &) { return brokenTotal.load(std::memory_order_relaxed); }

napi_value regionBuffer(napi_env env, napi_callback_info info) {
  size_t argc = 3;
  napi_value argv[3], out = nullptr;
  void *data;
  napi_get_cb_info(env, info, &argc, argv, nullptr, &data);
  Env *e = static_cast<Env *>(data);
  int32_t id = -1;
  int64_t offset = 0, length = 0;
  napi_get_value_int32(env, argv[0], &id);
  napi_get_value_int64(env, argv[1], &offset);
  napi_get_value_int64(env, argv[2], &length);
  if (!valid(id) || offset < 0 || length <= 0 || static_cast<size_t>(offset) > regions[id].length.load() ||
      static_cast<size_t>(length) > regions[id].length.load() - offset) {
    napi_throw_range_error(env, nullptr, "regionBuffer: outside the region");
    return nullptr;
  }
  void *p = reinterpret_cast<void *>(regions[id].address.load() + offset);
  if (napi_create_external_arraybuffer(env, p, length, nullptr, nullptr, &out) != napi_ok) return nullptr;
  napi_ref ref;
  napi_create_reference(env, out, 1, &ref);
  e->views.push_back({id, ref});
  return out;
}

void detach(napi_env env, napi_ref ref) {
  napi_value buffer = nullptr;
  napi_get_reference_value(env, ref, &buffer);
  if (buffer) napi_detach_arraybuffer(env, buffer);
  napi_delete_reference(env, ref);
}

napi_value regionDetach(napi_env env, napi_callback_info info) {
  size_t argc = 1;
  napi_value argv[1], out;
  void *data;
  napi_get_cb_info(env, info, &argc, argv, nullptr, &data);
  Env *e = static_cast<Env *>(data);
  int result = -EINVAL;
  for (size_t i = 0; i < e->views.size(); i++) {
    napi_value buffer = nullptr;
    bool same = false;
    napi_get_reference_value(env, e->views[i].ref, &buffer);
    if (buffer) napi_strict_equals(env, buffer, argv[0], &same);
    if (!same) continue;
    detach(env, e->views[i].ref);
    e->views.erase(e->views.begin() + i);
    result = 0;
    break;
  }
  napi_create_int32(env, result, &out);
  return out;
}

napi_value regionUnmap(napi_env env, napi_callback_info info) {
  size_t argc = 1;
  napi_value argv[1], out;
  void *data;
  napi_get_cb_info(env, info, &argc, argv, nullptr, &data);
  Env *e = static_cast<Env *>(data);
  int32_t id = -1;
  napi_get_value_int32(env, argv[0], &id);
  int64_t result = -EBADF;
  if (valid(id)) {
    for (size_t i = 0; i < e->views.size();) {
      if (e->views[i].region != id) {
        i++;
        continue;
      }
      detach(env, e->views[i].ref);
      e->views.erase(e->views.begin() + i);
    }
    std::lock_guard<std::mutex> guard(regionLock);
    void *p = reinterpret_cast<void *>(regions[id].address.load());
    size_t length = regions[id].length.load();
    regions[id].length.store(0, std::memory_order_release);
    result = sys(munmap(p, length));
  }
  napi_create_int32(env, static_cast<int32_t>(result), &out);
  return out;
}

int64_t memfdCreate(Env &e, uint32_t name, int64_t bytes) {
  int fd = memfd_create(e.at(name), MFD_CLOEXEC);
  if (fd < 0) return -errno;
  if (ftruncate(fd, bytes) < 0) {
    int error = errno;
    close(fd);
    return -error;
  }
  return fd;
}

int64_t copy(Env &, int64_t destination, int64_t source, int64_t length) {
  memcpy(reinterpret_cast<void *>(destination), reinterpret_cast<void *>(source), length);
  return 0;
}

int64_t gather(Env &e, uint32_t iov, uint32_t count, uint32_t destination, uint32_t max) {
  const iovec *v = e.at<iovec>(iov);
  char *to = e.at(destination);
  size_t done = 0;
  for (uint32_t i = 0; i < count && done < max; i++) {
    size_t n = v[i].iov_len;
    if (n > max - done) n = max - done;
    memcpy(to + done, v[i].iov_base, n);
    done += n;
  }
  return done;
}

#if defined(__x86_64__)
double ticks() { return static_cast<double>(__builtin_ia32_rdtsc()); }
#else
double ticks() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e9 + now.tv_nsec;
}
#endif

// From now on each scatter writes the processor's time stamp as a double to `offset` of the arena.
int64_t stampAt(Env &e, uint32_t offset) {
  e.stamp = e.at<double>(offset);
  *e.stamp = ticks();
  return 0;
}

int64_t stamp(Env &e) {
  if (e.stamp) *e.stamp = ticks();
  return 0;
}

int64_t scatter(Env &e, uint32_t iov, uint32_t count, uint32_t skip, uint32_t source, uint32_t length) {
  const iovec *v = e.at<iovec>(iov);
  const char *from = e.at(source);
  size_t done = 0, toSkip = skip;
  for (uint32_t i = 0; i < count && done < length; i++) {
    size_t have = v[i].iov_len;
    if (toSkip >= have) {
      toSkip -= have;
      continue;
    }
    size_t n = have - toSkip;
    if (n > length - done) n = length - done;
    memcpy(static_cast<char *>(v[i].iov_base) + toSkip, from + done, n);
    done += n;
    toSkip = 0;
  }
  if (e.stamp) *e.stamp = ticks();
  return done;
}

} // namespace

void initRegion(napi_env env, napi_value exports, Env *data) {
  addRaw(env, exports, data, "arena", arena);
  addRaw(env, exports, data, "regionBuffer", regionBuffer);
  addRaw(env, exports, data, "regionDetach", regionDetach);
  addRaw(env, exports, data, "regionUnmap", regionUnmap);
  add<&arenaAddress>(env, exports, data, "arenaAddress");
  add<&regionMap>(env, exports, data, "regionMap");
  add<&regionAddress>(env, exports, data, "regionAddress");
  add<&regionBroken>(env, exports, data, "regionBroken");
  add<&brokenCount>(env, exports, data, "brokenCount");
  add<&memfdCreate>(env, exports, data, "memfdCreate");
  add<&copy>(env, exports, data, "copy");
  add<&gather>(env, exports, data, "gather");
  add<&scatter>(env, exports, data, "scatter");
  add<&stampAt>(env, exports, data, "stampAt");
  add<&stamp>(env, exports, data, "stamp");
}
