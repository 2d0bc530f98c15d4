// The keeper: a process that shares the worker's table of descriptors and outlives it, so that the next worker can have what was open.
//
// It is a fork with CLONE_FILES: what the worker opens and closes is open and closed here, too, at no cost per descriptor. It has a memory
// of its own, of which it gives back everything but a page of code and a piece of stack: neither the killer of processes when memory
// runs out nor a core dump of the worker takes it along. It runs no code but what is in this section: no library is left to call.
// It answers one kind of question, on a SEQPACKET socket, when the worker has ended: an array of descriptor numbers, answered by
// an array of as many words (0, or -1 for a number that is not open) and the descriptors that are. The end of the socket is its end.
#include "addon.h"
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

// Of glibc 2.35 and later.
extern "C" const ptrdiff_t __rseq_offset __attribute__((weak));
extern "C" const unsigned int __rseq_size __attribute__((weak));

#define INLINE static inline __attribute__((always_inline, no_sanitize("address")))

namespace {

// Most descriptors asked for at a time.
constexpr long BATCH = 64;
constexpr uintptr_t PAGE = 4096;

#if defined(__x86_64__)
INLINE long call6(long n, long a, long b, long c, long d, long e, long f) {
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return result;
}
#elif defined(__aarch64__)
INLINE long call6(long n, long a, long b, long c, long d, long e, long f) {
  register long x8 __asm__("x8") = n;
  register long x0 __asm__("x0") = a;
  register long x1 __asm__("x1") = b;
  register long x2 __asm__("x2") = c;
  register long x3 __asm__("x3") = d;
  register long x4 __asm__("x4") = e;
  register long x5 __asm__("x5") = f;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
  return x0;
}
#else
INLINE long call6(long n, long a, long b, long c, long d, long e, long f) {
  long result = syscall(n, a, b, c, d, e, f);
  return result < 0 ? -errno : result;
}
#endif

template <typename... A> INLINE long call(long n, A... arguments) {
  long a[6] = {(long)arguments...};
  return call6(n, a[0], a[1], a[2], a[3], a[4], a[5]);
}

INLINE long waitFor(pollfd *fds, long count) { return call(SYS_ppoll, fds, count, 0, 0, 0, 0); }

// Answers until the other end is closed.
INLINE void serve(int socket) {
  int wanted[BATCH];
  union {
    cmsghdr header;
    char bytes[CMSG_SPACE(sizeof(int) * BATCH)];
  } control;
  for (;;) {
    iovec iov = {wanted, sizeof(wanted)};
    msghdr message;
    message.msg_name = nullptr;
    message.msg_namelen = 0;
    message.msg_iov = &iov;
    message.msg_iovlen = 1;
    message.msg_control = nullptr;
    message.msg_controllen = 0;
    message.msg_flags = 0;
    long n = call(SYS_recvmsg, socket, &message, 0, 0, 0, 0);
    if (n == -EINTR) continue;
    if (n == -EAGAIN) {
      pollfd readable = {socket, POLLIN, 0};
      waitFor(&readable, 1);
      continue;
    }
    if (n <= 0) return;
    long open = 0;
    int *passed = reinterpret_cast<int *>(CMSG_DATA(&control.header));
    for (long i = 0; i < n / (long)sizeof(int); i++) {
      if (call(SYS_fcntl, wanted[i], F_GETFD, 0, 0, 0, 0) < 0) {
        wanted[i] = -1;
      } else {
        passed[open++] = wanted[i];
        wanted[i] = 0;
      }
    }
    iov.iov_len = n;
    if (open > 0) {
      message.msg_control = &control;
      message.msg_controllen = CMSG_LEN(sizeof(int) * open);
      control.header.cmsg_level = SOL_SOCKET;
      control.header.cmsg_type = SCM_RIGHTS;
      control.header.cmsg_len = CMSG_LEN(sizeof(int) * open);
    } else {
      message.msg_control = nullptr;
      message.msg_controllen = 0;
    }
    while ((n = call(SYS_sendmsg, socket, &message, MSG_NOSIGNAL, 0, 0, 0)) == -EINTR || n == -EAGAIN) {
      pollfd writable = {socket, POLLOUT, 0};
      waitFor(&writable, 1);
    }
    if (n < 0) return;
  }
}

struct Keep {
  uintptr_t from, to;
};

#if defined(__x86_64__)
uintptr_t threadPointer() {
  uintptr_t result;
  __asm__("mov %%fs:0, %0" : "=r"(result));
  return result;
}
#else
uintptr_t threadPointer() { return reinterpret_cast<uintptr_t>(__builtin_thread_pointer()); }
#endif

// In a section of its own that begins with a page; two pages of it are kept.
__attribute__((section(".text.keeper"), aligned(4096), noinline, noreturn, no_sanitize("address"),
               optimize("O1", "no-stack-protector", "no-tree-loop-distribute-patterns", "no-tree-vectorize"))) void
keep(int worker, int socket, const sock_fprog *filter, uintptr_t rseq) {
  call(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0);
  call(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0, 0);
  __user_cap_header_struct header;
  header.version = _LINUX_CAPABILITY_VERSION_3;
  header.pid = 0;
  volatile __user_cap_data_struct none[2];
  for (int i = 0; i < 2; i++) none[i].effective = none[i].permitted = none[i].inheritable = 0;
  call(SYS_capset, &header, (long)none, 0, 0, 0, 0);
  if (filter != nullptr) {
    call(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0);
    if (call(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, filter, 0, 0, 0) < 0) call(SYS_exit_group, 1, 0, 0, 0, 0, 0);
  }
  uintptr_t code = reinterpret_cast<uintptr_t>(&keep) & ~(PAGE - 1);
  uintptr_t stack = reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) & ~(PAGE - 1);
  // Code, stack, and what the kernel writes to for restartable sequences of the thread that we were; in the order of their addresses.
  Keep kept[3];
  kept[0].from = code;
  kept[0].to = code + 2 * PAGE;
  kept[1].from = stack - 4 * PAGE;
  kept[1].to = stack + 2 * PAGE;
  int count = 2;
  if (rseq != 0) {
    kept[2].from = rseq & ~(PAGE - 1);
    kept[2].to = kept[2].from + 2 * PAGE;
    count = 3;
  }
  uintptr_t done = 0;
  for (int i = 0; i < count; i++) {
    int lowest = -1;
    for (int k = 0; k < count; k++)
      if (kept[k].to > done && (lowest < 0 || kept[k].from < kept[lowest].from)) lowest = k;
    if (lowest < 0) break;
    if (kept[lowest].from > done) call(SYS_munmap, done, kept[lowest].from - done, 0, 0, 0, 0);
    done = kept[lowest].to;
  }
  // User space ends after 47 or 48 bits: what reaches beyond is refused.
  for (int bits = 48; bits >= 47; bits--) call(SYS_munmap, done, (1ul << bits) - PAGE - done, 0, 0, 0, 0);
  pollfd fds[2];
  do {
    fds[0].fd = worker;
    fds[0].events = POLLIN;
    fds[0].revents = 0;
    fds[1].fd = socket;
    fds[1].events = 0; // its end is told without
    fds[1].revents = 0;
  } while (waitFor(fds, 2) < 0);
  if (fds[1].revents == 0) serve(socket);
  for (;;) call(SYS_exit_group, 0, 0, 0, 0, 0, 0);
}

