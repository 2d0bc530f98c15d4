/**
 * The one file that imports the add-on, and the types of everything in it.
 *
 * Conventions of every native function:
 *  - arguments and results are plain numbers (a N-API call with small integers costs 15 to 40 ns);
 *  - a failed system call returns `-errno`; nothing throws for what the system or a peer did;
 *  - memory is named by an offset into the {@link arena}, a block that native code and JavaScript share,
 *    so that neither names nor structures are ever converted. `name` arguments are arena offsets of
 *    NUL-terminated bytes; `iov` arguments are arena offsets of an array of `struct iovec` (16 bytes each);
 *  - addresses are virtual addresses of this process as numbers (user space ends below 2^47, so they are exact).
 *
 * The add-on checks nothing that the caller must check: addresses handed to it come from `memory.ts`,
 * which is the only place that turns a peer's addresses into ours.
 */
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

/** The functions of the add-on. Each comment names the system call; `man 2` has the errors. */
export interface Native {
  // --- arena and mapping (region.cc) ---
  /** Maps this thread's arena of `bytes` bytes (zeroed, only touched pages take memory) and returns it. Call once. */
  arena(bytes: number): ArrayBuffer;
  /** Virtual address of the arena's first byte. */
  arenaAddress(): number;
  /**
   * mmap(2) of `fd` from `offset`, shared; `writable` 0 maps read-only. Returns a region id ≥ 0, or -errno.
   * The file must be at least `offset + length` bytes long (checked here: a shorter one would mean SIGBUS), else -EINVAL.
   * Should it be truncated later, the SIGBUS handler puts zero pages in its place and marks the region broken.
   */
  regionMap(fd: number, offset: number, length: number, writable: number): number;
  /** Virtual address of a region, or -EBADF. */
  regionAddress(region: number): number;
  /** 1 when a page of the region was lost to a truncation since the mapping was made, else 0. */
  regionBroken(region: number): number;
  /** How many regions of the process were broken since it started: a cheap check after each batch. */
  brokenCount(): number;
  /** An external ArrayBuffer over a part of a region (≤ 4 GiB). It is detached when the region is unmapped. */
  regionBuffer(region: number, offset: number, length: number): ArrayBuffer;
  /** Detaches one buffer made by regionBuffer before its region is unmapped. */
  regionDetach(buffer: ArrayBuffer): number;
  /** munmap(2) after detaching every buffer over the region (those of this thread). */
  regionUnmap(region: number): number;
  /** memfd_create(2), then ftruncate(2) to `bytes`. Close-on-exec. */
  memfdCreate(name: number, bytes: number): number;
  /** Copies `length` bytes between virtual addresses. */
  copy(destination: number, source: number, length: number): void;
  /** Gathers at most `max` bytes from `count` iovecs to arena offset `destination`; returns the bytes copied. */
  gather(iov: number, count: number, destination: number, max: number): number;
  /** Scatters `length` bytes of the arena over `count` iovecs, after skipping their first `skip` bytes; returns the bytes copied. */
  scatter(iov: number, count: number, skip: number, source: number, length: number): number;

  /**
   * From now on each {@link scatter} (and {@link stamp}) writes a time stamp as an f64 to this arena offset: a time for each
   * reply at the cost of one instruction, where a call of its own would cost 70 ns. Unit: see {@link Native.monotonic} to calibrate.
   */
  stampAt(offset: number): number;
  /** Writes the time stamp now. */
  stamp(): number;

