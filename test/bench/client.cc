// A vhost-user-fs front end that measures: it drives one daemon through its socket as a guest's fs/fuse/virtio_fs.c would,
// and checks every reply. One file and one thread, in C++ because it must cost less than what it measures (its own CPU time
// is in every result, and `null` below is a back end that does nothing to measure it against).
//
//   client SOCKET [queues=1] [event-idx=1] [share=DIR] [pids=1,2] [cpu=N]      front end
//   client null SOCKET                                                         back end that answers everything with ENOSYS
//
// It takes commands on stdin, one a line, and answers each with a line of JSON:
//
//   run OP [depth=1] [ms=200 | count=N] [warm=ms] [wait=1] [OP's own arguments]
//   bare OP [dir=D] [file=F] [size=N]           the system call that serves a request, called here: what no daemon can save
//   drop FILE          makes the host forget the cached pages of a file below share
//   warm FILE          reads it on the host, so that all its pages are cached
//   events latency dir=D count=N [depth=0]      from a host's write to the record in guest memory, beside so many GETATTRs
//   events rate dir=D ms=200                    a host that makes events as fast as it can: how many reach the guest
//   events drain dir=D count=N                  so many events made while the daemon is stopped: how fast it delivers them
//   events host file=F count=N                  what a host's write of 8 bytes takes
// (the first three leave buffers with the daemon: only "events host" may follow them)
//
// wait=1: the client sleeps on the call eventfd, as a guest without work does; wait=0: it asks for no interrupts and polls.
// As virtio_fs.c does, requests use indirect descriptors (header, arguments, one descriptor per page of data), each is
// published and kicked on its own, and FORGET goes to the high priority queue.
//
// An operation is what its name says, start to end: a cycle like OPEN/READ/RELEASE is one operation of three requests.
#include <linux/fuse.h>
#define VIRTIO_RING_NO_LEGACY  // its inline functions are not C++
#include <linux/virtio_ring.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

using std::string;

[[noreturn]] void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
void die(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "bench client: ");
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  exit(1);
}

int must(int result, const char *what) {
  if (result < 0) die("%s: %s", what, strerror(errno));
  return result;
}

uint64_t nanoseconds(clockid_t clock) {
  timespec t;
  if (clock_gettime(clock, &t) != 0) return 0;
  return uint64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

uint64_t now() { return nanoseconds(CLOCK_MONOTONIC); }

// "name=value" words of a command.
struct Arguments {
  std::map<string, string> values;

  explicit Arguments(const std::vector<string> &words) {
    for (const string &word : words) {
      size_t at = word.find('=');
      if (at != string::npos) values[word.substr(0, at)] = word.substr(at + 1);
    }
  }
  string text(const char *name, const char *otherwise = "") const {
    auto found = values.find(name);
    return found == values.end() ? otherwise : found->second;
  }
  uint64_t number(const char *name, uint64_t otherwise) const {
    auto found = values.find(name);
    return found == values.end() ? otherwise : strtoull(found->second.c_str(), nullptr, 10);
  }
};

std::vector<string> split(const string &line, char by) {
  std::vector<string> words;
  string word;
  for (char c : line + by) {
    if (c != by) word += c;
    else if (!word.empty()) words.push_back(word), word.clear();
  }
  return words;
}

// xorshift64*: the same offsets and names for every daemon.
struct Random {
  uint64_t state = 0x9e3779b97f4a7c15;
  uint64_t next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1d;
  }
  uint64_t below(uint64_t n) { return next() % n; }
};

// Times in buckets of 1/64 of their power of two: percentiles to 1.6 %.
class Histogram {
  static constexpr int SUB = 6;
  std::vector<uint64_t> buckets = std::vector<uint64_t>(64 << SUB);
  uint64_t total = 0;

 public:
  void add(uint64_t value) {
    int shift = value < (1 << SUB) ? 0 : 63 - __builtin_clzll(value) - SUB;
    buckets[(uint64_t(shift) << SUB) + (value >> shift)]++;
    total++;
  }
  void clear() {
    std::fill(buckets.begin(), buckets.end(), 0);
    total = 0;
  }
  uint64_t count() const { return total; }
  uint64_t percentile(double part) const {
    uint64_t wanted = uint64_t(part * double(total)) + 1, seen = 0;
    if (wanted > total) wanted = total;
    for (size_t i = 0; i < buckets.size(); i++) {
      seen += buckets[i];
      if (buckets[i] && seen >= wanted) {
        uint64_t shift = i >> SUB ? (i >> SUB) - 1 : 0;
        return (i - (shift << SUB)) << shift;
      }
    }
    return 0;
  }
};

// --- vhost-user ---

enum : uint32_t {
  GET_FEATURES = 1,
  SET_FEATURES = 2,
  SET_OWNER = 3,
  SET_MEM_TABLE = 5,
  SET_VRING_NUM = 8,
  SET_VRING_ADDR = 9,
  SET_VRING_BASE = 10,
  SET_VRING_KICK = 12,
  SET_VRING_CALL = 13,
  GET_PROTOCOL_FEATURES = 15,
  SET_PROTOCOL_FEATURES = 16,
  GET_QUEUE_NUM = 17,
  SET_VRING_ENABLE = 18,
};
constexpr uint32_t VERSION = 1, REPLY = 4, NEED_REPLY = 8;
constexpr uint64_t INDIRECT_DESC = 1ull << 28, EVENT_IDX = 1ull << 29, PROTOCOL_FEATURES = 1ull << 30, VERSION_1 = 1ull << 32;
constexpr uint64_t PROTOCOL_MQ = 1 << 0, PROTOCOL_REPLY_ACK = 1 << 3;

struct MemoryTable {
  uint32_t count, padding;
  struct {
    uint64_t guest, size, user, offset;
  } region[8];
};
struct VringState {
  uint32_t index, value;
};
struct VringAddress {
  uint32_t index, flags;
  uint64_t descriptors, used, avail, log;
};
struct Message {
  uint32_t request = 0, flags = VERSION, size = 0;
  union {
    uint64_t u64;
    VringState state;
    VringAddress address;
    MemoryTable table;
    uint8_t bytes[512];
  } payload;
  int fd = -1;  // not on the wire
};
constexpr size_t HEADER = 12;

void send(int socket, const Message &m) {
  iovec parts[] = {{const_cast<uint32_t *>(&m.request), HEADER}, {const_cast<uint64_t *>(&m.payload.u64), m.size}};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  if (m.fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &m.fd, sizeof(int));
  }
  must(int(sendmsg(socket, &message, MSG_NOSIGNAL)), "sendmsg");
}

// False at the end of the stream.
bool receive(int socket, Message &m) {
  iovec part = {&m.request, HEADER};
  alignas(cmsghdr) char control[CMSG_SPACE(8 * sizeof(int))];
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  m.fd = -1;
  ssize_t got = recvmsg(socket, &message, MSG_WAITALL);
  if (got <= 0) return false;
  for (cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header))
    if (header->cmsg_type == SCM_RIGHTS) memcpy(&m.fd, CMSG_DATA(header), sizeof(int));
  if (got != HEADER || m.size > sizeof m.payload) die("not a vhost-user message");
  return m.size == 0 || recv(socket, &m.payload, m.size, MSG_WAITALL) == ssize_t(m.size);
}

// --- guest memory and queues ---

struct Slot;

constexpr unsigned QUEUE_SIZE = 128;  // as QEMU's vhost-user-fs-pci
constexpr unsigned MAX_DEPTH = 65;
constexpr size_t PAGE = 4096, DATA = 1 << 20;

struct Memory {
  uint8_t *base = nullptr;
  size_t size, used = 0;
  int fd;

  explicit Memory(size_t bytes) : size(bytes) {
    fd = must(memfd_create("guest memory", MFD_CLOEXEC), "memfd_create");
    must(ftruncate(fd, off_t(bytes)), "ftruncate");
    base = static_cast<uint8_t *>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    if (base == MAP_FAILED) die("mmap: %s", strerror(errno));
  }
  uint8_t *take(size_t bytes, size_t alignment = 64) {
    used = (used + alignment - 1) & ~(alignment - 1);
    uint8_t *result = base + used;
    used += bytes;
    if (used > size) die("guest memory is too small");
    return result;
  }
  uint64_t guest(const void *address) const { return uint64_t(static_cast<const uint8_t *>(address) - base); }
};

// The three parts of a split virtqueue.
struct Ring {
  unsigned size = 0;
  vring_desc *desc = nullptr;
  vring_avail *avail = nullptr;
  vring_used *used = nullptr;
  __virtio16 &usedEvent() { return avail->ring[size]; }
  __virtio16 &availEvent() { return *reinterpret_cast<__virtio16 *>(&used->ring[size]); }
};

// vring_need_event: whether moving from `before` to `after` passed `event`.
bool needEvent(uint16_t event, uint16_t after, uint16_t before) { return uint16_t(after - event - 1) < uint16_t(after - before); }

