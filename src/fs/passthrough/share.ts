/**
 * What all operations on a shared directory have in common: the stores, the session, the arena buffers, and descriptors for
 * inodes (opened from their handles when needed, kept in a bounded cache).
 */
import { arena, arenaAlloc, cString, EMPTY_NAME, native } from 'vhost-user-ts/native';
import type { Offload } from '../../queue/offload.js';
import { Block } from '../block.js';
import { Credentials } from '../credentials.js';
import type { Caller, Entry, Opened, SessionOptions } from '../filesystem.js';
import { HandleStore, Kind } from '../handles.js';
import { IdMap } from '../idmap.js';
import { Flag, Inode, InodeStore, ROOT_SLOT, SHIFT } from '../inodes.js';
import {
  AT_EMPTY_PATH,
  CAP_DAC_READ_SEARCH,
  EAGAIN,
  EINTR,
  EMFILE,
  ENFILE,
  ENOTDIR,
  ESTALE,
  O_DIRECTORY,
  O_NOCTTY,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_PATH,
  O_RDONLY,
  S_IFDIR,
  S_IFMT,
  S_IFREG,
  STATX_BASIC_STATS,
  STATX_BTIME,
  STATX_MNT_ID,
  Statfs,
  Statx,
} from '../linux.js';
import { MountFlag, MountTable } from '../mounts.js';
import { XattrMap } from '../xattrmap.js';
import { Journal } from './journal.js';
import { Locks } from './lock.js';
import type { PassthroughOptions } from './options.js';

/** What every look-up asks for. */
export const LOOKUP_MASK = STATX_BASIC_STATS | STATX_BTIME | STATX_MNT_ID;

/** Descriptors left for everything else in the process: sockets, eventfds, the mounts' own. */
const RESERVE = 256;
const MOST_DESCRIPTORS = 1 << 20;

/** Offset of the mount id in what name_to_handle_at leaves in {@link Share.handle}. */
const MOUNT_ID_AT = 136;

const NO_SESSION: SessionOptions = {
  dontMask: false,
  posixAcl: false,
  killPrivV2: false,
  stripsSetgid: false,
  writebackCache: false,
  submounts: false,
  atomicOTrunc: false,
  securityContext: false,
  exportSupport: false,
  autoInvalData: false,
  posixLock: false,
  flock: false,
};

/**
 * Inodes that the guest has forgotten and can come back to by their nodeid (export support): the oldest go first. 128 bytes and
 * two buckets of the indexes each.
 */
const KEEP_FORGOTTEN = 1 << 18;

/** Hears of inodes that come and go. */
export interface InodeWatcher {
  /** The guest will be told of a directory that it did not know. @returns whether its attributes must be read again, now that it is watched */
  known(nodeid: number): boolean;
  /** An inode is about to go; its descriptor can still be had. */
  forgotten(nodeid: number): void;
}

/** One shared directory. */
export class Share {
  readonly caller: Caller = {
    uid: 0,
    gid: 0,
    pid: 0,
    supplementaryGid: -1,
    securityContexts: 0,
    securityContextCount: 0,
    securityContextBytes: 0,
  };
  readonly entry: Entry = { nodeid: 0, generation: 0, attrFlags: 0, volatile: false };
  readonly opened: Opened = { fh: 0, openFlags: 0 };
  readonly attr = arenaAlloc(Statx.bytes);
  readonly statfsBuffer = arenaAlloc(Statfs.bytes);

  /** A second struct statx, for comparisons. */
  readonly probe = arenaAlloc(Statx.bytes);
  /** A struct file_handle as name_to_handle_at fills it, and the mount id. */
  readonly handle = arenaAlloc(192);
  /** A name that was mapped (xattrs), two struct timespec, and "." and "..". */
  readonly nameBuffer = arenaAlloc(1024);
  readonly times = arenaAlloc(32);
  readonly dot = cString('.', arenaAlloc(64));
  readonly dotDot = cString('..', arenaAlloc(64));