  // --- sockets and descriptors (socket.cc) ---
  /** socket(AF_UNIX, SOCK_STREAM), bind to `path`, listen. Non-blocking, close-on-exec. */
  unixListen(path: number, backlog: number): number;
  /** socket(SOCK_STREAM), bind to the first address of `host` and the decimal port `service`, listen. Non-blocking. -EADDRNOTAVAIL: no such host. */
  tcpListen(host: number, service: number, backlog: number): number;
  /** socket(AF_UNIX, SOCK_STREAM) and connect. Non-blocking afterwards. */
  unixConnect(path: number): number;
  /** socket(AF_UNIX, SOCK_DGRAM) and connect: for /dev/log and $NOTIFY_SOCKET; '@' begins an abstract name. Non-blocking. */
  unixDatagram(path: number): number;
  /** accept4(2), non-blocking, close-on-exec. */
  accept(fd: number): number;
  /** socketpair(AF_UNIX, SOCK_STREAM), both non-blocking; the fds go to arena i32 at `out` and `out + 4`. */
  socketpair(out: number): number;
  /**
   * recvmsg(2) of at most `length` bytes to arena offset `buffer`, without waiting. Descriptors that came along go to arena
   * i32 from `fds + 4`, their count to `fds`; those beyond `maxFds` are closed (-1: all, by the kernel). 0 is the end of the stream.
   */
  recvmsg(fd: number, buffer: number, length: number, fds: number, maxFds: number): number;
  /** As recvmsg, with MSG_PEEK: the bytes stay to be received, and the descriptors are copies. */
  peekmsg(fd: number, buffer: number, length: number, fds: number, maxFds: number): number;
  /** sendmsg(2) of `length` bytes from arena offset `buffer` with `fdCount` descriptors from arena i32 at `fds`. Without waiting. */
  sendmsg(fd: number, buffer: number, length: number, fds: number, fdCount: number): number;
  /** shutdown(2) both ways. */
  shutdown(fd: number): number;
  /** close(2). */
  close(fd: number): number;
  /** fcntl(F_DUPFD_CLOEXEC). */
  dup(fd: number): number;
  /** fcntl(F_SETFL) with O_NONBLOCK set or cleared. */
  setNonBlocking(fd: number, on: number): number;
  /** SO_DOMAIN of a socket, or -ENOTSOCK: tells whether an inherited fd is a Unix socket (AF_UNIX = 1). */
  socketDomain(fd: number): number;
  /** SO_ACCEPTCONN of a socket: 1 for a listening one. */
  socketListening(fd: number): number;

  // --- waiting (wait.cc) ---
  /** eventfd(2) with EFD_CLOEXEC | EFD_NONBLOCK. */
  eventfd(initial: number): number;
  /** Adds 1 to an eventfd: write(2) of 8 bytes. -EAGAIN when its counter is full. */
  eventfdWrite(fd: number): number;
  /** Reads and clears an eventfd; returns the count (at most 2^53), 0 if it was clear. */
  eventfdRead(fd: number): number;
  /** epoll_create1(EPOLL_CLOEXEC). */
  epollCreate(): number;
  /** epoll_ctl(ADD); `tag` (u32) comes back from epollWait. `events`: EPOLLIN 1, EPOLLOUT 4, EPOLLET 2^31 (as unsigned). */
  epollAdd(epoll: number, fd: number, events: number, tag: number): number;
  /** epoll_ctl(DEL). */
  epollDelete(epoll: number, fd: number): number;
  /**
   * epoll_wait(2); `timeout` in milliseconds, -1 for ever. Per event, arena u32 at `out + 8 i` is the tag, the next one the
   * events. Returns the count; a signal handler that ran makes it 0.
   */
  epollWait(epoll: number, out: number, max: number, timeout: number): number;
  /**
   * Looks at `count` 16-bit words of shared memory until one is not what is expected, for at most `nanoseconds`. The arena at `table`: u32
   * nanoseconds that were looked (written), 4 bytes unused, then entries of 16 bytes: f64 address (0: skipped), u32 the expected value.
   * Returns the entry's index, or -1. For the avail indexes of virtqueues.
   */
  busyLoop(table: number, count: number, nanoseconds: number): number;
  /** Makes `signal` write to eventfd `fd` instead of its default action (sigaction(2), in every thread). */
  signalToEventfd(signal: number, fd: number): number;
  /** poll(2) of a single fd. Returns revents, 0 on time-out or when a signal came. Not for the device loop, which has epollWait. */
  poll(fd: number, events: number, timeout: number): number;
  /** Nanoseconds of CLOCK_MONOTONIC. */
  monotonic(): number;