sock_filter filterCode[BPF_MAXINSNS];

// Starts the keeper, as a child of our parent; `seccomp`: the filter that it puts on, or -1. Returns its pid.
int64_t keeperStart(Env &, int32_t socket, int32_t seccomp) {
  int worker = syscall(SYS_pidfd_open, getpid(), 0);
  if (worker < 0) return -errno;
  sock_fprog program = {0, filterCode};
  if (seccomp >= 0) {
    ssize_t bytes = pread(seccomp, filterCode, sizeof(filterCode), 0);
    if (bytes <= 0) return bytes < 0 ? -errno : -EINVAL;
    program.len = static_cast<unsigned short>(bytes / sizeof(sock_filter));
  }
  uintptr_t rseq = &__rseq_size != nullptr && __rseq_size > 0 ? threadPointer() + __rseq_offset : 0;
  // Signals of the worker's group are not for it, and it has no handlers left.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  long pid = call(SYS_clone, CLONE_FILES | CLONE_PARENT | SIGCHLD, 0, 0, 0, 0, 0);
  if (pid == 0) keep(worker, socket, seccomp >= 0 ? &program : nullptr, rseq);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return pid;
}

// Does the keeper's work in the worker itself, until the other end is closed.
int64_t keeperServe(Env &, int32_t socket) {
  serve(socket);
  return 0;
}

// Gives a descriptor the number `to`, which must be free; its own number is free afterwards.
int64_t moveFd(Env &, int32_t from, int32_t to) {
  if (from == to) return 0;
  if (fcntl(to, F_GETFD) >= 0) return -EBUSY;
  if (dup3(from, to, O_CLOEXEC) < 0) return -errno;
  close(from);
  return 0;
}

// Has every number below `below` taken, by copies of `fd`: what is opened next has a higher one. The numbers go to `list`, their count first.
int64_t fillNumbers(Env &e, int32_t fd, int32_t below, uint32_t list) {
  int *out = e.at<int>(list);
  out[0] = 0;
  for (;;) {
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (copy < 0) return -errno;
    if (copy >= below) {
      close(copy);
      return 0;
    }
    out[1 + out[0]++] = copy;
  }
}

} // namespace

void initKeeper(napi_env env, napi_value exports, Env *data) {
  add<&keeperStart>(env, exports, data, "keeperStart");
  add<&keeperServe>(env, exports, data, "keeperServe");
  add<&moveFd>(env, exports, data, "moveFd");
  add<&fillNumbers>(env, exports, data, "fillNumbers");
}
