/**
 * The host's events by fanotify: one group of this process with a mark on each object that the guest watches.
 *
 * Marks on inodes and not one on the whole file system: that one needs CAP_SYS_ADMIN, and makes every write on the file system
 * dearer, also those to what nobody watches (0.66 to 1.8 µs for 8 bytes). With FAN_REPORT_DFID_NAME_TARGET (Linux 5.17) an event
 * names directory, name and child; older kernels leave out the child (5.9).
 *
 * What the kernel does and what follows from it (fs/notify/fanotify/fanotify.c):
 *  - Events of one process on one object and name that nobody has read yet are merged into one with the bits of all. They keep
 *    the place of the first. Bits are delivered in the order of {@link ORDER}. As the child is part of what must be equal, "deleted
 *    and made anew" is never merged; "made and deleted" is.
 *  - An event on a directory (opened, listed, chmod) names that directory alone, also when its parent asked for it: parent
 *    and name are looked up here, see {@link Fanotify.drain}.
 *  - An event on another child carries parent and name even when only the child has a mark.
 *  - FAN_RENAME is one event with both names; of a directory without a mark its half is missing.
 *  - `pid` is the process that did it, in threads of ours too; for an unprivileged group it is 0 for all others.
 *  - The queue is bounded (fs.fanotify.max_queued_events): an unlimited one would grow in the kernel while a guest does nothing.
 */
import { arena, arenaAlloc, cString, EMPTY_NAME, native } from 'vhost-user-ts/native';
import { Counter, type Counters } from './counters.js';
import {
  FS_ATTRIB,
  FS_CREATE,
  FS_DELETE,
  FS_DELETE_SELF,
  FS_EVENT_ON_CHILD,
  FS_ISDIR,
  FS_MOVE_SELF,
  FS_MOVED_FROM,
  FS_MOVED_TO,
  FS_Q_OVERFLOW,
  FS_RENAME,
  ON_CHILD,
} from './mask.js';
import type { WatchNodes } from './nodes.js';
import { grown, mix, OpenIndex, WatchTable } from './table.js';
import { type EventSink, GUARDED, Watcher } from './watcher.js';

// linux/fanotify.h
const FAN_CLOEXEC = 0x1;
const FAN_NONBLOCK = 0x2;
const FAN_UNLIMITED_MARKS = 0x20;
const FAN_REPORT_FID = 0x200;
const FAN_REPORT_DIR_FID = 0x400;
const FAN_REPORT_NAME = 0x800;
const FAN_REPORT_TARGET_FID = 0x1000;
const FAN_REPORT_DFID_NAME = FAN_REPORT_DIR_FID | FAN_REPORT_NAME;
const FAN_REPORT_DFID_NAME_TARGET = FAN_REPORT_DFID_NAME | FAN_REPORT_FID | FAN_REPORT_TARGET_FID;
const FAN_MARK_ADD = 0x1;
const FAN_MARK_REMOVE = 0x2;
const FAN_MARK_FLUSH = 0x80;

/** struct fanotify_event_metadata { u32 event_len; u8 vers; u8 reserved; u16 metadata_len; u64 mask; s32 fd; s32 pid; } */
const Metadata = { eventLen: 0, vers: 4, metadataLen: 6, mask: 8, fd: 16, pid: 20, bytes: 24 } as const;
const FANOTIFY_METADATA_VERSION = 3;
/** struct fanotify_event_info_fid { u8 info_type; u8 pad; u16 len; u32 fsid[2]; struct file_handle; }, then the name with its NUL */
const Info = { type: 0, len: 2, fsid: 4, handle: 12, handleBytes: 12, handleData: 20 } as const;
const InfoType = { FID: 1, DFID_NAME: 2, DFID: 3, OLD_DFID_NAME: 10, NEW_DFID_NAME: 12 } as const;

const AT_SYMLINK_NOFOLLOW = 0x100;
const AT_EMPTY_PATH = 0x1000;
const AT_HANDLE_FID = 0x200;
const O_DIRECTORY = process.arch === 'arm64' ? 0x4000 : 0x10000;
const EINVAL = 22;
const ENODEV = 19;
const DT_DIR = 4;
const DT_UNKNOWN = 0;
const DOT = 0x2e;