  // --- file system calls (fsops.cc) ---
  /** openat(2). O_CLOEXEC is always added. */
  openat(dirfd: number, name: number, flags: number, mode: number): number;
  /** openat(2) of "N" below the /proc/self/fd directory `procfd`: opens the object behind `fd` anew. */
  reopen(procfd: number, fd: number, flags: number): number;
  /** statx(2) to the 256 bytes at `out`. An empty name with AT_EMPTY_PATH asks for `dirfd` itself. */
  statx(dirfd: number, name: number, flags: number, mask: number, out: number): number;
  /** fstat(2), also of an O_PATH descriptor, to a `struct statx` at `out`: no birth time, attributes and mount id. */
  fstat(fd: number, out: number): number;
  /** mkdirat(2). */
  mkdirat(dirfd: number, name: number, mode: number): number;
  /** mknodat(2); `rdev` in the kernel's encoding (makedev). */
  mknodat(dirfd: number, name: number, mode: number, rdev: number): number;
  /** symlinkat(2). */
  symlinkat(target: number, dirfd: number, name: number): number;
  /** linkat(2). */
  linkat(olddirfd: number, oldname: number, newdirfd: number, newname: number, flags: number): number;
  /** linkat(2) of the object behind "N" below `procfd`: works for an O_PATH descriptor and without CAP_DAC_READ_SEARCH. */
  linkProc(procfd: number, fd: number, newdirfd: number, newname: number): number;
  /** unlinkat(2). */
  unlinkat(dirfd: number, name: number, flags: number): number;
  /** renameat2(2). */
  renameat2(olddirfd: number, oldname: number, newdirfd: number, newname: number, flags: number): number;
  /** readlinkat(2) to arena offset `out`; returns the length. */
  readlinkat(dirfd: number, name: number, out: number, size: number): number;
  /** fchmod(2) of an ordinary descriptor. */
  fchmod(fd: number, mode: number): number;
  /** fchmodat(2) of "N" below `procfd`: works for an O_PATH descriptor. */
  chmodProc(procfd: number, fd: number, mode: number): number;
  /** fchownat(2); uid or gid 4294967295 is left. */
  fchownat(dirfd: number, name: number, uid: number, gid: number, flags: number): number;
  /** futimens(2) with two `struct timespec` (16 bytes each) at arena offset `times`. */
  futimens(fd: number, times: number): number;
  /** utimensat(2) of "N" below `procfd`: works for an O_PATH descriptor. */
  utimensProc(procfd: number, fd: number, times: number): number;
  /** ftruncate(2). */
  ftruncate(fd: number, size: number): number;
  /** fallocate(2). */
  fallocate(fd: number, mode: number, offset: number, length: number): number;
  /** fstatfs(2) to the 120 bytes of `struct statfs` at `out`. */
  fstatfs(fd: number, out: number): number;
  /** getdents64(2) to arena offset `out`. */
  getdents64(fd: number, out: number, size: number): number;
  /** lseek(2). */
  lseek(fd: number, offset: number, whence: number): number;
  /** lseek(2) of a directory to the position that getdents64 gave in two halves (63 bits on ext4). Returns 0 or -errno. */
  seekDirectory(fd: number, low: number, high: number): number;
  /** fsync(2), or fdatasync(2) with `dataOnly` 1. */
  fsync(fd: number, dataOnly: number): number;
  /** syncfs(2). */
  syncfs(fd: number): number;
  /** faccessat2(2) of the object behind "N" below `procfd`. */
  accessProc(procfd: number, fd: number, mode: number): number;
  /** fcntl(F_SETFL): only O_APPEND, O_DIRECT, O_NOATIME and O_NONBLOCK can change. */
  setFlags(fd: number, flags: number): number;
  /** flock(2). */
  flock(fd: number, operation: number): number;
  /** Open file description locks: fcntl(F_OFD_GETLK 36, F_OFD_SETLK 37) with the 32 bytes of `struct flock` at `lock`. */
  ofdLock(fd: number, command: number, lock: number): number;
  /** ioctl(2) with the arena bytes at `argument`. */
  ioctl(fd: number, request: number, argument: number): number;
  /** copy_file_range(2) with explicit offsets. */
  copyFileRange(inFd: number, inOffset: number, outFd: number, outOffset: number, length: number): number;
  /** umask(2) of this thread alone (it leaves what CLONE_FS shares the first time); returns the old one. */
  umask(mask: number): number;
  /**
   * Extended attributes of the object behind `fd` (O_PATH too): getxattr(2) and family on "/proc/self/fd/N", reached through
   * `procfd`: the thread's own working directory is changed to it (unshare(CLONE_FS) and fchdir) the first time.
   */
  getxattr(procfd: number, fd: number, name: number, value: number, size: number): number;
  setxattr(procfd: number, fd: number, name: number, value: number, size: number, flags: number): number;
  listxattr(procfd: number, fd: number, list: number, size: number): number;
  removexattr(procfd: number, fd: number, name: number): number;

