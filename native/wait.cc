// The one blocking wait of the device thread, eventfds, and signals turned into eventfds.
#include "addon.h"
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

namespace {

int64_t makeEventfd(Env &, uint32_t initial) { return sys(eventfd(initial, EFD_CLOEXEC | EFD_NONBLOCK)); }

int64_t eventfdWrite(Env &, int32_t fd) {
  uint64_t one = 1;
  return write(fd, &one, sizeof(one)) < 0 ? -errno : 0;
}

int64_t eventfdRead(Env &, int32_t fd) {
  uint64_t count = 0;
  if (read(fd, &count, sizeof(count)) < 0) return errno == EAGAIN ? 0 : -errno;
  return count > (1ull << 53) ? 1ll << 53 : static_cast<int64_t>(count);
}

int64_t epollCreate(Env &) { return sys(epoll_create1(EPOLL_CLOEXEC)); }

int64_t epollAdd(Env &, int32_t epoll, int32_t fd, uint32_t events, uint32_t tag) {
  epoll_event event = {};
  event.events = events;
  event.data.u32 = tag;
  return sys(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
}

int64_t epollDelete(Env &, int32_t epoll, int32_t fd) { return sys(epoll_ctl(epoll, EPOLL_CTL_DEL, fd, nullptr)); }

int64_t epollWait(Env &e, int32_t epoll, uint32_t out, int32_t max, int32_t timeout) {
  epoll_event events[64];
  if (max > 64) max = 64;
  int n = epoll_wait(epoll, events, max, timeout);
  if (n < 0) return errno == EINTR ? 0 : -errno;
  uint32_t *to = e.at<uint32_t>(out);
  for (int i = 0; i < n; i++) {
    to[2 * i] = events[i].data.u32;
    to[2 * i + 1] = events[i].events;
  }
  return n;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

struct Word {
  double address;
  uint32_t expected, unused;
};

int64_t busyLoop(Env &e, uint32_t table, uint32_t count, int64_t nanoseconds) {
  const Word *words = e.at<Word>(table + 8);
  int64_t found = -1, began = now(), took = 0;
  // The clock takes as long as some looks.
  for (unsigned look = 1; found < 0 && took < nanoseconds; look++) {
    for (uint32_t i = 0; i < count && found < 0; i++) {
      if (words[i].address == 0) continue;
      auto *word = reinterpret_cast<const uint16_t *>(static_cast<uintptr_t>(words[i].address));
      if (__atomic_load_n(word, __ATOMIC_SEQ_CST) != static_cast<uint16_t>(words[i].expected)) found = i;
    }
    if (found < 0) relax();
    if (found >= 0 || look % 16 == 0) took = now() - began;
  }
  *e.at<uint32_t>(table) = static_cast<uint32_t>(took);
  return found;
}

int signalFds[65];

// Any thread of the process may get the signal, also those that node started before us: a handler reaches them all,
// a blocked mask with signalfd would not.
void onSignal(int signal) {
  int saved = errno;
  uint64_t one = 1;
  ssize_t ignored = write(signalFds[signal], &one, sizeof(one));
  (void)ignored;
  errno = saved;
}

int64_t signalToEventfd(Env &, int32_t signal, int32_t fd) {
  if (signal < 1 || signal > 64) return -EINVAL;
  signalFds[signal] = fd;
  struct sigaction action = {};
  action.sa_handler = onSignal;
  action.sa_flags = SA_RESTART;
  return sys(sigaction(signal, &action, nullptr));
}

int64_t pollOne(Env &, int32_t fd, int32_t events, int32_t timeout) {
  pollfd p = {fd, static_cast<short>(events), 0};
  int n = poll(&p, 1, timeout);
  return n < 0 ? (errno == EINTR ? 0 : -errno) : (n == 0 ? 0 : p.revents);
}

int64_t monotonic(Env &) { return now(); }

} // namespace

void initWait(napi_env env, napi_value exports, Env *data) {
  add<&makeEventfd>(env, exports, data, "eventfd");
  add<&eventfdWrite>(env, exports, data, "eventfdWrite");
  add<&eventfdRead>(env, exports, data, "eventfdRead");
  add<&epollCreate>(env, exports, data, "epollCreate");
  add<&epollAdd>(env, exports, data, "epollAdd");
  add<&epollDelete>(env, exports, data, "epollDelete");
  add<&epollWait>(env, exports, data, "epollWait");
  add<&busyLoop>(env, exports, data, "busyLoop");
  add<&signalToEventfd>(env, exports, data, "signalToEventfd");
  add<&pollOne>(env, exports, data, "poll");
  add<&monotonic>(env, exports, data, "monotonic");
}