/** struct statfs: f_fsid; struct statx: attributes and nlink. */
const STATFS_FSID = 56;
const STATX_ATTRIBUTES = 8;
const STATX_NLINK = 16;
const STATX_NLINK_BIT = 4;
const STATX_ATTR_MOUNT_ROOT = 0x2000;

/** Words of an object's key: fsid, then the struct file_handle with at most 128 bytes (MAX_HANDLE_SZ). */
const KEY_WORDS = 2 + 2 + 32;
const BUFFER_BYTES = 64 << 10;
/** Directory entries looked at per search for an unknown directory's parent before it is given up. */
const SCAN_ENTRIES = 20_000;
const SCAN_CACHE = 256;

const u8 = arena.u8;
const u16 = arena.u16;
const u32 = arena.u32;
const i32 = arena.i32;
const DOT_DOT = cString('..', arenaAlloc(64));

/** How much this kernel's fanotify can tell. */
export interface FanotifyAbility {
  /** FAN_REPORT_* flags. */
  report: number;
  /** FAN_RENAME. */
  rename: boolean;
}

/** The watcher. */
export class Fanotify extends Watcher {
  readonly kind = 'fanotify';
  readonly supported: number;
  readonly fd: number;
  readonly #rename: boolean;
  readonly #procfd: number;
  readonly #pid = native.getpid();
  /** The process that had this group before us: what it did is no news, as long as the first events after it are read. */
  #pidBefore: number;
  readonly #counters: Counters;
  readonly #handleFlags: number;
  #keys = new Uint32Array(64 * KEY_WORDS);
  readonly #index = new OpenIndex((object) => hashKey(this.#keys, object * KEY_WORDS));
  /** A node on each file system, to open handles by: fsid low, high, nodeid. */
  readonly #systems: number[] = [];

  readonly #buffer = arenaAlloc(BUFFER_BYTES);
  /** A key as {@link KEY_WORDS} has it, and room for the mount id behind a handle. */
  readonly #key = arenaAlloc(256);
  readonly #statx = arenaAlloc(256);
  readonly #statfs = arenaAlloc(128);
  readonly #digits = arenaAlloc(64);
  readonly #link = arenaAlloc(8192);
  readonly #dents = arenaAlloc(32 << 10);

  /** What {@link #parentOf} found: a slot of the parent (0: none is watched) and the name in it. */
  #parent = 0;
  #name = 0;
  #nameLength = 0;

  /** Where unknown directories were found last, by hash of their key: parent's nodeid, and the name. */
  readonly #scanned = new Float64Array(SCAN_CACHE);
  readonly #scannedNames = new Uint8Array(SCAN_CACHE * 256);