  // --- file handles (handle.cc) ---
  /**
   * name_to_handle_at(2). At arena offset `out`: u32 handle_bytes, s32 handle_type, then up to 128 bytes; and the mount id
   * as s32 at `out + 136`. `flags`: AT_EMPTY_PATH 0x1000, AT_HANDLE_FID 0x200.
   */
  nameToHandle(dirfd: number, name: number, flags: number, out: number): number;
  /** open_by_handle_at(2) with the handle at arena offset `handle` (laid out as above). O_CLOEXEC is always added. */
  openByHandle(mountFd: number, handle: number, flags: number): number;

  // --- data (io.cc) ---
  /** preadv2(2) to `count` iovecs after skipping their first `skip` bytes, at most `length` bytes; `flags`: RWF_NOWAIT 8. */
  preadv2(fd: number, iov: number, count: number, skip: number, length: number, offset: number, flags: number): number;
  /** pwritev2(2) from `count` iovecs after skipping their first `skip` bytes; `flags`: RWF_APPEND 16. Offset -1: at the file position. */
  pwritev2(fd: number, iov: number, count: number, skip: number, length: number, offset: number, flags: number): number;
  /** pwritev2 without CAP_FSETID, so that the kernel clears set-user-id and set-group-id bits (FUSE_WRITE_KILL_SUIDGID). */
  pwritev2KillPriv(fd: number, iov: number, count: number, skip: number, length: number, offset: number, flags: number): number;
  /** ftruncate without CAP_FSETID, for the same reason. */
  ftruncateKillPriv(fd: number, size: number): number;

  // --- credentials of this thread (raw system calls; fsops.cc) ---
  /** prctl(PR_SET_SECUREBITS) with SECBIT_NO_SETUID_FIXUP: capabilities stay when the uid changes. Once per thread. */
  keepCapabilities(): number;
  /** setresgid(2) of the effective group alone, this thread only. */
  setEffectiveGid(gid: number): number;
  /** setresuid(2) of the effective user alone, this thread only. */
  setEffectiveUid(uid: number): number;
  /** setgroups(2) with `count` gids from arena u32 at `groups`, this thread only. */
  setGroups(groups: number, count: number): number;
  /** 1 when capability `cap` is in the thread's effective set. */
  hasCapability(cap: number): number;
  /** Drops (on = 0) or raises (on = 1) a capability in the thread's effective set. Returns 1 when that changed it, 0 when it was so already. */
  setCapability(cap: number, on: number): number;

  // --- blocking work off the device thread (offload.cc) ---
  /** Starts at most `threads` native threads (on demand; 0: there are none, and no job is taken) and returns the eventfd that completions are announced on. */
  offloadStart(threads: number): number;
  /** Waits for what is under way, ends the threads and closes the eventfd. */
  offloadStop(): number;
  /**
   * Queues one job; `job` (0..65535) comes back with its result. Iovecs are copied. Operations and their arguments:
   * see {@link OffloadOp}. Returns 0, or -EAGAIN when 65536 jobs are out already, or no thread is to be had.
   */
  offloadSubmit(
    job: number,
    op: number,
    fd: number,
    iov: number,
    count: number,
    skip: number,
    length: number,
    offset: number,
    fd2: number,
    offset2: number,
    flags: number,
  ): number;
  /** Ends a job with -EINTR if it waits for a thread, or its system call lets itself be interrupted. Returns whether there is such a job. */
  offloadCancel(job: number): number;
  /** Takes at most `max` completions: per one, arena i32 at `out + 16 i`: job; f64 at `out + 16 i + 8`: result (≥ 0 or -errno). */
  offloadReap(out: number, max: number): number;

