// A file system whose files fail on purpose, for tests: faultfs DIRECTORY mounts it there, says "ready", and goes on until its standard
// input ends. What a file does is in its name: OPERATION-FAULT, as in read-eio, write-edquot, fsync-hang, read-interruptible, lookup-hang.
// A request that hangs is never answered, an interruptible one when the kernel passes on an interruption (EINTR).
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *const FILES[] = {"plain", "read-eio", "write-eio", "write-enospc", "write-edquot", "fsync-eio", "read-hang", "write-hang",
                                    "fsync-hang", "getattr-hang", "read-interruptible", "lookup-hang"};
enum { COUNT = sizeof(FILES) / sizeof(FILES[0]), FIRST = 2, CONTENT = 4096 };

static int device;
static uint64_t interruptible; // the request that waits for its interruption

static void reply(uint64_t unique, int error, const void *body, size_t length) {
  struct {
    struct fuse_out_header header;
    char body[8192];
  } out = {.header = {.len = sizeof(out.header) + length, .error = -error, .unique = unique}};
  memcpy(out.body, body, length);
  if (write(device, &out, out.header.len) < 0 && errno != ENOENT) perror("faultfs: reply");
}

static void attributes(uint64_t node, struct fuse_attr *attr) {
  bool directory = node == FUSE_ROOT_ID;
  *attr = (struct fuse_attr){.ino = node, .size = directory ? 0 : CONTENT, .mode = directory ? S_IFDIR | 0755 : S_IFREG | 0666, .nlink = 1, .blksize = 4096};
}

// The error of a request on a file; -1: it is not answered.
static int fault(uint64_t node, const char *operation) {
  if (node < FIRST || node >= FIRST + COUNT) return 0;
  const char *name = FILES[node - FIRST];
  size_t length = strlen(operation);
  if (strncmp(name, operation, length) != 0 || name[length] != '-') return 0;
  const char *what = name + length + 1;
  if (strcmp(what, "eio") == 0) return EIO;
  if (strcmp(what, "enospc") == 0) return ENOSPC;
  if (strcmp(what, "edquot") == 0) return EDQUOT;
  return -1;
}

static void serve(const char *request) {
  const struct fuse_in_header *in = (const void *)request;
  const void *body = in + 1;
  static const char zeros[CONTENT];
  int error = 0;
  switch (in->opcode) {
  case FUSE_INIT: {
    struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION, .max_write = CONTENT, .max_background = 64, .congestion_threshold = 48};
    reply(in->unique, 0, &out, sizeof(out));
    return;
  }
  case FUSE_LOOKUP: {
    struct fuse_entry_out out = {0};
    for (int i = 0; i < COUNT; i++)
      if (strcmp(body, FILES[i]) == 0) out.nodeid = FIRST + i;
    if (fault(out.nodeid, "lookup") != 0) return;
    attributes(out.nodeid, &out.attr);
    reply(in->unique, out.nodeid == 0 ? ENOENT : 0, &out, out.nodeid == 0 ? 0 : sizeof(out));
    return;
  }
  case FUSE_GETATTR: {
    struct fuse_attr_out out = {0};
    if (fault(in->nodeid, "getattr") != 0) return;
    attributes(in->nodeid, &out.attr);
    reply(in->unique, 0, &out, sizeof(out));
    return;
  }
  case FUSE_SETATTR: {
    struct fuse_attr_out out = {0};
    attributes(in->nodeid, &out.attr);
    reply(in->unique, 0, &out, sizeof(out));
    return;
  }
  case FUSE_OPEN:
  case FUSE_OPENDIR: {
    struct fuse_open_out out = {.open_flags = FOPEN_DIRECT_IO};
    reply(in->unique, 0, &out, sizeof(out));
    return;
  }
  case FUSE_READ: {
    const struct fuse_read_in *read = body;
    error = fault(in->nodeid, "read");
    if (error < 0) {
      if (strcmp(FILES[in->nodeid - FIRST], "read-interruptible") == 0) interruptible = in->unique;
      return;
    }
    size_t left = read->offset < CONTENT ? CONTENT - read->offset : 0;
    reply(in->unique, error, zeros, error != 0 ? 0 : read->size < left ? read->size : left);
    return;
  }
  case FUSE_WRITE: {
    const struct fuse_write_in *written = body;
    struct fuse_write_out out = {.size = written->size};
    error = fault(in->nodeid, "write");
    if (error >= 0) reply(in->unique, error, &out, error != 0 ? 0 : sizeof(out));
    return;
  }
  case FUSE_FSYNC:
    error = fault(in->nodeid, "fsync");
    if (error >= 0) reply(in->unique, error, NULL, 0);
    return;
  case FUSE_STATFS: {
    struct fuse_statfs_out out = {.st = {.bsize = 4096, .namelen = 255, .frsize = 4096}};
    reply(in->unique, 0, &out, sizeof(out));
    return;
  }
  case FUSE_INTERRUPT: {
    const struct fuse_interrupt_in *which = body;
    if (which->unique == interruptible) reply(which->unique, EINTR, NULL, 0);
    return;
  }
  case FUSE_FORGET:
  case FUSE_BATCH_FORGET:
    return;
  case FUSE_FLUSH:
  case FUSE_RELEASE:
  case FUSE_RELEASEDIR:
  case FUSE_READDIR:
    reply(in->unique, 0, NULL, 0);
    return;
  default:
    reply(in->unique, ENOSYS, NULL, 0);
  }
}

int main(int argc, char **argv) {
  static char request[FUSE_MIN_READ_BUFFER + CONTENT];
  char options[128];
  device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
  snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", device);
  if (argc != 2 || device < 0 || mount("faultfs", argv[1], "fuse", MS_NOSUID | MS_NODEV, options) < 0) {
    perror("faultfs");
    return 1;
  }
  printf("ready\n");
  fflush(stdout);
  struct pollfd fds[] = {{.fd = device, .events = POLLIN}, {.fd = 0, .events = POLLIN}};
  while (poll(fds, 2, -1) >= 0) {
    if (fds[1].revents != 0) break;
    if (fds[0].revents == 0) continue;
    ssize_t n = read(device, request, sizeof(request));
    if (n < 0 && (errno == ENOENT || errno == EINTR || errno == EAGAIN)) continue;
    if (n < 0) break;
    serve(request);
  }
  umount2(argv[1], MNT_DETACH);
  return 0; // whatever hangs ends with the device
}