  /**
   * @param ability from {@link fanotifyAbility}
   * @param procfd a descriptor of /proc/self/fd: marks are set through it, as fanotify_mark(2) takes no O_PATH descriptor itself
   * @param earlier the group of a process before this one, with its marks and events, and that process's `pid`
   */
  constructor(
    ability: FanotifyAbility,
    nodes: WatchNodes,
    procfd: number,
    limit: number,
    counters: Counters,
    table = new WatchTable(),
    earlier = -1,
    pid = 0,
  ) {
    super(nodes, limit, table);
    const flags = FAN_CLOEXEC | FAN_NONBLOCK | ability.report;
    // The guest's limit is ours to set; the user's limit would count other groups of the same user.
    let fd = earlier >= 0 ? earlier : native.fanotifyInit(flags | FAN_UNLIMITED_MARKS, 0);
    this.#pidBefore = pid;
    if (fd < 0) fd = native.fanotifyInit(flags, 0);
    if (fd < 0) throw new Error(`fanotify_init: errno ${-fd}`);
    this.fd = fd;
    this.#procfd = procfd;
    this.#counters = counters;
    this.#rename = ability.rename;
    this.supported =
      (ON_CHILD |
        FS_CREATE |
        FS_DELETE |
        FS_MOVED_FROM |
        FS_MOVED_TO |
        FS_DELETE_SELF |
        FS_MOVE_SELF |
        FS_EVENT_ON_CHILD |
        FS_ISDIR |
        (ability.rename ? FS_RENAME : 0)) >>>
      0;
    // AT_HANDLE_FID (Linux 6.5) also gives the handles of file systems that cannot open them again.
    this.#handleFlags =
      native.nameToHandle(procfd, EMPTY_NAME, AT_EMPTY_PATH | AT_HANDLE_FID, this.#key + 8) === -EINVAL ? 0 : AT_HANDLE_FID;
  }

  protected hostMask(slot: number): number {
    const table = this.table;
    const mask = (table.mask[slot] as number) | this.kept(slot);
    if (table.directory[slot] === 0) {
      // Who waits for the end of a file hears of its link count; CREATE and the like are refused for what is no directory.
      return (mask & (ON_CHILD | FS_MOVE_SELF)) | ((mask & FS_DELETE_SELF) !== 0 ? FS_ATTRIB : 0);
    }
    let host = mask & (ON_CHILD | FS_CREATE | FS_DELETE | FS_MOVE_SELF);
    if ((mask & (FS_MOVED_FROM | FS_MOVED_TO | FS_RENAME)) !== 0) host |= this.#moves;
    if ((table.guards[slot] as number) > 0) host |= FS_DELETE;
    if (table.guardedBy[slot] !== 0) host |= GUARDED;
    if (host === 0) return 0;
    return (host | (mask & FS_EVENT_ON_CHILD) | FS_ISDIR) >>> 0; // FS_ISDIR is FAN_ONDIR
  }

  get #moves(): number {
    return this.#rename ? FS_RENAME : FS_MOVED_FROM | FS_MOVED_TO;
  }