  // --- host watchers (watch.cc) ---
  /** fanotify_init(2). */
  fanotifyInit(flags: number, eventFlags: number): number;
  /** fanotify_mark(2); the 64-bit mask in two halves. An empty name marks `dirfd` itself. */
  fanotifyMark(fd: number, flags: number, maskLow: number, maskHigh: number, dirfd: number, name: number): number;
  /** inotify_init1(IN_CLOEXEC | IN_NONBLOCK). */
  inotifyInit(): number;
  /** inotify_add_watch(2) on the object behind "N" below `procfd`. */
  inotifyAddWatch(fd: number, procfd: number, target: number, mask: number): number;
  /** inotify_rm_watch(2). */
  inotifyRemoveWatch(fd: number, watch: number): number;
  /** read(2) to the arena. */
  read(fd: number, out: number, size: number): number;
  /** write(2) from the arena. */
  write(fd: number, source: number, size: number): number;

  // --- process (process.cc) ---
  /** getpid(2). */
  getpid(): number;
  /** _exit(2): ends the process at once, with threads that are in a system call. */
  exitNow(status: number): never;
  /** setrlimit(RLIMIT_NOFILE) of soft and hard limit; the soft limit alone when the hard one may not be raised. Returns the soft limit reached. */
  setOpenFilesLimit(limit: number): number;
  /** Soft limit of RLIMIT_NOFILE. */
  openFilesLimit(): number;
  /** RLIMIT_FSIZE: soft and hard limit, as two f64 at arena offset `out`; -1: none. */
  fileSizeLimit(out: number): number;
  setFileSizeLimit(soft: number, hard: number): number;
  /** Group id of a group name (getgrnam_r), or -ENOENT. */
  groupId(name: number): number;
  /** chown of a path without following a final symlink, for --socket-group. */
  lchown(path: number, uid: number, gid: number): number;
  /** fcntl(F_SETFD): whether the next program has the descriptor. */
  setInheritable(fd: number, on: number): number;
  /**
   * execve(2): replaces this process by another program, under its pid. `words` and `environment` are arena offsets of so many
   * NUL-terminated strings one after the other; the first word is the program's path. It starts with all signals blocked. Returns only -errno.
   */
  become(words: number, wordCount: number, environment: number, environmentCount: number): number;
  /** Absolute paths of what the dynamic loader has loaded, NUL-terminated at arena offset `out`, at most `size` bytes; returns their count. */
  sharedObjects(out: number, size: number): number;
  /** seccomp(SECCOMP_SET_MODE_FILTER) with the BPF program that `fd` holds, for all threads; sets no_new_privs. -ESRCH: a thread has another filter. */
  loadFilter(fd: number): number;
  /** Starts what {@link chrootAll} needs: before any thread calls umask or the functions of extended attributes. */
  prepareChroot(): number;
  /** chroot(2) to the directory `fd` for every thread that was there at prepareChroot, and the calling one with those it started since. */
  chrootAll(fd: number): number;

  // --- what outlives the process (keeper.cc) ---
  /**
   * clone(CLONE_FILES | CLONE_PARENT): a process that shares this one's descriptors and, after its end, gives them to who asks at
   * the other end of the SEQPACKET `socket`; it ends with that. It puts on the filter that `seccomp` holds (-1: none). Returns its pid.
   */
  keeperStart(socket: number, seccomp: number): number;
  /** Answers as the keeper would, in this process; returns when the other end is closed. */
  keeperServe(socket: number): number;
  /** dup3(2) to the number `to`, and close(2) of `from`. -EBUSY when `to` is open. */
  moveFd(from: number, to: number): number;
  /** Takes all free numbers below `below` by copies of `fd`; arena i32 at `list`: their count, then they. -EMFILE when the limit is lower. */
  fillNumbers(fd: number, below: number, list: number): number;
}