  readonly block: Block;
  /** What the next process must know of the request being served. */
  readonly journal: Journal;
  readonly inodes: InodeStore;
  readonly handles: HandleStore;
  readonly mounts: MountTable;
  readonly locks: Locks;
  readonly credentials = new Credentials();
  readonly uids: IdMap;
  readonly gids: IdMap;
  readonly xattrmap: XattrMap | null;
  readonly xattr: boolean;
  /** What OPEN and OPENDIR answer from now on. */
  cache: 'auto' | 'always' | 'never' | 'metadata';
  readonly allowDirectIo: boolean;
  readonly preserveNoatime: boolean;
  readonly offload: Offload | null;
  /** /proc/self/fd. */
  readonly procfd: number;
  /** Inodes are kept as handles where the file system has them. */
  readonly useHandles: boolean;
  readonly mandatoryHandles: boolean;
  session: SessionOptions = NO_SESSION;
  /** Until then (CLOCK_MONOTONIC, ns) long writes are jobs: one was held up by the disk. */
  waryUntil = 0;
  /** Who must know which inodes the guest knows: the host watcher, or nobody. */
  watcher: InodeWatcher | null = null;

  /** The inode whose cached descriptor the operation under way goes on to use while others are opened: not evicted. */
  keep = 0;
  /** Arena offset of the host's name for the guest's file capabilities, where the map gives them another one; else 0. */
  mappedCapability = 0;
  /** Descriptors that may be open for inodes and handles. */
  readonly limit: number;
  /** Slots of the inodes with a cached (not pinned) descriptor, in no order; the clock's hand goes round. */
  readonly #ring: Uint32Array;
  #ringSize = 0;
  #hand = 0;
  #pinned = 0;
  /** The line of forgotten inodes: slots, the oldest at `#keptFirst`. */
  #kept = new Uint32Array(0);
  #keptFirst = 0;
  #keptCount = 0;
  readonly #openHandle = arenaAlloc(64);
  readonly #warn: (message: string) => void;

  /** @throws Error when the directory cannot be opened, a rule is wrong, or `mandatory` handles are not to be had. */
  constructor(options: PassthroughOptions) {
    this.uids = new IdMap(options.translateUid);
    this.gids = new IdMap(options.translateGid);
    this.xattrmap = options.xattrmap === undefined ? null : new XattrMap(options.xattrmap);
    this.xattr = options.xattr ?? false;
    this.cache = options.cache ?? 'auto';
    this.allowDirectIo = options.allowDirectIo ?? false;
    this.preserveNoatime = options.preserveNoatime ?? false;
    this.offload = options.offload ?? null;
    this.#warn = options.warn ?? (() => {});
    this.limit = Math.max(64, Math.min(options.maxDescriptors ?? native.openFilesLimit() - RESERVE, MOST_DESCRIPTORS));
    this.#ring = new Uint32Array(this.limit);
    this.block = options.block ?? new Block();
    this.journal = new Journal(options.journal);
    this.inodes = new InodeStore(this.block);
    this.handles = new HandleStore(this.block, this.journal.request);
    this.mounts = new MountTable(this.block);
    this.inodes.mountUnused = (mount) => this.mounts.release(mount, (index) => this.inodes.usesMount(index));
    this.locks = new Locks(this, options.waits ?? null, options.readonly ?? false);
    this.procfd = must(native.openat(-100, cString('/proc/self/fd'), O_PATH | O_DIRECTORY, 0), '/proc/self/fd');
    const mode = options.inodeFileHandles ?? 'prefer';
    this.mandatoryHandles = mode === 'mandatory';
    this.useHandles = mode !== 'never' && native.hasCapability(CAP_DAC_READ_SEARCH) === 1;
    if (mode === 'mandatory' && !this.useHandles) throw new Error('file handles need the capability CAP_DAC_READ_SEARCH');
    if (mode === 'prefer' && !this.useHandles)
      this.#warn('no file handles without the capability CAP_DAC_READ_SEARCH: every known inode keeps a descriptor');
    this.credentials.setUmask(0);
    if (this.inodes.live(ROOT_SLOT)) this.#takeUp();
    else this.#openRoot(options.root);
  }