  protected identify(slot: number, fd: number): number {
    const key = this.#key;
    let error = native.nameToHandle(fd, EMPTY_NAME, AT_EMPTY_PATH | this.#handleFlags, key + 8);
    if (error < 0) return error;
    error = native.fstatfs(fd, this.#statfs);
    if (error < 0) return error;
    const low = u32[(this.#statfs + STATFS_FSID) >> 2] as number;
    const high = u32[(this.#statfs + STATFS_FSID + 4) >> 2] as number;
    if (low === 0 && high === 0) return -ENODEV; // as fanotify_mark(2) says for a file system without an id
    u32[key >> 2] = low;
    u32[(key >> 2) + 1] = high;
    this.#system(low, high, this.table.nodeid[slot] as number);
    const known = this.#find(key >> 2);
    if (known !== 0) return known;
    const object = this.newObject();
    if ((object + 1) * KEY_WORDS > this.#keys.length) this.#keys = grown(this.#keys, new Uint32Array(this.#keys.length * 2));
    const words = keyWords(u32, key >> 2);
    for (let i = 0; i < words; i++) this.#keys[object * KEY_WORDS + i] = u32[(key >> 2) + i] as number;
    this.#index.insert(object);
    return object;
  }

  protected mark(_object: number, fd: number, have: number, want: number): number {
    const name = this.#decimal(fd);
    const add = (want & ~have) >>> 0;
    if (add !== 0) {
      const error = native.fanotifyMark(this.fd, FAN_MARK_ADD, want, 0, this.#procfd, name);
      if (error < 0) return error;
    }
    const remove = (have & ~want) >>> 0;
    // A bit too many in the mark costs something and harms nobody: no error.
    if (remove !== 0) native.fanotifyMark(this.fd, FAN_MARK_REMOVE, remove, 0, this.#procfd, name);
    return 0;
  }

  protected unmark(object: number, fd: number): void {
    const have = this.have[object] as number;
    // Without a descriptor the inode is gone, and its mark with it.
    if (have !== 0 && fd >= 0) native.fanotifyMark(this.fd, FAN_MARK_REMOVE, have, 0, this.#procfd, this.#decimal(fd));
    this.#index.remove(object);
  }

  override clear(): void {
    super.clear();
    native.fanotifyMark(this.fd, FAN_MARK_FLUSH, 0, 0, this.#procfd, EMPTY_NAME);
    this.#index.clear();
    this.#systems.length = 0;
    this.#scanned.fill(0);
    // What was queued is of watches that are no more.
    this.discard();
  }

  discard(): void {
    while (native.read(this.fd, this.#buffer, BUFFER_BYTES) > 0);
  }

  close(): void {
    native.close(this.fd);
  }

  drain(sink: EventSink, reads = 1): boolean {
    const counters = this.#counters;
    while (reads-- > 0) {
      const n = native.read(this.fd, this.#buffer, BUFFER_BYTES);
      if (n <= 0) {
        this.#pidBefore = 0;
        return false;
      }
      sink.batch();
      const end = this.#buffer + n;
      let events = 0;
      for (let at = this.#buffer; at + Metadata.bytes <= end; ) {
        const length = u32[at >> 2] as number;
        if (length < Metadata.bytes || u8[at + Metadata.vers] !== FANOTIFY_METADATA_VERSION) break;
        events++;
        this.#event(sink, at, length);
        at += length;
      }
      counters.add(Counter.events, events);
    }
    return true;
  }

  #event(sink: EventSink, at: number, length: number): void {
    const mask = u32[(at + Metadata.mask) >> 2] as number;
    if ((mask & FS_Q_OVERFLOW) !== 0) {
      sink.overflow();
      return;
    }
    let directory = 0;
    let child = 0;
    let from = 0;
    let to = 0;
    for (let info = at + (u16[(at + Metadata.metadataLen) >> 1] as number), end = at + length; info + 4 <= end; ) {
      const bytes = u16[(info + Info.len) >> 1] as number;
      if (bytes < 4) break;
      switch (u8[info]) {
        case InfoType.FID:
          child = info;
          break;
        case InfoType.DFID_NAME:
        case InfoType.DFID:
          directory = info;
          break;
        case InfoType.OLD_DFID_NAME:
          from = info;
          break;
        case InfoType.NEW_DFID_NAME:
          to = info;
          break;
      }
      info += bytes;
    }
    const pid = i32[(at + Metadata.pid) >> 2] as number;
    const own = pid === this.#pid || (pid === this.#pidBefore && pid !== 0);
    if (own) {
      this.#counters.add(Counter.echoes);
      // A directory that the guest itself moved needs another guard, too.
      if ((mask & FS_MOVE_SELF) === 0) return;
    }
    if (from !== 0 || to !== 0) {
      if (own) return;
      const fromName = from === 0 ? 0 : nameAt(from);
      const toName = to === 0 ? 0 : nameAt(to);
      sink.renamed(
        mask & FS_ISDIR,
        from === 0 ? 0 : this.#slotOf(from),
        fromName,
        from === 0 ? 0 : nameLength(from, fromName),
        to === 0 ? 0 : this.#slotOf(to),
        toName,
        to === 0 ? 0 : nameLength(to, toName),
        child === 0 ? 0 : child + Info.handle,
        0,
        0,
      );
      return;
    }
    if (directory !== 0 && u8[directory] === InfoType.DFID_NAME && !isDot(directory)) {
      if (own) return;
      const name = nameAt(directory);
      const parent = this.#slotOf(directory);
      const slot = child === 0 ? 0 : this.#slotOf(child);
      if (parent !== 0) {
        let bits = mask;
        if (child === 0 && (mask & FS_CREATE) !== 0 && (mask & FS_DELETE) !== 0 && this.#exists(parent, name)) {
          // Before 5.17 the child is no part of what must be equal: "removed and made anew" is merged, too, and then the name is there.
          sink.named((mask & (FS_DELETE | FS_ISDIR)) >>> 0, parent, 0, name, nameLength(directory, name), 0, 0);
          bits = (mask & ~FS_DELETE) >>> 0;
        }
        sink.named(bits, parent, slot, name, nameLength(directory, name), child === 0 ? 0 : child + Info.handle, 0);
      } else if (slot !== 0) sink.self(mask, slot);
      return;
    }
    // The object itself: only FID for what is no directory, only DFID for one.
    const object = child !== 0 ? child : directory;
    if (object === 0) return;
    const slot = this.#slotOf(object);
    if ((mask & FS_MOVE_SELF) !== 0 && slot !== 0) this.moved(slot);
    if (own) return;
    const toParent = (mask & FS_ISDIR) !== 0 ? mask & ON_CHILD & this.childBits : 0;
    if (toParent !== 0 && this.#parentOf(object, slot)) {
      sink.named(((mask & ON_CHILD) | FS_ISDIR) >>> 0, this.#parent, slot, this.#name, this.#nameLength, object + Info.handle, 0);
      const rest = mask & FS_MOVE_SELF;
      if (rest !== 0 && slot !== 0) sink.self((rest | FS_ISDIR) >>> 0, slot);
    } else if (slot !== 0) sink.self(mask, slot);
  }

  #exists(slot: number, name: number): boolean {
    const fd = this.nodes.fd(this.table.nodeid[slot] as number);
    return fd >= 0 && native.statx(fd, name, AT_SYMLINK_NOFOLLOW, STATX_NLINK_BIT, this.#statx) === 0;
  }

  /** First slot of the object that an information record names, 0 when it is not watched. */
  #slotOf(info: number): number {
    const object = this.#find((info + Info.fsid) >> 2);
    return object === 0 ? 0 : (this.head[object] as number);
  }

  /** The object whose key lies at word `at` of the arena, or 0. */
  #find(at: number): number {
    const index = this.#index;
    const keys = this.#keys;
    const words = keyWords(u32, at);
    for (let place = index.start(hashKey(u32, at)); ; place = index.after(place)) {
      const object = index.at(place);
      if (object === 0) return 0;
      const key = object * KEY_WORDS;
      let i = 0;
      while (i < words && keys[key + i] === u32[at + i]) i++;
      if (i === words) return object;
    }
  }

  /**
   * Finds the parent and the name of the directory that an event named alone; `slot` if it is watched itself.
   * It opens the directory (by the guest's descriptor, or by its handle), reads where its path leads, and asks ".." for the parent:
   * what is true now, whatever was renamed before. Without CAP_DAC_READ_SEARCH nothing opens a handle: the watched directories are searched.
   * @returns false when the parent is not watched.
   */
  #parentOf(info: number, slot: number): boolean {
    const nodes = this.nodes;
    const low = u32[(info + Info.fsid) >> 2] as number;
    const high = u32[(info + Info.fsid + 4) >> 2] as number;
    let fd: number;
    let own = false;
    if (slot !== 0) fd = nodes.fd(this.table.nodeid[slot] as number);
    else {
      const near = this.#near(low, high);
      if (near === 0) return false;
      const nodeid = nodes.byHandle(info + Info.handle, near);
      if (nodeid !== 0) fd = nodes.fd(nodeid);
      else {
        fd = nodes.open(info + Info.handle, near);
        own = true;
        if (fd === -EPERM) return this.#scan(info, low, high);
      }
    }
    if (fd < 0) return false;
    const found = this.#parentOfFd(fd, low, high);
    if (own) native.close(fd);
    return found;
  }

  #parentOfFd(fd: number, low: number, high: number): boolean {
    if (native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, STATX_NLINK_BIT, this.#statx) < 0) return false;
    // The root of a mount has no parent for the kernel's events.
    if (((u32[(this.#statx + STATX_ATTRIBUTES) >> 2] as number) & STATX_ATTR_MOUNT_ROOT) !== 0) return false;
    const key = this.#key;
    if (native.nameToHandle(fd, DOT_DOT, this.#handleFlags, key + 8) < 0) return false;
    u32[key >> 2] = low;
    u32[(key >> 2) + 1] = high;
    const object = this.#find(key >> 2);
    if (object === 0) return false;
    let n = native.readlinkat(this.#procfd, this.#decimal(fd), this.#link, 4352);
    if (n <= 0) return false;
    if (this.#endsDeleted(n)) {
      // d_path() says so of what was removed, or it is part of the name: it is d_path()'s when read again after the removal was seen.
      if (native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, STATX_NLINK_BIT, this.#statx) < 0) return false;
      if (u32[(this.#statx + STATX_NLINK) >> 2] === 0) {
        n = native.readlinkat(this.#procfd, this.#decimal(fd), this.#link, 4352);
        if (n <= 0) return false;
        if (this.#endsDeleted(n)) n -= DELETED.length;
      }
    }
    let start = n;
    while (start > 0 && u8[this.#link + start - 1] !== 0x2f) start--;
    if (start === n || n - start > 255) return false;
    u8[this.#link + n] = 0;
    this.#parent = this.head[object] as number;
    this.#name = this.#link + start;
    this.#nameLength = n - start;
    return true;
  }

  /** Whether the path just read, of `n` bytes, ends with what d_path() adds. */
  #endsDeleted(n: number): boolean {
    return n > DELETED.length && matches(this.#link + n - DELETED.length, DELETED);
  }

  /** A watched node on a file system, 0 when there is none. */
  #near(low: number, high: number): number {
    const { table } = this;
    const systems = this.#systems;
    for (let i = 0; i < systems.length; i += 3) {
      if (systems[i] !== low || systems[i + 1] !== high) continue;
      if (table.find(systems[i + 2] as number) !== 0) return systems[i + 2] as number;
      // The watch of that one has ended, and its node may be forgotten: another one.
      for (let slot = 1; slot < table.top; slot++) {
        const key = (table.object[slot] as number) * KEY_WORDS;
        if (table.nodeid[slot] === 0 || this.#keys[key] !== low || this.#keys[key + 1] !== high) continue;
        systems[i + 2] = table.nodeid[slot] as number;
        return systems[i + 2] as number;
      }
    }
    return 0;
  }

  #system(low: number, high: number, nodeid: number): void {
    const systems = this.#systems;
    for (let i = 0; i < systems.length; i += 3) {
      if (systems[i] !== low || systems[i + 1] !== high) continue;
      if (this.table.find(systems[i + 2] as number) === 0) systems[i + 2] = nodeid;
      return;
    }
    systems.push(low, high, nodeid);
  }

  /**
   * Searches the watched directories for a directory by its handle: what is left to an unprivileged process. Every entry's inode number is
   * compared with the words of the handle first (file systems put it there), then the handle itself. What was found is remembered and checked before use.
   */
  #scan(info: number, low: number, high: number): boolean {
    const table = this.table;
    const place = hashKey(u32, (info + Info.fsid) >> 2) & (SCAN_CACHE - 1);
    const before = table.find(this.#scanned[place] as number);
    if (before !== 0) {
      const fd = this.nodes.fd(table.nodeid[before] as number);
      let length = 0;
      while (length < 255 && this.#scannedNames[place * 256 + length] !== 0) length++;
      for (let i = 0; i <= length; i++) u8[this.#link + i] = this.#scannedNames[place * 256 + i] as number;
      if (fd >= 0 && this.#isHandle(fd, this.#link, info)) return this.#foundIn(before, this.#link, length);
    }
    let left = SCAN_ENTRIES;
    for (let slot = 1; slot < table.top && left > 0; slot++) {
      if (table.nodeid[slot] === 0 || table.directory[slot] === 0 || ((table.mask[slot] as number) & FS_EVENT_ON_CHILD) === 0) continue;
      const key = (table.object[slot] as number) * KEY_WORDS;
      if (this.#keys[key] !== low || this.#keys[key + 1] !== high) continue;
      const path = this.nodes.fd(table.nodeid[slot] as number);
      if (path < 0) continue;
      const fd = native.reopen(this.#procfd, path, O_DIRECTORY);
      if (fd < 0) continue;
      const name = this.#search(fd, info, left);
      left -= this.#looked;
      native.close(fd);
      if (name === 0) continue;
      let length = 0;
      while (length < 255 && u8[name + length] !== 0) length++;
      this.#scanned[place] = table.nodeid[slot] as number;
      for (let i = 0; i < length; i++) this.#scannedNames[place * 256 + i] = u8[name + i] as number;
      this.#scannedNames[place * 256 + length] = 0;
      return this.#foundIn(slot, name, length);
    }
    return false;
  }

  #looked = 0;

  /** The name (arena offset) in an open directory of the directory that `info` names, or 0. */
  #search(fd: number, info: number, most: number): number {
    this.#looked = 1;
    for (;;) {
      const n = native.getdents64(fd, this.#dents, 32 << 10);
      if (n <= 0) return 0;
      // struct linux_dirent64 { u64 d_ino; s64 d_off; u16 d_reclen; u8 d_type; char d_name[]; }
      for (let at = this.#dents; at < this.#dents + n; at += u16[(at + 16) >> 1] as number) {
        if (++this.#looked > most) return 0;
        const type = u8[at + 18];
        if ((type === DT_DIR || type === DT_UNKNOWN) && this.#hasWord(info, u32[at >> 2] as number) && this.#isHandle(fd, at + 19, info))
          return at + 19;
      }
    }
  }

  #hasWord(info: number, word: number): boolean {
    const from = (info + Info.handleData) >> 2;
    const to = from + ((u32[(info + Info.handleBytes) >> 2] as number) >> 2);
    for (let i = from; i < to; i++) if (u32[i] === word) return true;
    return false;
  }

  /** Whether `name` in a directory is what `info` names. */
  #isHandle(fd: number, name: number, info: number): boolean {
    const handle = this.#key + 8;
    if (native.nameToHandle(fd, name, this.#handleFlags, handle) < 0) return false;
    const words = keyWords(u32, (info + Info.fsid) >> 2) - 2;
    for (let i = 0; i < words; i++) if (u32[(handle >> 2) + i] !== u32[((info + Info.handle) >> 2) + i]) return false;
    return true;
  }

  #foundIn(slot: number, name: number, length: number): boolean {
    this.#parent = this.head[this.table.object[slot] as number] as number;
    this.#name = name;
    this.#nameLength = length;
    return length > 0;
  }

  /** A descriptor's number as a name below /proc/self/fd. */
  #decimal(fd: number): number {
    let at = this.#digits + 15;
    u8[at] = 0;
    do {
      u8[--at] = 0x30 + (fd % 10);
      fd = (fd / 10) | 0;
    } while (fd > 0);
    return at;
  }
}

const EPERM = 1;
const DELETED = Buffer.from(' (deleted)');

/** What this process can have, or -errno of fanotify_init(2). A mark decides about a file system, see {@link openWatcher}. */
export function fanotifyAbility(directory: number, procfd: number): FanotifyAbility | number {
  let error = 0;
  for (const report of [FAN_REPORT_DFID_NAME_TARGET, FAN_REPORT_DFID_NAME | FAN_REPORT_FID]) {
    const fd = native.fanotifyInit(FAN_CLOEXEC | FAN_NONBLOCK | report, 0);
    if (fd < 0) {
      error = fd;
      continue;
    }
    const name = cString(String(directory));
    error = native.fanotifyMark(fd, FAN_MARK_ADD, (FS_CREATE | FS_ISDIR) >>> 0, 0, procfd, name);
    const rename = error === 0 && native.fanotifyMark(fd, FAN_MARK_ADD, (FS_RENAME | FS_ISDIR) >>> 0, 0, procfd, name) === 0;
    native.close(fd);
    return error < 0 ? error : { report, rename };
  }
  return error;
}

function nameAt(info: number): number {
  return info + Info.handleData + (u32[(info + Info.handleBytes) >> 2] as number);
}

function nameLength(info: number, name: number): number {
  const end = info + (u16[(info + Info.len) >> 1] as number);
  let at = name;
  while (at < end && u8[at] !== 0) at++;
  return at - name;
}

/** Whether the name is ".", which fanotify gives a directory itself. */
function isDot(info: number): boolean {
  const name = nameAt(info);
  return u8[name] === DOT && u8[name + 1] === 0;
}

function matches(at: number, bytes: Uint8Array): boolean {
  for (let i = 0; i < bytes.length; i++) if (u8[at + i] !== bytes[i]) return false;
  return true;
}

/** Words of a key at `words[at]`. The kernel's handles have whole words (`fanotify_encode_fh()`). */
function keyWords(words: Uint32Array, at: number): number {
  const n = 4 + (((words[at + 2] as number) + 3) >>> 2);
  return n > KEY_WORDS ? KEY_WORDS : n;
}

function hashKey(words: Uint32Array, at: number): number {
  const n = keyWords(words, at);
  let h = 0;
  for (let i = 0; i < n; i++) h = mix(h ^ (words[at + i] as number)) + 0x9e3779b9;
  return h >>> 0;
}