struct Queue {
  bool eventIdx;
  Ring ring;
  uint16_t available = 0, seen = 0;
  int kick;
  uint64_t kicks = 0;
  Slot *slots[QUEUE_SIZE] = {};  // by head

  Queue(Memory &memory, bool event) : eventIdx(event) {
    ring.size = QUEUE_SIZE;
    ring.desc = reinterpret_cast<vring_desc *>(memory.take(QUEUE_SIZE * sizeof(vring_desc), PAGE));
    ring.avail = reinterpret_cast<vring_avail *>(memory.take(6 + 2 * QUEUE_SIZE));
    ring.used = reinterpret_cast<vring_used *>(memory.take(6 + 8 * QUEUE_SIZE));
    kick = must(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
  }

  // One chain of one indirect descriptor; then the kick, unless the device has said that it looks by itself.
  void submit(uint16_t head, uint64_t table, uint32_t descriptors) {
    ring.desc[head] = {table, descriptors * uint32_t(sizeof(vring_desc)), VRING_DESC_F_INDIRECT, 0};
    ring.avail->ring[available % QUEUE_SIZE] = head;
    uint16_t before = available++;
    __atomic_store_n(&ring.avail->idx, available, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    bool wanted = eventIdx ? needEvent(__atomic_load_n(&ring.availEvent(), __ATOMIC_RELAXED), available, before)
                           : !(__atomic_load_n(&ring.used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY);
    if (!wanted) return;
    uint64_t one = 1;
    kicks++;
    must(int(write(kick, &one, sizeof one)), "kick");
  }
  bool ready() const { return __atomic_load_n(&ring.used->idx, __ATOMIC_ACQUIRE) != seen; }
  // virtqueue_disable_cb and virtqueue_enable_cb.
  void disableCalls() {
    if (!eventIdx) ring.avail->flags = VRING_AVAIL_F_NO_INTERRUPT;
    else ring.usedEvent() = uint16_t(seen + 0x8000);
  }
  void enableCalls() {
    if (!eventIdx) ring.avail->flags = 0;
    else ring.usedEvent() = seen;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
  }
};

// What one of the requests in flight needs: buffers, an indirect table, and the state of its operation.
struct Slot {
  unsigned number;
  Queue *queue;      // its request queue
  uint16_t head;     // its descriptor there; in the high priority queue it is `number`
  uint8_t *in;       // fuse_in_header and arguments
  uint8_t *out;      // fuse_out_header and the fixed part of the reply
  uint8_t *data;     // pages
  vring_desc *table;

  // The request that is built or under way.
  Queue *sentTo;
  uint32_t descriptors;
  uint64_t unique;
  int expectError;
  uint32_t expectBytes;  // of the reply without its header
  bool exact;            // or at most that many
  bool oneWay;           // no reply at all

  // The operation.
  uint64_t began;
  int step;
  uint64_t index, nodeid, fh, offset;
  uint64_t count;

  uint8_t *arguments() { return in + sizeof(fuse_in_header); }
  template <class T>
  T &argument() {
    memset(arguments(), 0, sizeof(T));
    return *reinterpret_cast<T *>(arguments());
  }
  template <class T>
  const T &reply() const {
    return *reinterpret_cast<const T *>(out + sizeof(fuse_out_header));
  }
  const fuse_out_header &header() const { return *reinterpret_cast<const fuse_out_header *>(out); }
};

// Files are filled with their own offsets, so that any page shows whether it is the right one.
void fillPage(uint8_t *page, uint64_t offset) {
  uint64_t last = offset + PAGE - 8;
  memcpy(page, &offset, 8);
  memcpy(page + PAGE - 8, &last, 8);
}
bool checkPage(const uint8_t *page, uint64_t offset) {
  uint64_t first, last;
  memcpy(&first, page, 8);
  memcpy(&last, page + PAGE - 8, 8);
  return first == offset && last == offset + PAGE - 8;
}

// --- remote fsnotify: the numbers of src/watch/PROTOCOL.md ---

constexpr uint32_t FSNOTIFY_INIT_FLAG2 = 1 << 28;
constexpr uint32_t FUSE_FSNOTIFY = 2048, FUSE_READ_NOTIFY = 2049;
constexpr int NOTIFY_FSNOTIFY = 128;
constexpr uint32_t NOTIFY_BYTES = 4096;
constexpr uint64_t FS_MODIFY = 2, FS_CREATE = 0x100, FS_DELETE = 0x200, FS_EVENT_ON_CHILD = 0x08000000;
constexpr uint32_t RECORD_OVERFLOW = 1;

struct FsnotifyIn {
  uint64_t mask;
  uint32_t generation, flags;
};
struct FsnotifyOut {
  uint64_t mask, supported;
};
struct ReadNotifyIn {
  uint32_t size, flags;
};
struct FsnotifyRecord {
  uint32_t reclen, flags;
  uint64_t nodeid, child, mask;
  uint32_t generation, childGeneration, cookie, namelen;
  char name[];
};

// --- the session ---

struct Session {
  int socket, call;
  Memory memory{192 << 20};
  std::vector<std::unique_ptr<Queue>> queues;  // 0 is the high priority queue
  std::vector<Slot> slots;
  uint64_t unique = 0;
  string share;
  std::vector<pid_t> pids;
  std::vector<clockid_t> clocks;
  uint32_t user = 0;
  std::map<string, uint64_t> known;         // nodeids of paths
  std::map<uint64_t, uint32_t> generations;  // of those nodeids
  uint64_t errors = 0;
  string firstError;
  uint64_t interrupts = 0;
  uint64_t requests = 0;
  bool acknowledge = false;
  bool fsnotify = false;
  unsigned offeredQueues = 2;

  uint64_t ask(uint32_t request) {
    Message m;
    m.request = request;
    send(socket, m);
    if (!receive(socket, m) || m.request != request || m.size != 8) die("no reply to request %u", request);
    return m.payload.u64;
  }
  template <class T>
  void tell(uint32_t request, const T &payload, int fd = -1, uint32_t size = sizeof(T)) {
    Message m;
    m.request = request;
    m.size = size;
    m.fd = fd;
    m.flags |= acknowledge ? NEED_REPLY : 0;
    memcpy(&m.payload, &payload, size);
    send(socket, m);
    if (acknowledge && (!receive(socket, m) || m.payload.u64 != 0)) die("request %u was refused", request);
  }

  Session(const char *path, const Arguments &arguments) {
    unsigned requestQueues = unsigned(arguments.number("queues", 1));
    share = arguments.text("share");
    fsnotify = arguments.number("fsnotify", 0);
    for (const string &pid : split(arguments.text("pids"), ',')) {
      clockid_t clock;
      pids.push_back(atoi(pid.c_str()));
      if (clock_getcpuclockid(pids.back(), &clock) == 0) clocks.push_back(clock);
    }
    socket = must(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    must(connect(socket, reinterpret_cast<sockaddr *>(&address), sizeof address), path);

    uint64_t wanted = VERSION_1 | INDIRECT_DESC | PROTOCOL_FEATURES | (arguments.number("event-idx", 1) ? EVENT_IDX : 0);
    uint64_t features = ask(GET_FEATURES) & wanted;
    if (!(features & INDIRECT_DESC)) die("the daemon does not offer indirect descriptors");
    if (features & PROTOCOL_FEATURES) {
      uint64_t protocol = ask(GET_PROTOCOL_FEATURES) & (PROTOCOL_MQ | PROTOCOL_REPLY_ACK);
      tell(SET_PROTOCOL_FEATURES, protocol);
      if (protocol & PROTOCOL_MQ) offeredQueues = unsigned(ask(GET_QUEUE_NUM));
      acknowledge = protocol & PROTOCOL_REPLY_ACK;
    }
    if (requestQueues + 1 > offeredQueues) die("the daemon has %u queues", offeredQueues);
    uint64_t none = 0;
    tell(SET_OWNER, none, -1, 0);
    tell(SET_FEATURES, features);
    MemoryTable table = {};
    table.count = 1;
    table.region[0] = {0, memory.size, reinterpret_cast<uint64_t>(memory.base), 0};
    tell(SET_MEM_TABLE, table, memory.fd, 8 + 32);

    // One eventfd for all queues: a single read waits for all of them, and its count is the number of interrupts.
    call = must(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
    for (unsigned i = 0; i <= requestQueues; i++) {
      queues.push_back(std::make_unique<Queue>(memory, features & EVENT_IDX));
      const Ring &ring = queues[i]->ring;
      tell(SET_VRING_NUM, VringState{i, QUEUE_SIZE});
      tell(SET_VRING_BASE, VringState{i, 0});
      auto user = [](const void *p) { return reinterpret_cast<uint64_t>(p); };
      tell(SET_VRING_ADDR, VringAddress{i, 0, user(ring.desc), user(ring.used), user(ring.avail), 0});
      tell(SET_VRING_CALL, uint64_t(i), call);
      tell(SET_VRING_KICK, uint64_t(i), queues[i]->kick);
      if (features & PROTOCOL_FEATURES) tell(SET_VRING_ENABLE, VringState{i, 1});
    }
    for (unsigned i = 0; i < MAX_DEPTH; i++) {
      Slot slot = {};
      slot.number = i;
      slot.queue = queues[1 + i % requestQueues].get();
      slot.head = uint16_t(i / requestQueues);
      slot.in = memory.take(512);
      slot.out = memory.take(512);
      slot.table = reinterpret_cast<vring_desc *>(memory.take((4 + DATA / PAGE) * sizeof(vring_desc)));
      slot.data = memory.take(DATA, PAGE);
      slots.push_back(slot);
    }
    for (Slot &slot : slots) {
      slot.queue->slots[slot.head] = &slot;
      queues[0]->slots[slot.number] = &slot;
    }
  }

  uint64_t daemonCpu() const {
    uint64_t sum = 0;
    for (clockid_t clock : clocks) sum += nanoseconds(clock);
    return sum;
  }

  void fail(const Slot &slot, const char *what) {
    if (errors++ == 0) {
      const auto &header = *reinterpret_cast<const fuse_in_header *>(slot.in);
      char text[200];
      snprintf(text, sizeof text, "opcode %u, nodeid %llu: %s (error %d, length %u)", header.opcode,
               static_cast<unsigned long long>(header.nodeid), what, slot.header().error, slot.header().len);
      firstError = text;
    }
  }

  // --- requests ---

  // Builds a request whose `argumentBytes` of arguments are in place. `dataIn` and `dataOut` are bytes of page data.
  void build(Slot &s, uint32_t opcode, uint64_t nodeid, size_t argumentBytes, size_t replyBytes, size_t dataIn = 0, size_t dataOut = 0,
             bool scattered = true) {
    auto &header = *reinterpret_cast<fuse_in_header *>(s.in);
    header = {};
    header.len = uint32_t(sizeof header + argumentBytes + dataIn);
    header.opcode = opcode;
    header.unique = s.unique = unique += 2;
    header.nodeid = nodeid;
    header.uid = header.gid = user;
    header.pid = 1;
    s.oneWay = opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET;
    s.sentTo = s.oneWay ? queues[0].get() : s.queue;
    s.expectError = 0;
    s.expectBytes = uint32_t(replyBytes + dataOut);
    s.exact = true;
    uint32_t n = 0;
    auto put = [&](const void *address, size_t bytes, uint16_t flags) {
      s.table[n] = {memory.guest(address), uint32_t(bytes), uint16_t(flags | VRING_DESC_F_NEXT), uint16_t(n + 1)};
      n++;
    };
    auto pages = [&](size_t bytes, uint16_t flags) {
      size_t count = (bytes + PAGE - 1) / PAGE;
      for (size_t i = 0; i < count; i++) put(page(s, i, count, scattered), std::min(PAGE, bytes - i * PAGE), flags);
    };
    put(s.in, sizeof header, 0);
    if (argumentBytes) put(s.arguments(), argumentBytes, 0);
    pages(dataIn, 0);
    if (!s.oneWay) {
      memset(s.out, 0xff, sizeof(fuse_out_header));
      put(s.out, sizeof(fuse_out_header), VRING_DESC_F_WRITE);
      if (replyBytes) put(s.out + sizeof(fuse_out_header), replyBytes, VRING_DESC_F_WRITE);
      pages(dataOut, VRING_DESC_F_WRITE);
    }
    s.table[n - 1].flags &= uint16_t(~VRING_DESC_F_NEXT);
    s.descriptors = n;
  }

  // A guest's pages are not next to each other: scattered data lies in its pages from the last to the first.
  static uint8_t *page(const Slot &s, size_t i, size_t count, bool scattered = true) {
    return s.data + (scattered ? count - 1 - i : i) * PAGE;
  }

  void buildName(Slot &s, uint32_t opcode, uint64_t nodeid, const char *name, size_t before, size_t replyBytes) {
    size_t length = strlen(name) + 1;
    memcpy(s.arguments() + before, name, length);
    build(s, opcode, nodeid, before + length, replyBytes);
  }
  void buildLookup(Slot &s, uint64_t parent, const char *name) { buildName(s, FUSE_LOOKUP, parent, name, 0, sizeof(fuse_entry_out)); }
  void buildOpen(Slot &s, uint64_t nodeid, bool directory, uint32_t flags) {
    s.argument<fuse_open_in>().flags = flags;
    build(s, directory ? FUSE_OPENDIR : FUSE_OPEN, nodeid, sizeof(fuse_open_in), sizeof(fuse_open_out));
  }
  void buildRelease(Slot &s, uint64_t nodeid, uint64_t fh, bool directory) {
    s.argument<fuse_release_in>().fh = fh;
    build(s, directory ? FUSE_RELEASEDIR : FUSE_RELEASE, nodeid, sizeof(fuse_release_in), 0);
  }
  void buildRead(Slot &s, uint64_t nodeid, uint64_t fh, uint64_t offset, uint32_t size) {
    auto &in = s.argument<fuse_read_in>();
    in.fh = fh, in.offset = offset, in.size = size;
    build(s, FUSE_READ, nodeid, sizeof in, 0, 0, size);
  }
  void buildWrite(Slot &s, uint64_t nodeid, uint64_t fh, uint64_t offset, uint32_t size) {
    auto &in = s.argument<fuse_write_in>();
    in.fh = fh, in.offset = offset, in.size = size;
    for (size_t i = 0; i < size / PAGE; i++) fillPage(page(s, i, size / PAGE), offset + i * PAGE);
    build(s, FUSE_WRITE, nodeid, sizeof in, sizeof(fuse_write_out), size);
  }
  void buildForget(Slot &s, uint64_t nodeid, uint64_t lookups) {
    s.argument<fuse_forget_in>().nlookup = lookups;
    build(s, FUSE_FORGET, nodeid, sizeof(fuse_forget_in), 0);
  }

  void submit(Slot &s) {
    requests++;
    s.sentTo->submit(s.sentTo == queues[0].get() ? uint16_t(s.number) : s.head, memory.guest(s.table), s.descriptors);
  }

  // Whether the reply is what the request asked for.
  bool check(const Slot &s, uint32_t used) {
    if (s.oneWay) return true;
    const fuse_out_header &header = s.header();
    const char *problem = nullptr;
    if (header.len != used) problem = "the header's length is not the used ring's";
    else if (header.unique != s.unique) problem = "the reply to another request";
    else if (header.error != -s.expectError) problem = "unexpected error";
    else if (header.error == 0) {
      uint32_t bytes = header.len - uint32_t(sizeof header);
      if (s.exact ? bytes != s.expectBytes : bytes > s.expectBytes) problem = "a reply of unexpected length";
    } else if (header.len != sizeof header) problem = "an error with a body";
    if (problem) const_cast<Session *>(this)->fail(s, problem);
    return problem == nullptr;
  }

  // Takes one chain that came back.
  Slot *collect(Queue &queue, uint32_t &length) {
    if (!queue.ready()) return nullptr;
    const vring_used_elem &element = queue.ring.used->ring[queue.seen % QUEUE_SIZE];
    queue.seen++;
    if (element.id >= QUEUE_SIZE || !queue.slots[element.id]) die("the daemon returned chain %u, which it does not have", element.id);
    length = element.len;
    return queue.slots[element.id];
  }

  void waitForCall() {
    // poll and read, not a read that waits: a back end may have set O_NONBLOCK on the eventfd, which both ends share.
    pollfd wanted = {call, POLLIN, 0};
    poll(&wanted, 1, -1);
    uint64_t count;
    if (read(call, &count, sizeof count) == sizeof count) interrupts += count;
  }

  // One request at a time, for preparations: sends what was built in slot 0 and waits for it.
  bool call1(const char *what, bool mayFail = false) {
    Slot &s = slots[0];
    Queue &queue = *s.sentTo;
    queue.enableCalls();
    submit(s);
    uint32_t length;
    while (!collect(queue, length)) waitForCall();
    if (!s.oneWay && s.header().error != 0 && s.header().error != -s.expectError) {
      if (!mayFail) die("%s: %s", what, strerror(-s.header().error));
      return false;
    }
    return check(s, length);
  }

  void init() {
    Slot &s = slots[0];
    auto &in = s.argument<fuse_init_in>();
    in.major = FUSE_KERNEL_VERSION;
    in.minor = FUSE_KERNEL_MINOR_VERSION;
    in.max_readahead = 128 << 10;
    // What a Linux guest offers for a virtio-fs mount.
    in.flags = FUSE_ASYNC_READ | FUSE_POSIX_LOCKS | FUSE_ATOMIC_O_TRUNC | FUSE_EXPORT_SUPPORT | FUSE_BIG_WRITES | FUSE_DONT_MASK |
               FUSE_SPLICE_WRITE | FUSE_SPLICE_MOVE | FUSE_SPLICE_READ | FUSE_FLOCK_LOCKS | FUSE_HAS_IOCTL_DIR | FUSE_AUTO_INVAL_DATA |
               FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_ASYNC_DIO | FUSE_WRITEBACK_CACHE | FUSE_NO_OPEN_SUPPORT |
               FUSE_PARALLEL_DIROPS | FUSE_HANDLE_KILLPRIV | FUSE_POSIX_ACL | FUSE_ABORT_ERROR | FUSE_MAX_PAGES | FUSE_CACHE_SYMLINKS |
               FUSE_NO_OPENDIR_SUPPORT | FUSE_EXPLICIT_INVAL_DATA | FUSE_SUBMOUNTS | FUSE_HANDLE_KILLPRIV_V2 | FUSE_SETXATTR_EXT |
               FUSE_INIT_EXT;
    if (fsnotify) in.flags2 |= FSNOTIFY_INIT_FLAG2;
    build(s, FUSE_INIT, 0, sizeof in, sizeof(fuse_init_out));
    s.exact = false;
    call1("INIT");
    known["."] = FUSE_ROOT_ID;
  }

  // The nodeid of a path below the share.
  uint64_t resolve(const string &path) {
    auto found = known.find(path);
    if (found != known.end()) return found->second;
    size_t slash = path.rfind('/');
    uint64_t parent = slash == string::npos ? FUSE_ROOT_ID : resolve(path.substr(0, slash));
    buildLookup(slots[0], parent, path.substr(slash == string::npos ? 0 : slash + 1).c_str());
    call1(path.c_str());
    const auto &entry = slots[0].reply<fuse_entry_out>();
    generations[entry.nodeid] = uint32_t(entry.generation);
    return known[path] = entry.nodeid;
  }
  uint64_t open(uint64_t nodeid, uint32_t flags) {
    buildOpen(slots[0], nodeid, false, flags);
    call1("OPEN");
    return slots[0].reply<fuse_open_out>().fh;
  }
  void release(uint64_t nodeid, uint64_t fh) {
    buildRelease(slots[0], nodeid, fh, false);
    call1("RELEASE");
  }
};

// --- operations ---

struct Operation {
  Session &session;
  Random random;
  unsigned depth = 1;
  uint64_t entries = 0;  // what else an operation counts

  explicit Operation(Session &s) : session(s) {}
  virtual ~Operation() {}
  // Builds the first request of an operation.
  virtual void begin(Slot &s) = 0;
  // A sound reply came: checks what it says, and builds the next request of the operation (true) or has none (false).
  virtual bool reply(Slot &s) = 0;
  // How many operations there are, where that is not for the caller to say.
  virtual uint64_t total() const { return 0; }
  // All operations ended: closes what was opened, checks what can be checked on the host.
  virtual void end() {}
  // Whether this slot's time is to be in the result: a mix measures only one of its parts.
  virtual bool measured(const Slot &) const { return true; }
};

// Files NAME = "f%07u" of a directory, looked up once.
struct Names {
  uint64_t directory = 0;
  std::vector<uint64_t> nodeids, inodes;
  std::vector<uint32_t> generations;
};
std::map<string, Names> allNames;

void nameOf(char *name, uint64_t index) {
  memcpy(name, "f0000000", 9);
  for (char *digit = name + 7; index; index /= 10) *digit-- = char('0' + index % 10);
}

struct Learn : Operation {
  Names &names;
  uint64_t next = 0;
  Learn(Session &s, const Arguments &a) : Operation(s), names(allNames[a.text("dir")]) {
    names.directory = s.resolve(a.text("dir"));
    names.nodeids.resize(a.number("names", 1000));
    names.inodes.resize(names.nodeids.size());
    names.generations.resize(names.nodeids.size());
    next = a.number("first", 0);
  }
  uint64_t total() const override { return names.nodeids.size() - next; }
  void begin(Slot &s) override {
    char name[16];
    s.index = next++;
    nameOf(name, s.index);
    session.buildLookup(s, names.directory, name);
  }
  bool reply(Slot &s) override {
    names.nodeids[s.index] = s.reply<fuse_entry_out>().nodeid;
    names.inodes[s.index] = s.reply<fuse_entry_out>().attr.ino;
    names.generations[s.index] = uint32_t(s.reply<fuse_entry_out>().generation);
    return false;
  }
};

struct OverNames : Operation {
  Names &names;
  OverNames(Session &s, const Arguments &a) : Operation(s), names(allNames[a.text("dir")]) {
    if (names.nodeids.empty()) die("%s has not been learnt", a.text("dir").c_str());
  }
  uint64_t any() { return random.below(names.nodeids.size()); }
};

struct Getattr : OverNames {
  using OverNames::OverNames;
  void begin(Slot &s) override {
    s.index = any();
    s.argument<fuse_getattr_in>();
    session.build(s, FUSE_GETATTR, names.nodeids[s.index], sizeof(fuse_getattr_in), sizeof(fuse_attr_out));
  }
  bool reply(Slot &s) override {
    if (s.reply<fuse_attr_out>().attr.ino != names.inodes[s.index]) session.fail(s, "the attributes of another file");
    return false;
  }
};

struct Lookup : OverNames {
  using OverNames::OverNames;
  void begin(Slot &s) override {
    char name[16];
    nameOf(name, s.index = any());
    session.buildLookup(s, names.directory, name);
  }
  bool reply(Slot &s) override {
    const auto &entry = s.reply<fuse_entry_out>();
    if (entry.nodeid != names.nodeids[s.index] || entry.attr.ino != names.inodes[s.index]) session.fail(s, "another file's entry");
    return false;
  }
};

struct Missing : OverNames {
  using OverNames::OverNames;
  void begin(Slot &s) override {
    char name[16];
    nameOf(name, any());
    name[0] = 'm';
    session.buildLookup(s, names.directory, name);
    s.expectError = ENOENT;
  }
  bool reply(Slot &) override { return false; }
};

struct Statfs : Operation {
  using Operation::Operation;
  void begin(Slot &s) override { session.build(s, FUSE_STATFS, FUSE_ROOT_ID, 0, sizeof(fuse_statfs_out)); }
  bool reply(Slot &s) override {
    if (s.reply<fuse_statfs_out>().st.blocks == 0) session.fail(s, "a file system without blocks");
    return false;
  }
};

struct Getxattr : OverNames {
  static constexpr char NAME[] = "user.bench";
  Getxattr(Session &s, const Arguments &a) : OverNames(s, a) {
    string file = s.share + "/" + a.text("dir") + "/f0000000";
    must(setxattr(file.c_str(), NAME, "value", 5, 0), file.c_str());
  }
  void begin(Slot &s) override {
    s.argument<fuse_getxattr_in>().size = 64;
    session.buildName(s, FUSE_GETXATTR, names.nodeids[0], NAME, sizeof(fuse_getxattr_in), 64);
    s.exact = false;
  }
  bool reply(Slot &s) override {
    if (s.header().len != sizeof(fuse_out_header) + 5 || memcmp(s.out + sizeof(fuse_out_header), "value", 5)) session.fail(s, "wrong value");
    return false;
  }
};

struct OpenReadRelease : OverNames {
  using OverNames::OverNames;
  void begin(Slot &s) override {
    s.step = 0;
    s.nodeid = names.nodeids[any()];
    session.buildOpen(s, s.nodeid, false, O_RDONLY);
  }
  bool reply(Slot &s) override {
    switch (s.step++) {
      case 0:
        s.fh = s.reply<fuse_open_out>().fh;
        session.buildRead(s, s.nodeid, s.fh, 0, PAGE);
        return true;
      case 1:
        if (!checkPage(s.data, 0)) session.fail(s, "wrong data");
        session.buildRelease(s, s.nodeid, s.fh, false);
        return true;
      default:
        return false;
    }
  }
};

struct CreateCycle : Operation {
  uint64_t directory;
  string path;
  uint64_t made = 0;
  char name[MAX_DEPTH][24];
  CreateCycle(Session &s, const Arguments &a) : Operation(s), directory(s.resolve(a.text("dir"))), path(s.share + "/" + a.text("dir")) {}
  void begin(Slot &s) override {
    s.step = 0;
    snprintf(name[s.number], sizeof name[0], "c%llu", static_cast<unsigned long long>(made++));
    auto &in = s.argument<fuse_create_in>();
    in.flags = O_RDWR | O_CREAT | O_EXCL;
    in.mode = S_IFREG | 0644;
    in.umask = 022;
    session.buildName(s, FUSE_CREATE, directory, name[s.number], sizeof in, sizeof(fuse_entry_out) + sizeof(fuse_open_out));
  }
  bool reply(Slot &s) override {
    switch (s.step++) {
      case 0: {
        const auto &entry = s.reply<fuse_entry_out>();
        if (entry.attr.uid != session.user) session.fail(s, "created for another user");
        s.nodeid = entry.nodeid;
        s.fh = reinterpret_cast<const fuse_open_out *>(&entry + 1)->fh;
        session.buildWrite(s, s.nodeid, s.fh, 0, PAGE);
        return true;
      }
      case 1:
        if (s.reply<fuse_write_out>().size != PAGE) session.fail(s, "a short write");
        session.buildRelease(s, s.nodeid, s.fh, false);
        return true;
      case 2:
        session.buildName(s, FUSE_UNLINK, directory, name[s.number], 0, 0);
        return true;
      case 3:
        session.buildForget(s, s.nodeid, 1);
        return true;
      default:
        return false;
    }
  }
  void end() override {
    if (DIR *open = opendir(path.c_str())) {
      while (const dirent *entry = readdir(open))
        if (entry->d_name[0] == 'c') session.fail(session.slots[0], "a file that should be gone");
      closedir(open);
    }
  }
};

// Each slot takes names of its own, so that each look-up is of an inode the daemon does not know.
struct LookupForget : Operation {
  uint64_t directory, count;
  LookupForget(Session &s, const Arguments &a) : Operation(s), directory(s.resolve(a.text("dir"))), count(a.number("names", 1000)) {}
  void begin(Slot &s) override {
    char name[16];
    s.step = 0;
    nameOf(name, random.below(count / depth) * depth + s.number);
    session.buildLookup(s, directory, name);
  }
  bool reply(Slot &s) override {
    if (s.step++ > 0) return false;
    session.buildForget(s, s.reply<fuse_entry_out>().nodeid, 1);
    return true;
  }
};

struct FileOperation : Operation {
  uint64_t nodeid, fh, fileSize;
  uint32_t size;
  string path;
  FileOperation(Session &s, const Arguments &a, uint32_t flags)
      : Operation(s), nodeid(s.resolve(a.text("file"))), fh(s.open(nodeid, flags)), size(uint32_t(a.number("size", PAGE))), path(s.share + "/" + a.text("file")) {
    struct stat status;
    must(stat(path.c_str(), &status), path.c_str());
    fileSize = uint64_t(status.st_size);
    random.state += a.number("seed", 0) * 0x9e3779b97f4a7c15;
  }
  void end() override { session.release(nodeid, fh); }
  uint64_t anyOffset() { return random.below(fileSize / size) * size; }
  void checkRead(Slot &s) {
    for (size_t i = 0; i < size / PAGE; i++)
      if (!checkPage(Session::page(s, i, size / PAGE), s.offset + i * PAGE)) return session.fail(s, "wrong data");
  }
};

struct Read : FileOperation {
  Read(Session &s, const Arguments &a) : FileOperation(s, a, O_RDONLY) {}
  void begin(Slot &s) override { session.buildRead(s, nodeid, fh, s.offset = anyOffset(), size); }
  bool reply(Slot &s) override {
    checkRead(s);
    return false;
  }
};

struct Write : FileOperation {
  uint64_t last = 0;
  Write(Session &s, const Arguments &a) : FileOperation(s, a, O_RDWR) {}
  void begin(Slot &s) override { session.buildWrite(s, nodeid, fh, s.offset = anyOffset(), size); }
  bool reply(Slot &s) override {
    if (s.reply<fuse_write_out>().size != size) session.fail(s, "a short write");
    last = s.offset;
    return false;
  }
  void end() override {
    FileOperation::end();
    int fd = must(open(path.c_str(), O_RDONLY | O_CLOEXEC), path.c_str());
    uint8_t page[PAGE];
    for (uint64_t at = last; at < last + size; at += PAGE)
      if (pread(fd, page, PAGE, off_t(at)) != ssize_t(PAGE) || !checkPage(page, at)) session.fail(session.slots[0], "the file has not what was written");
    close(fd);
  }
};

// WRITE of 4 KiB to a file of the slot's own, then FSYNC of it.
struct WriteFsync : Operation {
  uint64_t nodeids[MAX_DEPTH], fhs[MAX_DEPTH];
  WriteFsync(Session &s, const Arguments &a, unsigned slots) : Operation(s) {
    depth = slots;
    for (unsigned i = 0; i < depth; i++) {
      nodeids[i] = s.resolve(a.text("dir") + "/fsync-" + std::to_string(i));
      fhs[i] = s.open(nodeids[i], O_RDWR);
    }
  }
  void begin(Slot &s) override {
    s.step = 0;
    session.buildWrite(s, nodeids[s.number], fhs[s.number], 0, PAGE);
  }
  bool reply(Slot &s) override {
    if (s.step++ > 0) return false;
    s.argument<fuse_fsync_in>().fh = fhs[s.number];
    session.build(s, FUSE_FSYNC, nodeids[s.number], sizeof(fuse_fsync_in), 0);
    return true;
  }
  void end() override {
    for (unsigned i = 0; i < depth; i++) session.release(nodeids[i], fhs[i]);
  }
};

// OPENDIR, READDIR or READDIRPLUS to the end, RELEASEDIR; with forget=1 everything that was looked up is forgotten again.
struct List : Operation {
  // What a C library's 32 KiB getdents64 makes a recent guest kernel ask for.
  static constexpr uint32_t BUFFER = 32 << 10;
  uint64_t directory, expected;
  bool plus, forget;
  std::vector<uint64_t> found[MAX_DEPTH];
  List(Session &s, const Arguments &a, bool plus)
      : Operation(s), directory(s.resolve(a.text("dir"))), expected(a.number("names", 1000) + 2), plus(plus), forget(a.number("forget", 0)) {}
  void begin(Slot &s) override {
    s.step = 0;
    s.count = s.offset = 0;
    found[s.number].clear();
    session.buildOpen(s, directory, true, O_RDONLY | O_DIRECTORY);
  }
  bool next(Slot &s) {
    auto &in = s.argument<fuse_read_in>();
    in.fh = s.fh, in.offset = s.offset, in.size = BUFFER;
    session.build(s, plus ? FUSE_READDIRPLUS : FUSE_READDIR, directory, sizeof in, 0, 0, BUFFER, false);
    s.exact = false;
    return true;
  }
  bool reply(Slot &s) override {
    switch (s.step) {
      case 0:
        s.step = 1;
        s.fh = s.reply<fuse_open_out>().fh;
        return next(s);
      case 1:
        if (take(s)) return next(s);
        if (s.count != expected) session.fail(s, "too many or too few entries");
        entries += s.count;
        s.step = 2;
        session.buildRelease(s, directory, s.fh, true);
        return true;
      default:
        return forgetSome(s);
    }
  }
  // False at the end of the directory.
  bool take(Slot &s) {
    uint32_t length = s.header().len - uint32_t(sizeof(fuse_out_header));
    for (uint32_t at = 0; at < length;) {
      const uint8_t *here = s.data + at;
      const auto *entry = reinterpret_cast<const fuse_dirent *>(plus ? here + sizeof(fuse_entry_out) : here);
      if (plus && forget) {
        uint64_t nodeid = reinterpret_cast<const fuse_entry_out *>(here)->nodeid;
        if (nodeid != 0 && entry->name[0] != '.') found[s.number].push_back(nodeid);
      }
      s.offset = entry->off;
      s.count++;
      at += uint32_t(FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + entry->namelen) + (plus ? sizeof(fuse_entry_out) : 0));
    }
    return length > 0;
  }
  // At most what a guest's page holds at a time.
  bool forgetSome(Slot &s) {
    auto &list = found[s.number];
    if (list.empty()) return false;
    uint32_t count = uint32_t(std::min<size_t>(list.size(), (PAGE - sizeof(fuse_batch_forget_in)) / sizeof(fuse_forget_one)));
    auto *in = reinterpret_cast<fuse_batch_forget_in *>(s.data);
    auto *one = reinterpret_cast<fuse_forget_one *>(in + 1);
    in->count = count, in->dummy = 0;
    for (uint32_t i = 0; i < count; i++, list.pop_back()) one[i] = {list.back(), 1};
    session.build(s, FUSE_BATCH_FORGET, 0, 0, 0, sizeof *in + count * sizeof *one, 0, false);
    return true;
  }
};

// Reads of pages that are on disk only, and one GETATTR at a time beside them: what is measured is the GETATTR.
struct ColdMix : Read {
  Getattr hot;
  std::unique_ptr<Histogram> cold = std::make_unique<Histogram>();
  ColdMix(Session &s, const Arguments &a) : Read(s, a), hot(s, a) {}
  bool measured(const Slot &s) const override { return s.number == depth - 1; }
  void begin(Slot &s) override { measured(s) ? hot.begin(s) : Read::begin(s); }
  bool reply(Slot &s) override {
    if (measured(s)) return hot.reply(s);
    entries++;
    return Read::reply(s);
  }
};

// Watches every learnt name once.
struct Watch : OverNames {
  uint64_t next = 0;
  using OverNames::OverNames;
  uint64_t total() const override { return names.nodeids.size(); }
  void begin(Slot &s) override {
    s.index = next++;
    s.argument<FsnotifyIn>() = {FS_MODIFY, names.generations[s.index], 0};
    session.build(s, FUSE_FSNOTIFY, names.nodeids[s.index], sizeof(FsnotifyIn), sizeof(FsnotifyOut));
  }
  bool reply(Slot &) override { return false; }
};

// The shape of a GETATTR for a back end that does nothing.
struct Nothing : Operation {
  using Operation::Operation;
  void begin(Slot &s) override {
    s.argument<fuse_getattr_in>();
    session.build(s, FUSE_GETATTR, 1, sizeof(fuse_getattr_in), sizeof(fuse_attr_out));
    s.expectError = ENOSYS;
  }
  bool reply(Slot &) override { return false; }
};

std::unique_ptr<Operation> makeOperation(Session &s, const string &name, const Arguments &a, unsigned depth) {
  std::unique_ptr<Operation> result;
  if (name == "learn") result = std::make_unique<Learn>(s, a);
  else if (name == "getattr") result = std::make_unique<Getattr>(s, a);
  else if (name == "lookup") result = std::make_unique<Lookup>(s, a);
  else if (name == "missing") result = std::make_unique<Missing>(s, a);
  else if (name == "statfs") result = std::make_unique<Statfs>(s);
  else if (name == "getxattr") result = std::make_unique<Getxattr>(s, a);
  else if (name == "open-read-release") result = std::make_unique<OpenReadRelease>(s, a);
  else if (name == "create-cycle") result = std::make_unique<CreateCycle>(s, a);
  else if (name == "lookup-forget") result = std::make_unique<LookupForget>(s, a);
  else if (name == "read") result = std::make_unique<Read>(s, a);
  else if (name == "write") result = std::make_unique<Write>(s, a);
  else if (name == "write-fsync") result = std::make_unique<WriteFsync>(s, a, depth);
  else if (name == "readdir") result = std::make_unique<List>(s, a, false);
  else if (name == "readdirplus") result = std::make_unique<List>(s, a, true);
  else if (name == "cold-mix") result = std::make_unique<ColdMix>(s, a);
  else if (name == "watch") result = std::make_unique<Watch>(s, a);
  else if (name == "nothing") result = std::make_unique<Nothing>(s);
  else die("there is no operation %s", name.c_str());
  result->depth = depth;
  return result;
}

// --- a run ---

struct Counters {
  uint64_t time, daemonCpu, clientCpu, kicks, interrupts, requests;
};

Counters countersOf(const Session &s) {
  uint64_t kicks = 0;
  for (const auto &queue : s.queues) kicks += queue->kicks;
  return {now(), s.daemonCpu(), nanoseconds(CLOCK_THREAD_CPUTIME_ID), kicks, s.interrupts, s.requests};
}

void run(Session &session, const string &name, const Arguments &a) {
  unsigned depth = unsigned(a.number("depth", 1));
  if (depth < 1 || depth > MAX_DEPTH) die("a depth of 1 to %u", MAX_DEPTH);
  bool wait = a.number("wait", 1);
  session.user = uint32_t(a.number("user", 0));
  session.errors = 0;
  session.firstError.clear();
  auto operation = makeOperation(session, name, a, depth);
  uint64_t count = a.number("count", operation->total());

  Histogram times;
  uint64_t started = 0, ended = 0, inFlight = 0;
  Counters from = countersOf(session);
  uint64_t warmEnd = from.time + a.number("warm", 0) * 1000000;
  uint64_t end = warmEnd + a.number("ms", 200) * 1000000;
  bool warm = warmEnd == from.time;
  std::vector<Slot *> ready;

  uint64_t time = from.time;
  auto more = [&] { return count ? started < count : time < end; };
  auto begin = [&](Slot &slot) {
    started++;
    inFlight++;
    operation->begin(slot);
    slot.began = time;
    session.submit(slot);
  };
  for (auto &queue : session.queues) wait ? queue->enableCalls() : queue->disableCalls();
  for (unsigned i = 0; i < depth && more(); i++) begin(session.slots[i]);

  while (inFlight > 0) {
    bool any = false;
    for (auto &queue : session.queues) {
      if (!queue->ready()) continue;
      any = true;
      queue->disableCalls();
      uint32_t length;
      while (Slot *slot = session.collect(*queue, length)) {
        // An operation that is over, well or not, has nothing more to send.
        if (!session.check(*slot, length) || !operation->reply(*slot)) slot->descriptors = 0;
        ready.push_back(slot);
      }
      // As virtio_fs_requests_done_work does: before the requests end and new ones come.
      if (wait) queue->enableCalls();
    }
    if (!any) {
      if (wait) session.waitForCall();
      continue;
    }
    time = now();
    if (!warm && time >= warmEnd) {
      warm = true;
      times.clear();
      ended = 0;
      operation->entries = 0;
      from = countersOf(session);
    }
    for (Slot *slot : ready) {
      if (slot->descriptors != 0) {
        session.submit(*slot);
        continue;
      }
      if (operation->measured(*slot)) {
        times.add(time - slot->began);
        ended++;
      }
      inFlight--;
      if (more()) begin(*slot);
    }
    ready.clear();
  }
  Counters to = countersOf(session);
  operation->end();
  auto number = [](uint64_t n) { return static_cast<unsigned long long>(n); };
  printf("{\"operations\":%llu,\"requests\":%llu,\"ns\":%llu,\"p50\":%llu,\"p99\":%llu,\"p999\":%llu,\"max\":%llu,"
         "\"daemonCpu\":%llu,\"clientCpu\":%llu,\"kicks\":%llu,\"interrupts\":%llu,\"entries\":%llu,\"errors\":%llu,\"firstError\":\"%s\"}\n",
         number(ended), number(to.requests - from.requests), number(to.time - from.time), number(times.percentile(.5)),
         number(times.percentile(.99)), number(times.percentile(.999)), number(times.percentile(1)), number(to.daemonCpu - from.daemonCpu),
         number(to.clientCpu - from.clientCpu), number(to.kicks - from.kicks), number(to.interrupts - from.interrupts),
         number(operation->entries), number(session.errors), session.firstError.c_str());
}

// --- events ---

// Keeps a few buffers with the daemon, as a guest without a notification queue does, and counts what comes in them.
struct Events {
  static constexpr unsigned LENT = 4;
  Session &session;
  uint64_t records = 0, overflows = 0, messages = 0;
  uint64_t wanted = 0;  // the nodeid whose MODIFY is waited for
  bool found = false;

  explicit Events(Session &s) : session(s) {}

  static bool isLent(const Slot &s) { return s.number < LENT; }
  void lend(Slot &s) {
    s.argument<ReadNotifyIn>().size = NOTIFY_BYTES;
    session.build(s, FUSE_READ_NOTIFY, FUSE_ROOT_ID, sizeof(ReadNotifyIn), 0, 0, NOTIFY_BYTES, false);
    s.exact = false;
    session.submit(s);
  }
  void lendAll() {
    for (unsigned i = 0; i < LENT; i++) lend(session.slots[i]);
  }

  void take(Slot &s, uint32_t used) {
    if (!session.check(s, used)) die("READ_NOTIFY: %s", session.firstError.c_str());
    const auto &header = *reinterpret_cast<const fuse_out_header *>(s.data);
    messages++;
    if (header.len != used - sizeof(fuse_out_header)) session.fail(s, "a notification of another length");
    // Invalidations come on the same way.
    if (header.error != NOTIFY_FSNOTIFY) return;
    for (uint32_t at = sizeof header; at + sizeof(FsnotifyRecord) <= header.len;) {
      const auto &record = *reinterpret_cast<const FsnotifyRecord *>(s.data + at);
      if (record.reclen < sizeof record || at + record.reclen > header.len) return session.fail(s, "a record of impossible length");
      at += record.reclen;
      if (record.flags & RECORD_OVERFLOW) overflows++;
      else records++;
      if ((record.mask & FS_MODIFY) && (record.nodeid == wanted || record.child == wanted)) found = true;
    }
  }

  // Takes back every buffer and lends it again; true if there was one. Other slots go to `other`.
  template <class Other>
  bool turn(Other other) {
    bool any = false;
    for (auto &queue : session.queues) {
      if (!queue->ready()) continue;
      any = true;
      queue->disableCalls();
      uint32_t length;
      while (Slot *slot = session.collect(*queue, length)) {
        if (isLent(*slot)) take(*slot, length), lend(*slot);
        else other(*slot, length);
      }
      queue->enableCalls();
    }
    return any;
  }
  bool turn() {
    return turn([](Slot &, uint32_t) {});
  }

  void watch(uint64_t nodeid, uint64_t mask) {
    // A slot that is not lent: preparations use slot 0, which is free only before lendAll.
    Slot &s = session.slots[0];
    s.argument<FsnotifyIn>() = {mask, session.generations[nodeid], 0};
    session.build(s, FUSE_FSNOTIFY, nodeid, sizeof(FsnotifyIn), sizeof(FsnotifyOut));
    session.call1("FSNOTIFY");
  }
};

void pause(unsigned microseconds) {
  timespec t = {0, long(microseconds) * 1000};
  nanosleep(&t, nullptr);
}

int openOnHost(const Session &session, const string &path, int flags) {
  string host = session.share + "/" + path;
  return must(open(host.c_str(), flags | O_CLOEXEC, 0644), host.c_str());
}

void printJson(std::initializer_list<std::pair<const char *, double>> values) {
  const char *separator = "{";
  for (const auto &[name, value] : values) {
    printf("%s\"%s\":%.17g", separator, name, value);
    separator = ",";
  }
  printf("}\n");
}

// CPU time of one system call on the host, as a daemon makes it for a request that it can serve by one.
void bare(const Session &session, const string &what, const Arguments &a) {
  // As many buffers as requests at depth 16 have: what a copy takes depends on the caches.
  constexpr unsigned FILES = 1000, BUFFERS = 16;
  Random random;
  string dir = a.text("dir", ".");
  int folder = openOnHost(session, dir, O_RDONLY | O_DIRECTORY);
  std::vector<int> files;
  std::vector<char> data;
  char name[16];
  int file = -1;
  uint64_t buffer = 0, blocks = 0, size = a.number("size", 0);
  if (what == "getattr")
    for (unsigned i = 0; i < FILES; i++) {
      nameOf(name, i);
      files.push_back(must(openat(folder, name, O_PATH | O_CLOEXEC), name));
    }
  if (what == "getxattr") file = openOnHost(session, dir + "/f0000000", O_RDONLY);
  if (what == "getxattr") must(fsetxattr(file, "user.bench", "value", 5, 0), "setxattr");
  if (what == "read" || what == "write") {
    file = openOnHost(session, a.text("file"), what == "read" ? O_RDONLY : O_WRONLY);
    struct stat st;
    must(fstat(file, &st), "fstat");
    blocks = uint64_t(st.st_size) / size;
    data.resize(BUFFERS * size);
  }
  auto call = [&]() -> int64_t {
    struct stat st;
    struct statx sx;
    struct statfs sf;
    char value[64];
    iovec part = {data.data() + buffer++ % BUFFERS * size, size};
    if (what == "getattr") return fstat(files[random.below(FILES)], &st);
    if (what == "statfs") return fstatfs(folder, &sf);
    if (what == "getxattr") return fgetxattr(file, "user.bench", value, sizeof value) - 5;
    if (what == "read") return preadv2(file, &part, 1, off_t(random.below(blocks) * size), RWF_NOWAIT) - int64_t(size);
    if (what == "write") return pwritev2(file, &part, 1, off_t(random.below(blocks) * size), 0) - int64_t(size);
    nameOf(name, random.below(FILES));
    if (what == "lookup") return statx(folder, name, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS, &sx);
    if (what != "missing") die("there is no system call for %s", what.c_str());
    name[0] = 'm';
    return statx(folder, name, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS, &sx) == -1 && errno == ENOENT ? 0 : -1;
  };
  uint64_t calls = 0, until = now() + a.number("ms", 100) * 1000000, from = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
  do
    for (int i = 0; i < 64; i++, calls++)
      if (call() != 0) die("%s on the host: %s", what.c_str(), strerror(errno));
  while (now() < until);
  double ns = double(nanoseconds(CLOCK_THREAD_CPUTIME_ID) - from) / double(calls);
  for (int fd : files) close(fd);
  if (file >= 0) close(file);
  close(folder);
  printJson({{"ns", ns}});
}

// From before the host's write to the moment in which a record of it lies in guest memory. `depth` GETATTRs are always under way.
void eventLatency(Session &session, const Arguments &a) {
  Events events(session);
  unsigned depth = unsigned(a.number("depth", 0));
  uint64_t count = a.number("count", 100);
  string dir = a.text("dir"), file = dir + "/f0000000";
  events.wanted = session.resolve(file);
  events.watch(session.resolve(dir), FS_MODIFY | FS_EVENT_ON_CHILD);
  int fd = openOnHost(session, file, O_WRONLY);
  events.lendAll();
  for (auto &queue : session.queues) queue->enableCalls();
  auto getattr = [&](Slot &s) {
    s.argument<fuse_getattr_in>();
    session.build(s, FUSE_GETATTR, events.wanted, sizeof(fuse_getattr_in), sizeof(fuse_attr_out));
    session.submit(s);
  };
  for (unsigned i = 0; i < depth; i++) getattr(session.slots[Events::LENT + i]);
  Histogram times;
  uint64_t requests = 0;
  bool stopping = false;
  unsigned out = depth;
  auto other = [&](Slot &s, uint32_t used) {
    session.check(s, used);
    requests++;
    if (stopping) out--;
    else getattr(s);
  };
  for (uint64_t i = 0; i < count; i++) {
    // Long enough for an idle daemon to fall asleep. Under load the requests go on meanwhile.
    uint64_t until = now() + 300000;
    if (depth == 0) pause(300);
    while (depth > 0 && now() < until) events.turn(other);
    events.found = false;
    uint64_t from = now();
    if (pwrite(fd, &from, sizeof from, 0) != sizeof from) die("write: %s", strerror(errno));
    while (!events.found) {
      if (!events.turn(other)) {
        if (depth == 0) session.waitForCall();
        if (now() - from > 2000000000) die("no event of a host's write within 2 s");
      }
    }
    times.add(now() - from);
  }
  stopping = true;
  while (out > 0) events.turn(other);
  close(fd);
  printJson({{"p50", times.percentile(.5)}, {"p99", times.percentile(.99)}, {"p999", times.percentile(.999)}, {"errors", session.errors}});
}

// A thread of the host makes and removes files: two events each. Counts what reaches the guest until all is quiet.
void eventRate(Session &session, const Arguments &a) {
  Events events(session);
  string dir = a.text("dir");
  events.watch(session.resolve(dir), FS_CREATE | FS_DELETE);
  events.lendAll();
  for (auto &queue : session.queues) queue->enableCalls();
  int folder = openOnHost(session, dir, O_RDONLY | O_DIRECTORY);
  std::atomic<uint64_t> done = 0;
  std::atomic<bool> running = true;
  uint64_t from = now(), end = from + a.number("ms", 200) * 1000000;
  uint64_t cpu = session.daemonCpu();
  std::thread writer([&] {
    // Not on the client's own processor.
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int i = 0; i < CPU_SETSIZE; i++) CPU_SET(i, &set);
    sched_setaffinity(0, sizeof set, &set);
    while (now() < end) {
      char name[32];
      snprintf(name, sizeof name, "event-%llu", static_cast<unsigned long long>(done.load() / 2));
      // A node, not an open file: only CREATE and DELETE come of it.
      must(mknodat(folder, name, S_IFREG | 0644, 0), "mknodat");
      must(unlinkat(folder, name, 0), "unlinkat");
      done += 2;
    }
    running = false;
  });
  uint64_t last = now();
  // Until nothing has come for a while after the end.
  while (running || now() - last < 300000000) {
    if (events.turn()) last = now();
    else pause(20);
    if (events.records >= done && !running) break;
  }
  writer.join();
  close(folder);
  double seconds = double(last - from) / 1e9;
  printJson({{"made", double(done)},
             {"received", double(events.records)},
             {"overflows", double(events.overflows)},
             {"messages", double(events.messages)},
             {"perSecond", double(events.records) / seconds},
             {"madePerSecond", double(done) / (double(end - from) / 1e9)},
             {"daemonCpu", double(session.daemonCpu() - cpu)},
             {"errors", double(session.errors)}});
}

// The daemon's own speed, which the rate above does not show: there the maker of the events is slower than the daemon.
void eventDrain(Session &session, const Arguments &a) {
  Events events(session);
  string dir = a.text("dir");
  uint64_t count = a.number("count", 10000);
  events.watch(session.resolve(dir), FS_CREATE | FS_DELETE);
  events.lendAll();
  for (auto &queue : session.queues) queue->enableCalls();
  int folder = openOnHost(session, dir, O_RDONLY | O_DIRECTORY);
  constexpr int BURSTS = 5;
  uint64_t cpu = 0, took = 0, received = 0;
  // The first one warms up and does not count.
  for (int burst = 0; burst < BURSTS && events.overflows == 0; burst++) {
    for (pid_t pid : session.pids) must(kill(pid, SIGSTOP), "SIGSTOP");
    for (uint64_t i = 0; i < count / 2; i++) {
      char name[32];
      snprintf(name, sizeof name, "event-%llu", static_cast<unsigned long long>(i));
      must(mknodat(folder, name, S_IFREG | 0644, 0), "mknodat");
      must(unlinkat(folder, name, 0), "unlinkat");
    }
    uint64_t before = events.records, cpuBefore = session.daemonCpu(), from = now(), last = from;
    for (pid_t pid : session.pids) must(kill(pid, SIGCONT), "SIGCONT");
    while (events.records - before < count / 2 * 2 && events.overflows == 0 && now() - last < 1000000000) {
      if (events.turn()) last = now();
      else session.waitForCall();
    }
    if (burst == 0) continue;
    cpu += session.daemonCpu() - cpuBefore;
    took += last - from;
    received += events.records - before;
  }
  close(folder);
  printJson({{"received", double(received)},
             {"overflows", double(events.overflows)},
             {"perSecond", double(received) / (double(took) / 1e9)},
             {"daemonCpu", double(cpu) / double(received)},
             {"errors", double(session.errors)}});
}

// What a program of the host pays for a small write.
void hostWrites(Session &session, const Arguments &a) {
  int fd = openOnHost(session, a.text("file"), O_WRONLY);
  uint64_t count = a.number("count", 20000), value = 0;
  uint64_t from = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
  for (uint64_t i = 0; i < count; i++)
    if (pwrite(fd, &value, sizeof value, 0) != sizeof value) die("write: %s", strerror(errno));
  uint64_t took = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - from;
  close(fd);
  printJson({{"ns", double(took) / double(count)}});
}

void drop(const string &path) {
  int fd = must(open(path.c_str(), O_RDONLY | O_CLOEXEC), path.c_str());
  posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  close(fd);
  printf("{}\n");
}

void warm(const string &path) {
  int fd = must(open(path.c_str(), O_RDONLY | O_CLOEXEC), path.c_str());
  std::vector<char> buffer(1 << 20);
  while (read(fd, buffer.data(), buffer.size()) > 0) {
  }
  close(fd);
  printf("{}\n");
}

void onAlarm(int) {
  static const char text[] = "bench client: no answer from the daemon\n";
  (void)!write(2, text, sizeof text - 1);
  _exit(3);
}

int frontEnd(const char *path, const Arguments &arguments) {
  if (!arguments.text("cpu").empty()) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(int(arguments.number("cpu", 0)), &set);
    sched_setaffinity(0, sizeof set, &set);
  }
  signal(SIGALRM, onAlarm);
  alarm(20);
  Session session(path, arguments);
  if (!arguments.number("null", 0)) session.init();
  printf("{\"queues\":%u}\n", session.offeredQueues);
  fflush(stdout);
  char *line = nullptr;
  size_t room = 0;
  for (ssize_t length; alarm(0), (length = getline(&line, &room, stdin)) > 0;) {
    if (line[length - 1] == '\n') line[length - 1] = 0;
    std::vector<string> words = split(line, ' ');
    if (words.size() < 2) die("what is \"%s\"?", line);
    // No single command takes longer, unless the daemon hangs.
    alarm(120);
    if (words[0] == "run") run(session, words[1], Arguments(words));
    else if (words[0] == "events" && words[1] == "latency") eventLatency(session, Arguments(words));
    else if (words[0] == "events" && words[1] == "rate") eventRate(session, Arguments(words));
    else if (words[0] == "events" && words[1] == "drain") eventDrain(session, Arguments(words));
    else if (words[0] == "events" && words[1] == "host") hostWrites(session, Arguments(words));
    else if (words[0] == "bare") bare(session, words[1], Arguments(words));
    else if (words[0] == "drop") drop(session.share + "/" + words[1]);
    else if (words[0] == "warm") warm(session.share + "/" + words[1]);
    else die("what is \"%s\"?", line);
    fflush(stdout);
  }
  free(line);
  return 0;
}

// --- a back end that does nothing ---

struct NullBackEnd {
  struct NullQueue {
    Ring ring;
    uint16_t seen = 0, used = 0;
    int kick = -1, call = -1;
  };
  static constexpr unsigned QUEUES = 17;
  int socket = -1, epoll = -1;
  uint64_t features = 0;
  uint8_t *memory = nullptr;
  uint64_t user = 0;
  NullQueue queues[QUEUES];

  template <class T>
  T *translate(uint64_t address) {
    return reinterpret_cast<T *>(memory + (address - user));
  }

  void control(Message &m) {
    bool needReply = m.flags & NEED_REPLY;
    uint64_t reply = 0;
    NullQueue &queue = queues[m.payload.state.index % QUEUES];
    switch (m.request) {
      case GET_FEATURES: reply = VERSION_1 | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES, needReply = true; break;
      case GET_PROTOCOL_FEATURES: reply = PROTOCOL_MQ | PROTOCOL_REPLY_ACK, needReply = true; break;
      case GET_QUEUE_NUM: reply = QUEUES, needReply = true; break;
      case SET_FEATURES: features = m.payload.u64; break;
      case SET_MEM_TABLE: {
        const auto &region = m.payload.table.region[0];
        memory = static_cast<uint8_t *>(mmap(nullptr, region.size, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd, off_t(region.offset)));
        if (memory == MAP_FAILED) die("mmap: %s", strerror(errno));
        user = region.user;
        break;
      }
      case SET_VRING_NUM: queue.ring.size = m.payload.state.value; break;
      case SET_VRING_ADDR:
        queue.ring.desc = translate<vring_desc>(m.payload.address.descriptors);
        queue.ring.avail = translate<vring_avail>(m.payload.address.avail);
        queue.ring.used = translate<vring_used>(m.payload.address.used);
        break;
      case SET_VRING_CALL: queue.call = m.fd; break;
      case SET_VRING_KICK: {
        queue.kick = m.fd;
        epoll_event event = {EPOLLIN, {.u32 = uint32_t(m.payload.u64 & 0xff)}};
        must(epoll_ctl(epoll, EPOLL_CTL_ADD, queue.kick, &event), "epoll_ctl");
        break;
      }
      default: break;
    }
    if (!needReply) return;
    m.flags = VERSION | REPLY;
    m.size = 8;
    m.fd = -1;
    m.payload.u64 = reply;
    send(socket, m);
  }

  void serve(NullQueue &queue) {
    uint64_t count;
    (void)!read(queue.kick, &count, sizeof count);
    Ring &ring = queue.ring;
    const bool event = features & EVENT_IDX;
    for (;;) {
      uint16_t before = queue.used;
      if (!event) ring.used->flags = VRING_USED_F_NO_NOTIFY;
      while (__atomic_load_n(&ring.avail->idx, __ATOMIC_ACQUIRE) != queue.seen) {
        uint16_t head = ring.avail->ring[queue.seen++ % ring.size];
        const auto *table = reinterpret_cast<vring_desc *>(memory + ring.desc[head].addr);
        const auto &in = *reinterpret_cast<fuse_in_header *>(memory + table[0].addr);
        uint32_t i = 0;
        while (!(table[i].flags & VRING_DESC_F_WRITE) && (table[i].flags & VRING_DESC_F_NEXT)) i = table[i].next;
        if (table[i].flags & VRING_DESC_F_WRITE)
          *reinterpret_cast<fuse_out_header *>(memory + table[i].addr) = {sizeof(fuse_out_header), -ENOSYS, in.unique};
        ring.used->ring[queue.used++ % ring.size] = {head, sizeof(fuse_out_header)};
      }
      __atomic_store_n(&ring.used->idx, queue.used, __ATOMIC_RELEASE);
      __atomic_thread_fence(__ATOMIC_SEQ_CST);
      bool wanted = event ? needEvent(ring.usedEvent(), queue.used, before) : !(ring.avail->flags & VRING_AVAIL_F_NO_INTERRUPT);
      uint64_t one = 1;
      if (wanted && queue.used != before) (void)!write(queue.call, &one, sizeof one);
      if (event) ring.availEvent() = queue.seen;
      else ring.used->flags = 0;
      __atomic_thread_fence(__ATOMIC_SEQ_CST);
      if (__atomic_load_n(&ring.avail->idx, __ATOMIC_ACQUIRE) == queue.seen) return;
    }
  }

  int run(const char *path) {
    int listener = must(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    must(bind(listener, reinterpret_cast<sockaddr *>(&address), sizeof address), path);
    must(listen(listener, 1), "listen");
    socket = must(accept(listener, nullptr, nullptr), "accept");
    epoll = must(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
    epoll_event event = {EPOLLIN, {.u32 = QUEUES}};
    must(epoll_ctl(epoll, EPOLL_CTL_ADD, socket, &event), "epoll_ctl");
    for (;;) {
      epoll_event events[8];
      int n = epoll_wait(epoll, events, 8, -1);
      for (int i = 0; i < n; i++) {
        if (events[i].data.u32 < QUEUES) {
          serve(queues[events[i].data.u32]);
        } else {
          Message m;
          if (!receive(socket, m)) return 0;
          control(m);
        }
      }
    }
  }
};

}  // namespace

int main(int argc, char **argv) {
  if (argc < 2) die("usage: client SOCKET [name=value...] | client null SOCKET");
  if (!strcmp(argv[1], "null") && argc == 3) return NullBackEnd().run(argv[2]);
  return frontEnd(argv[1], Arguments(std::vector<string>(argv + 2, argv + argc)));
}
