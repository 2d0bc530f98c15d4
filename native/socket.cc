// Unix sockets with descriptor passing: net.Socket drops passed descriptors, so the control socket is ours.
#include "addon.h"
#include <fcntl.h>
#include <netdb.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

namespace {

constexpr int MAX_FDS = 253; // SCM_MAX_FD: so many regions a SET_MEM_TABLE can have

int fillAddress(const char *path, sockaddr_un &address) {
  address = {};
  address.sun_family = AF_UNIX;
  size_t length = strlen(path);
  if (length == 0 || length >= sizeof(address.sun_path)) return -ENAMETOOLONG;
  memcpy(address.sun_path, path, length);
  return 0;
}

int64_t closing(int fd) {
  int error = errno;
  close(fd);
  return -error;
}

int64_t unixListen(Env &e, uint32_t path, int32_t backlog) {
  sockaddr_un address;
  int bad = fillAddress(e.at(path), address);
  if (bad) return bad;
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -errno;
  if (bind(fd, reinterpret_cast<sockaddr *>(&address), sizeof(address)) < 0) return closing(fd);
  if (listen(fd, backlog) < 0) return closing(fd);
  return fd;
}

int64_t tcpListen(Env &e, uint32_t host, uint32_t service, int32_t backlog) {
  addrinfo hints = {}, *found = nullptr;
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  if (getaddrinfo(e.at(host), e.at(service), &hints, &found) != 0) return -EADDRNOTAVAIL;
  int64_t result = -EADDRNOTAVAIL;
  int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), on = 1;
  if (fd < 0) result = -errno;
  else if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) < 0 || bind(fd, found->ai_addr, found->ai_addrlen) < 0 || listen(fd, backlog) < 0)
    result = closing(fd);
  else result = fd;
  freeaddrinfo(found);
  return result;
}

int64_t unixConnect(Env &e, uint32_t path) {
  sockaddr_un address;
  int bad = fillAddress(e.at(path), address);
  if (bad) return bad;
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -errno;
  if (connect(fd, reinterpret_cast<sockaddr *>(&address), sizeof(address)) < 0) return closing(fd);
  int flags = fcntl(fd, F_GETFL);
  if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) return closing(fd);
  return fd;
}

int64_t unixDatagram(Env &e, uint32_t path) {
  sockaddr_un address;
  socklen_t length = sizeof(address);
  int bad = fillAddress(e.at(path), address);
  if (bad) return bad;
  if (address.sun_path[0] == '@') {
    length = offsetof(sockaddr_un, sun_path) + strlen(address.sun_path);
    address.sun_path[0] = 0;
  }
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -errno;
  if (connect(fd, reinterpret_cast<sockaddr *>(&address), length) < 0) return closing(fd);
  return fd;
}

int64_t acceptClient(Env &, int32_t fd) { return sys(accept4(fd, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)); }

int64_t makeSocketpair(Env &e, uint32_t out) {
  return sys(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, e.at<int>(out)));
}

int64_t receiveBy(Env &e, int32_t fd, uint32_t buffer, uint32_t length, uint32_t fds, int32_t maxFds, int flags) {
  int *out = e.at<int>(fds);
  out[0] = 0;
  iovec iov = {e.at(buffer), length};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * MAX_FDS)];
  msghdr message = {};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  // Without room for them the kernel closes those that came along.
  message.msg_control = maxFds < 0 ? nullptr : control;
  message.msg_controllen = maxFds < 0 ? 0 : sizeof(control);
  ssize_t n;
  do
    n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT | flags);
  while (n < 0 && errno == EINTR);
  if (n < 0) return -errno;
  for (cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    int count = static_cast<int>((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    const int *passed = reinterpret_cast<const int *>(CMSG_DATA(c));
    for (int i = 0; i < count; i++) {
      if (out[0] < maxFds)
        out[1 + out[0]++] = passed[i];
      else
        close(passed[i]);
    }
  }
  return n;
}

int64_t receive(Env &e, int32_t fd, uint32_t buffer, uint32_t length, uint32_t fds, int32_t maxFds) {
  return receiveBy(e, fd, buffer, length, fds, maxFds, 0);
}

int64_t peek(Env &e, int32_t fd, uint32_t buffer, uint32_t length, uint32_t fds, int32_t maxFds) {
  return receiveBy(e, fd, buffer, length, fds, maxFds, MSG_PEEK);
}

int64_t transmit(Env &e, int32_t fd, uint32_t buffer, uint32_t length, uint32_t fds, int32_t fdCount) {
  if (fdCount < 0 || fdCount > MAX_FDS) return -EINVAL;
  iovec iov = {e.at(buffer), length};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * MAX_FDS)] = {};
  msghdr message = {};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  if (fdCount > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * fdCount);
    cmsghdr *c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int) * fdCount);
    memcpy(CMSG_DATA(c), e.at(fds), sizeof(int) * fdCount);
  }
  ssize_t n;
  do
    n = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  while (n < 0 && errno == EINTR);
  return sys(n);
}

int64_t shutdownBoth(Env &, int32_t fd) { return sys(shutdown(fd, SHUT_RDWR)); }
int64_t closeFd(Env &, int32_t fd) { return sys(close(fd)); }
int64_t duplicate(Env &, int32_t fd) { return sys(fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

int64_t setNonBlocking(Env &, int32_t fd, int32_t on) {
  int flags = fcntl(fd, F_GETFL);
  if (flags < 0) return -errno;
  return sys(fcntl(fd, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK));
}

int64_t option(int fd, int name) {
  int value = 0;
  socklen_t size = sizeof(value);
  return getsockopt(fd, SOL_SOCKET, name, &value, &size) < 0 ? -errno : value;
}

int64_t socketDomain(Env &, int32_t fd) { return option(fd, SO_DOMAIN); }
int64_t socketListening(Env &, int32_t fd) { return option(fd, SO_ACCEPTCONN); }

} // namespace

void initSocket(napi_env env, napi_value exports, Env *data) {
  add<&unixListen>(env, exports, data, "unixListen");
  add<&tcpListen>(env, exports, data, "tcpListen");
  add<&unixConnect>(env, exports, data, "unixConnect");
  add<&unixDatagram>(env, exports, data, "unixDatagram");
  add<&acceptClient>(env, exports, data, "accept");
  add<&makeSocketpair>(env, exports, data, "socketpair");
  add<&receive>(env, exports, data, "recvmsg");
  add<&peek>(env, exports, data, "peekmsg");
  add<&transmit>(env, exports, data, "sendmsg");
  add<&shutdownBoth>(env, exports, data, "shutdown");
  add<&closeFd>(env, exports, data, "close");
  add<&duplicate>(env, exports, data, "dup");
  add<&setNonBlocking>(env, exports, data, "setNonBlocking");
  add<&socketDomain>(env, exports, data, "socketDomain");
  add<&socketListening>(env, exports, data, "socketListening");
}
