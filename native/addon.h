// Helpers that every file of the add-on shares: the arena, argument conversion, registration.
// The add-on holds no protocol logic: each function is one system call (or one copy) and answers -errno.
#pragma once
#define NODE_ADDON_API_DISABLE_CPP_EXCEPTIONS
#include <napi.h>
#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <sys/uio.h>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

struct Pool;

// What one JavaScript thread owns. Its address is every function's callback data: no look-up per call.
struct Env {
  napi_env env = nullptr;
  char *arena = nullptr;
  size_t arenaBytes = 0;
  bool inProcFd = false; // this thread's working directory is /proc/self/fd (see fsops.cc)
  bool rootChanged = false; // there is no /proc to name any more (see process.cc)
  Pool *pool = nullptr;  // offload.cc
  double *stamp = nullptr; // where scatter notes the time of each reply (region.cc), or nowhere
  // External buffers over regions, so that they can be detached before their region is unmapped.
  struct View {
    int region;
    napi_ref ref;
  };
  std::vector<View> views;

  template <typename T = char> T *at(uint32_t offset) { return reinterpret_cast<T *>(arena + offset); }
};

// -errno of a failed system call, else its result.
template <typename T> inline int64_t sys(T result) { return result < 0 ? -static_cast<int64_t>(errno) : static_cast<int64_t>(result); }

// The iovecs that remain after `skip` bytes, cut to `length` bytes in all; at most IOV_MAX. Returns their count.
inline int sliceIov(const iovec *in, uint32_t count, size_t skip, size_t length, iovec *out) {
  int n = 0;
  for (uint32_t i = 0; i < count && length > 0 && n < IOV_MAX; i++) {
    size_t have = in[i].iov_len;
    if (skip >= have) {
      skip -= have;
      continue;
    }
    size_t take = have - skip;
    if (take > length) take = length;
    out[n].iov_base = static_cast<char *>(in[i].iov_base) + skip;
    out[n++].iov_len = take;
    length -= take;
    skip = 0;
  }
  return n;
}

// --- argument conversion: int32, uint32, int64 (offsets, addresses) and double ---
inline void getArg(napi_env env, napi_value v, int32_t &out) { napi_get_value_int32(env, v, &out); }
inline void getArg(napi_env env, napi_value v, uint32_t &out) { napi_get_value_uint32(env, v, &out); }
inline void getArg(napi_env env, napi_value v, int64_t &out) { napi_get_value_int64(env, v, &out); }

template <auto F> struct Caller;

// A function `int64_t f(Env &, ints...)` as a N-API callback.
template <typename... A, int64_t (*F)(Env &, A...)> struct Caller<F> {
  static napi_value call(napi_env env, napi_callback_info info) {
    constexpr size_t N = sizeof...(A);
    napi_value argv[N ? N : 1];
    size_t argc = N;
    void *data;
    napi_get_cb_info(env, info, &argc, argv, nullptr, &data);
    std::tuple<A...> args{};
    convert(env, argv, args, std::index_sequence_for<A...>{});
    int64_t result = std::apply([&](A... a) { return F(*static_cast<Env *>(data), a...); }, args);
    napi_value out;
    if (result == static_cast<int32_t>(result))
      napi_create_int32(env, static_cast<int32_t>(result), &out); // a small integer: no allocation
    else
      napi_create_double(env, static_cast<double>(result), &out);
    return out;
  }
  template <size_t... I> static void convert([[maybe_unused]] napi_env env, [[maybe_unused]] napi_value *argv, [[maybe_unused]] std::tuple<A...> &args, std::index_sequence<I...>) {
    (getArg(env, argv[I], std::get<I>(args)), ...);
  }
};

inline void addRaw(napi_env env, napi_value exports, Env *data, const char *name, napi_callback cb) {
  napi_value fn;
  napi_create_function(env, name, NAPI_AUTO_LENGTH, cb, data, &fn);
  napi_set_named_property(env, exports, name, fn);
}

// add<&f>(env, exports, data, "f"): makes f callable from JavaScript.
template <auto F> void add(napi_env env, napi_value exports, Env *data, const char *name) {
  addRaw(env, exports, data, name, Caller<F>::call);
}

// Each file registers its own functions.
void initRegion(napi_env env, napi_value exports, Env *data);
void initSocket(napi_env env, napi_value exports, Env *data);
void initWait(napi_env env, napi_value exports, Env *data);
void initFsops(napi_env env, napi_value exports, Env *data);
void initIo(napi_env env, napi_value exports, Env *data);
void initHandle(napi_env env, napi_value exports, Env *data);
void initOffload(napi_env env, napi_value exports, Env *data);
void initWatch(napi_env env, napi_value exports, Env *data);
void initProcess(napi_env env, napi_value exports, Env *data);
void initKeeper(napi_env env, napi_value exports, Env *data);

// offload.cc: ends the threads of an environment that goes away.
void poolDestroy(Pool *pool);

// The name of a descriptor below /proc/self/fd.
struct FdName {
  char text[12];
  explicit FdName(int32_t fd) {
    char *p = text + sizeof(text) - 1;
    *p = 0;
    uint32_t n = static_cast<uint32_t>(fd);
    do *--p = static_cast<char>('0' + n % 10);
    while ((n /= 10) != 0);
    start = p;
  }
  const char *start;
};

// fsops.cc: makes `procfd`, a descriptor of /proc/self/fd, this thread's working directory (the first time).
bool enterProcFd(Env &e, int32_t procfd);

// fsops.cc: CAP_FSETID of this thread's effective set off and on again (0 or -errno). True when it was on before.
bool dropFsetid();
void raiseFsetid();