  /** An earlier process had the share open: its pinned descriptors are there under their numbers. */
  #takeUp(): void {
    for (let slot = ROOT_SLOT; slot < this.inodes.top; slot++) {
      if (!this.inodes.live(slot)) continue;
      const at = slot << SHIFT;
      if ((this.inodes.i32[at + Inode.fd] as number) >= 0) this.#pinned++;
      if (((this.inodes.u32[at + Inode.flags] as number) & Flag.kept) !== 0) this.#enqueueKept(slot);
    }
  }

  /**
   * Closes the handles that requests of an earlier process have opened without an answer: the guest does not know them. A lock owner's
   * descriptor stays: the request finds it again.
   */
  dropOpened(requests: ReadonlySet<number>): void {
    const { handles } = this;
    for (const slot of [...handles.slots()])
      if (handles.kind(slot) !== Kind.lock && requests.has(handles.opener(slot))) handles.release(slot);
  }

  #openRoot(path: string): void {
    const fd = must(native.openat(-100, cString(path), O_PATH | O_DIRECTORY, 0), path);
    must(native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, this.attr), path);
    const mount = must(this.mountOfFd(fd), path);
    if (this.mandatoryHandles && this.mounts.flags(mount) & MountFlag.noHandles)
      throw new Error(`${path}: its file system has no file handles that can be opened`);
    const word = this.attr >> 2;
    const slot = this.inodes.insert(
      arena.u32[word + (Statx.ino >> 2)] as number,
      arena.u32[word + (Statx.ino >> 2) + 1] as number,
      mount,
      S_IFDIR,
    );
    if (slot !== ROOT_SLOT) throw new Error('the state block has a root already');
    if (this.handlesOn(mount) && native.nameToHandle(fd, EMPTY_NAME, AT_EMPTY_PATH, this.handle) === 0)
      this.inodes.setHandle(slot, this.handle);
    this.inodes.f64[((slot << SHIFT) + Inode.nlookup) >> 1] = 1;
    this.pin(slot, fd);
  }

  warn(message: string): void {
    this.#warn(message);
  }

  /** Whether inodes of this mount are kept as handles. */
  handlesOn(mount: number): boolean {
    return this.useHandles && (this.mounts.flags(mount) & MountFlag.noHandles) === 0;
  }

  /** Index of the inode's mount. */
  mountOf(slot: number): number {
    return this.inodes.u32[(slot << SHIFT) + Inode.mount] as number;
  }

  /** S_IFMT bits of an inode. */
  type(slot: number): number {
    return this.inodes.u32[(slot << SHIFT) + Inode.type] as number;
  }

  /**
   * A descriptor of an inode for the *at calls and others that take O_PATH; valid until the next one is asked for, but for {@link keep}.
   * @returns the fd; -ESTALE when the inode is gone, -ENFILE when no more may be open
   */
  fd(slot: number): number {
    const at = slot << SHIFT;
    const fd = this.inodes.i32[at + Inode.fd] as number;
    if (fd < 0) return this.#openCached(slot);
    this.inodes.u32[at + Inode.flags] = (this.inodes.u32[at + Inode.flags] as number) | Flag.referenced;
    return fd;
  }

  #openCached(slot: number): number {
    const fd = this.open(slot, O_PATH);
    if (fd >= 0) this.cacheFd(slot, fd);
    return fd;
  }

  /**
   * Opens an inode anew; the fd is the caller's.
   * @param flags O_* without O_CREAT and O_NOFOLLOW; only O_PATH for what is not a regular file or directory
   */
  open(slot: number, flags: number): number {
    if (!this.room()) return -ENFILE;
    let fd = this.#openOnce(slot, flags);
    if ((fd === -EMFILE || fd === -ENFILE) && this.#shrink()) fd = this.#openOnce(slot, flags);
    if (fd === -ESTALE) this.inodes.retire(slot);
    return fd;
  }

  #openOnce(slot: number, flags: number): number {
    const at = slot << SHIFT;
    const mountFd = this.mounts.fd(this.inodes.u32[at + Inode.mount] as number);
    if (this.inodes.u32[at + Inode.handleBytes] !== 0 && mountFd >= 0 && this.useHandles) {
      this.inodes.copyHandle(slot, this.#openHandle);
      return native.openByHandle(mountFd, this.#openHandle, flags | O_NOFOLLOW);
    }
    const fd = this.inodes.i32[at + Inode.fd] as number;
    return fd < 0 ? -ESTALE : native.reopen(this.procfd, fd, flags);
  }

  /** Hands an O_PATH fd to the cache. */
  cacheFd(slot: number, fd: number): void {
    const at = slot << SHIFT;
    this.inodes.i32[at + Inode.fd] = fd;
    this.inodes.u32[at + Inode.cachePosition] = this.#ringSize;
    this.inodes.u32[at + Inode.flags] = (this.inodes.u32[at + Inode.flags] as number) | Flag.referenced;
    this.#ring[this.#ringSize++] = slot;
  }

  /** Hands an O_PATH fd to an inode for as long as it is known. */
  pin(slot: number, fd: number): void {
    const at = slot << SHIFT;
    this.inodes.i32[at + Inode.fd] = fd;
    this.inodes.u32[at + Inode.flags] = (this.inodes.u32[at + Inode.flags] as number) | Flag.pinned;
    this.#pinned++;
  }

  /** Closes an inode's descriptor, if it has one. */
  closeFd(slot: number): void {
    const at = slot << SHIFT;
    const fd = this.inodes.i32[at + Inode.fd] as number;
    if (fd < 0) return;
    // First: the number can be another descriptor's as soon as it is closed.
    this.inodes.i32[at + Inode.fd] = -1;
    native.close(fd);
    if ((this.inodes.u32[at + Inode.flags] as number) & Flag.pinned) {
      this.#pinned--;
      return;
    }
    this.#leaveRing(at);
  }

  #leaveRing(at: number): void {
    const position = this.inodes.u32[at + Inode.cachePosition] as number;
    const last = this.#ring[--this.#ringSize] as number;
    this.#ring[position] = last;
    this.inodes.u32[(last << SHIFT) + Inode.cachePosition] = position;
  }

  /**
   * The guest has forgotten an inode: with export support its nodeid stays valid for a while, as a file handle of the guest's is
   * made of it (`fuse_encode_fh()`). Only what can be opened by a handle is kept: a record costs no descriptor.
   * @returns false when it is not kept
   */
  keepForgotten(slot: number): boolean {
    if (!this.session.exportSupport) return false;
    const at = slot << SHIFT;
    const flags = this.inodes.u32[at + Inode.flags] as number;
    if ((flags & Flag.handleIndexed) === 0 || (flags & Flag.pinned) !== 0) return false;
    this.closeFd(slot);
    this.inodes.f64[(at + Inode.nlookup) >> 1] = 0;
    if ((flags & Flag.kept) !== 0) return true;
    this.#enqueueKept(slot);
    this.inodes.u32[at + Inode.flags] = (this.inodes.u32[at + Inode.flags] as number) | Flag.kept;
    return true;
  }

  #enqueueKept(slot: number): void {
    if (this.#kept.length === 0) this.#kept = new Uint32Array(KEEP_FORGOTTEN);
    if (this.#keptCount === KEEP_FORGOTTEN) this.#dropOldestKept();
    this.#kept[(this.#keptFirst + this.#keptCount++) % KEEP_FORGOTTEN] = slot;
  }

  #dropOldestKept(): void {
    const slot = this.#kept[this.#keptFirst] as number;
    this.#keptFirst = (this.#keptFirst + 1) % KEEP_FORGOTTEN;
    this.#keptCount--;
    const at = slot << SHIFT;
    // Not when the slot has gone to another inode since.
    if (!this.inodes.live(slot) || ((this.inodes.u32[at + Inode.flags] as number) & Flag.kept) === 0) return;
    this.inodes.u32[at + Inode.flags] = (this.inodes.u32[at + Inode.flags] as number) & ~Flag.kept;
    if (this.inodes.f64[(at + Inode.nlookup) >> 1] !== 0) return;
    this.closeFd(slot);
    this.inodes.remove(slot);
  }

  /** Makes an inode's cached descriptor stay until the inode is forgotten. */
  pinCached(slot: number): void {
    const at = slot << SHIFT;
    const fd = this.inodes.i32[at + Inode.fd] as number;
    if (fd < 0 || (this.inodes.u32[at + Inode.flags] as number) & Flag.pinned) return;
    this.inodes.i32[at + Inode.fd] = -1;
    this.#leaveRing(at);
    this.pin(slot, fd);
  }

  /** Descriptors open for inodes and handles. */
  get descriptors(): number {
    return this.#ringSize + this.#pinned + this.handles.open;
  }

  /** Makes room for one more descriptor by closing one that was not used lately; false when all are needed. */
  room(): boolean {
    while (this.descriptors >= this.limit) if (!this.#evict()) return false;
    return true;
  }

  /** Second chance ("clock"): the hand passes what was used since it came by last. */
  #evict(): boolean {
    for (let left = this.#ringSize * 2; left > 0; left--) {
      if (this.#hand >= this.#ringSize) this.#hand = 0;
      const slot = this.#ring[this.#hand] as number;
      const at = (slot << SHIFT) + Inode.flags;
      const flags = this.inodes.u32[at] as number;
      if (slot === this.keep || flags & Flag.referenced) {
        this.inodes.u32[at] = flags & ~Flag.referenced;
        this.#hand++;
        continue;
      }
      this.closeFd(slot);
      return true;
    }
    return false;
  }

  /** The system has no descriptors left, though our own limit is not reached: closes an eighth of the cached ones. */
  #shrink(): boolean {
    let closed = 0;
    for (let n = (this.#ringSize >> 3) + 1; n > 0 && this.#evict(); n--) closed++;
    return closed > 0;
  }

  /**
   * Index of the mount that the object in `attr` is on; `parent` is the inode that it was found in, `dirfd` and `name` lead to
   * it (a mount that is new to us must be looked at).
   * @returns the index; -EAGAIN when something else is there by now; another error of opening it
   */
  mountOfAttr(parent: number, dirfd: number, name: number): number {
    const word = this.attr >> 2;
    const id = arena.u32[word + (Statx.mountId >> 2)] as number;
    const major = arena.u32[word + (Statx.devMajor >> 2)] as number;
    const minor = arena.u32[word + (Statx.devMinor >> 2)] as number;
    const same = this.inodes.u32[(parent << SHIFT) + Inode.mount] as number;
    if (this.mounts.is(same, id, major, minor)) return same;
    const index = this.mounts.find(id, major, minor);
    if (index >= 0 && this.#canOpen(index)) return index;
    if (!this.room()) return -ENFILE;
    const fd = native.openat(dirfd, name, O_PATH | O_NOFOLLOW, 0);
    if (fd < 0) return fd;
    let error = native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, this.attr);
    if (error === 0) error = this.mountOfFd(fd);
    if (error >= 0 && !this.mounts.is(error, id, major, minor)) error = -EAGAIN;
    native.close(fd);
    return error;
  }

  /** As {@link mountOfAttr}, for the object behind `fd`, whose attributes are in `attr`. */
  mountOfFd(fd: number): number {
    const word = this.attr >> 2;
    const id = arena.u32[word + (Statx.mountId >> 2)] as number;
    const major = arena.u32[word + (Statx.devMajor >> 2)] as number;
    const minor = arena.u32[word + (Statx.devMinor >> 2)] as number;
    const known = this.mounts.find(id, major, minor);
    if (known >= 0 && this.#canOpen(known)) return known;
    const error = native.fstatfs(fd, this.statfsBuffer);
    if (error < 0) return error;
    const index = known >= 0 ? known : this.mounts.add(id, major, minor, arena.u32[this.statfsBuffer >> 2] as number);
    if (index < 0) return -ENFILE;
    if (known >= 0) this.mounts.renew(known, arena.u32[this.statfsBuffer >> 2] as number);
    if ((arena.u32[word] as number) & STATX_BTIME) this.mounts.setFlag(index, MountFlag.birthTime);
    if (this.useHandles && !this.#tryHandles(index, fd)) {
      this.mounts.setFlag(index, MountFlag.noHandles);
      this.#warn(
        `mount ${id}: no file handles that can be opened, ${this.mandatoryHandles ? 'it is not shared' : 'its known inodes keep descriptors'}`,
      );
    }
    return index;
  }

  /** Whether inodes of this mount can be opened: by handles with its descriptor, which nobody needed for a while, or without any. */
  #canOpen(mount: number): boolean {
    return this.mounts.fd(mount) >= 0 || !this.handlesOn(mount);
  }

  /** Gets the descriptor that handles are opened by, and opens one to see whether that works. */
  #tryHandles(index: number, fd: number): boolean {
    // What can be mounted on is a directory or a file of any type; only these two may be opened without harm.
    const type = (arena.u16[(this.attr + Statx.mode) >> 1] as number) & S_IFMT;
    let mountFd = this.mounts.fd(index);
    if (mountFd < 0) {
      if (type !== S_IFDIR && type !== S_IFREG) return false;
      mountFd = native.reopen(this.procfd, fd, O_RDONLY | O_NONBLOCK | O_NOCTTY);
      if (mountFd < 0) return false;
      this.mounts.setFd(index, mountFd);
    }
    if (native.nameToHandle(fd, EMPTY_NAME, AT_EMPTY_PATH, this.handle) < 0) return false;
    const again = native.openByHandle(mountFd, this.handle, O_PATH | O_NOFOLLOW);
    if (again < 0) return false;
    native.close(again);
    return true;
  }

  /**
   * name_to_handle_at to {@link handle}, the words after an odd length zeroed (they are compared and hashed as words).
   * @returns 0, or -errno; -EAGAIN when the object is on another mount than `mount`
   */
  nameToHandle(dirfd: number, name: number, flags: number, mount: number): number {
    const error = native.nameToHandle(dirfd, name, flags, this.handle);
    if (error < 0) return error;
    const bytes = arena.u32[this.handle >> 2] as number;
    for (let i = bytes; i & 3; i++) arena.u8[this.handle + 8 + i] = 0;
    // Before Linux 5.8 statx knows no mount ids: all are 0 then.
    const id = this.mounts.id(mount);
    return id !== 0 && arena.u32[(this.handle + MOUNT_ID_AT) >> 2] !== id ? -EAGAIN : 0;
  }

  /** Puts the guest's ids in place of the host's in `attr`. */
  translateAttr(): void {
    const word = this.attr >> 2;
    if (!this.uids.identity) arena.u32[word + (Statx.uid >> 2)] = this.uids.toGuest(arena.u32[word + (Statx.uid >> 2)] as number);
    if (!this.gids.identity) arena.u32[word + (Statx.gid >> 2)] = this.gids.toGuest(arena.u32[word + (Statx.gid >> 2)] as number);
  }

  /** The slot of a directory that the guest named. */
  directory(nodeid: number): number {
    const slot = this.inodes.find(nodeid);
    if (slot > 0 && this.type(slot) !== S_IFDIR) return -ENOTDIR;
    return slot;
  }

  /** An open file or directory of the guest, for operations that take either; -EBADF. */
  anyHandle(fh: number, nodeid: number): number {
    const slot = this.handles.find(fh, nodeid, Kind.file);
    return slot > 0 ? slot : this.handles.find(fh, nodeid, Kind.directory);
  }

  /** Forgets all inodes but the root and closes all handles (those in use when their job ends). */
  reset(): void {
    this.locks.cancel(-EINTR);
    this.locks.clear();
    this.handles.releaseAll();
    // The session's watches are gone already: no word to the watcher for each inode. One by one they would take microseconds each.
    const { inodes } = this;
    inodes.each((slot) => {
      if (slot !== ROOT_SLOT && (inodes.i32[(slot << SHIFT) + Inode.fd] as number) >= 0) this.closeFd(slot);
    });
    inodes.clear();
    this.#keptFirst = this.#keptCount = 0;
    this.mounts.closeSubmounts();
    this.credentials.restore();
    this.credentials.setUmask(0);
    this.session = NO_SESSION;
  }

  /** Closes everything. */
  close(): void {
    this.reset();
    this.closeFd(ROOT_SLOT);
    this.mounts.close();
    native.close(this.procfd);
    this.block.close();
  }
}

function must(result: number, what: string): number {
  if (result < 0) throw new Error(`${what}: errno ${-result}`);
  return result;
}