/** Operations of {@link Native.offloadSubmit}. */
export const OffloadOp = {
  /** preadv2(fd, iov[count] after skip, length, offset). */
  read: 1,
  /** pwritev2(fd, iov[count] after skip, length, offset, flags = RWF_*). */
  write: 2,
  /** fsync(fd), or fdatasync with flags 1. */
  fsync: 3,
  /** fallocate(fd, flags = mode, offset, length). */
  fallocate: 4,
  /** copy_file_range(fd, offset, fd2, offset2, length). */
  copyFileRange: 5,
  /** syncfs(fd). */
  syncfs: 6,
  /** As write, without CAP_FSETID. */
  writeKillPriv: 7,
} as const;

const addonPath = process.env['VHOST_USER_TS_ADDON'] ?? fileURLToPath(new URL('./addon.node', import.meta.url));

/**
 * The add-on. A copy: what Node-API makes is an object in V8's dictionary mode, in which every call begins with a search for the
 * function's name, and no call is compiled into its caller (GETATTR at depth 16: 60 of 1090 ns).
 */
export const native: Native = { ...(createRequire(import.meta.url)(addonPath) as Native) };

const ARENA_BYTES = 64 << 20;
const buffer = native.arena(ARENA_BYTES);

/**
 * The block of memory that native calls and JavaScript share, one per thread, seen as bytes and as little-endian words
 * (every machine that runs this is little-endian; `u32[offset >> 2]`). Untouched pages take no memory.
 */
export const arena = {
  u8: new Uint8Array(buffer),
  u16: new Uint16Array(buffer),
  i32: new Int32Array(buffer),
  u32: new Uint32Array(buffer),
  f64: new Float64Array(buffer),
  buffer: Buffer.from(buffer),
} as const;

let arenaTop = 64; // offset 0 is never handed out: 0 can mean "none"; offset 16 stays an empty string for AT_EMPTY_PATH

/** Arena offset of an empty string, for `*at` calls with AT_EMPTY_PATH. */
export const EMPTY_NAME = 16;

/** Blocks given back, by size. */
const arenaSpare = new Map<number, number[]>();

function arenaBlock(bytes: number): number {
  return Math.ceil(bytes / 64) * 64;
}

/**
 * Takes `bytes` of the arena: components allocate their buffers once, when they are made.
 * @returns the offset, aligned to 64 bytes; the contents are undefined.
 * @throws RangeError when the arena is full: a programming error.
 */
export function arenaAlloc(bytes: number): number {
  const spare = arenaSpare.get(arenaBlock(bytes))?.pop();
  if (spare !== undefined) return spare;
  const offset = arenaTop;
  const end = offset + arenaBlock(bytes);
  if (end > ARENA_BYTES) throw new RangeError(`arena full: ${bytes} bytes asked at ${offset} of ${ARENA_BYTES}`);
  arenaTop = end;
  return offset;
}

/** Gives back what {@link arenaAlloc} gave for the same `bytes`: for components that live as long as a connection. */
export function arenaFree(offset: number, bytes: number): void {
  const spare = arenaSpare.get(arenaBlock(bytes));
  if (spare === undefined) arenaSpare.set(arenaBlock(bytes), [offset]);
  else spare.push(offset);
}

const scratchName = arenaAlloc(8192);

/**
 * Writes a string as NUL-terminated bytes and returns its arena offset. Start-up and tests only; the offset is reused by the next call.
 * @throws RangeError for a string with NUL or above 8191 bytes.
 */
export function cString(text: string, at: number = scratchName): number {
  const bytes = Buffer.from(text);
  if (bytes.length > 8191 || bytes.includes(0)) throw new RangeError('a name with NUL or above 8191 bytes');
  arena.u8.set(bytes, at);
  arena.u8[at + bytes.length] = 0;
  return at;
}

/** Reads `length` bytes of the arena as a string (for logs and start-up). */
export function arenaString(offset: number, length: number): string {
  return arena.buffer.toString('utf8', offset, offset + length);
}
