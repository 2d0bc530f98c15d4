/**
 * Replies: encoders into one buffer, and the only two functions that write to the guest, `ok` and `error`.
 * Every encoder returns the length of the body it has made.
 */
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import type { DirectorySink, Entry, FileSystem, Lock, Opened } from '../fs/filesystem.js';
import {
  Attr,
  AttrOut,
  CopyFileRangeOut,
  Dirent,
  Direntplus,
  EntryOut,
  FsnotifyOut,
  FUSE_KERNEL_MINOR_VERSION,
  FUSE_KERNEL_VERSION,
  GetxattrOut,
  InitFlag,
  InitOut,
  IoctlOut,
  LkOut,
  LseekOut,
  OpenOut,
  OutHeader,
  recordAlign,
  STATX_BASIC_STATS,
  STATX_BTIME,
  STATX_NSEC,
  Statfs,
  StatfsOut,
  Statx,
  StatxOut,
  WriteOut,
} from './abi.js';
import { CONGESTION_THRESHOLD, MAX_BACKGROUND, MAX_PAGES, type Session } from './init.js';
import type { Chain } from './request.js';

/** The largest body: READDIR of as many bytes as Linux asks for with max_pages of 4 KiB. READ bodies never lie here. */
export const BODY_MAX = 1 << 20;

const header = arenaAlloc(OutHeader.bytes + BODY_MAX);
const body = header + OutHeader.bytes;
const u8 = arena.u8;
const u16 = arena.u16;

/** Of a mode (inode(7)). */
const S_IFMT = 0o170000;
const S_IFDIR = 0o040000;
const u32 = arena.u32;

const TWO_32 = 4294967296;

/** How long the guest may keep what a reply says. */
export interface Timeouts {
  /** Seconds; fractions count. */
  entryTimeout: number;
  attrTimeout: number;
  negativeTimeout: number;
  /** Attributes of files with several names, where they must not live as long as the others. */
  linkedAttrTimeout?: number;
}

/** The reply under way. */
export class Reply implements DirectorySink {
  /** Bytes of the guest's buffer after the header. */
  room = 0;
  /** Arena offset of the body, for handlers that have it written by the file system. */
  readonly body = body;

  #uniqueLow = 0;
  #uniqueHigh = 0;
  #iov = 0;
  #count = 0;

  /** Where the directory entries end, and where they must end. */
  #at = body;
  #end = body;
  /** A directory entry did not fit. */
  refused = false;

  readonly #fs: FileSystem;
  #entrySeconds = 0;
  #entryNsec = 0;
  #attrSeconds = 0;
  #attrNsec = 0;
  #linkedSeconds = 0;
  #linkedNsec = 0;
  #negativeSeconds = 0;
  #negativeNsec = 0;

  constructor(fs: FileSystem, timeouts: Timeouts) {
    this.#fs = fs;
    this.setTimeouts(timeouts);
  }

  /** Replies carry these timeouts from now on. */
  setTimeouts(timeouts: Readonly<Timeouts>): void {
    this.#entrySeconds = Math.floor(timeouts.entryTimeout);
    this.#entryNsec = nanoseconds(timeouts.entryTimeout);
    this.#attrSeconds = Math.floor(timeouts.attrTimeout);
    this.#attrNsec = nanoseconds(timeouts.attrTimeout);
    const linked = timeouts.linkedAttrTimeout ?? timeouts.attrTimeout;
    this.#linkedSeconds = Math.floor(linked);
    this.#linkedNsec = nanoseconds(linked);
    this.#negativeSeconds = Math.floor(timeouts.negativeTimeout);
    this.#negativeNsec = nanoseconds(timeouts.negativeTimeout);
  }

  /** The reply goes to the writable part of `chain`. */
  begin(chain: Chain, uniqueLow: number, uniqueHigh: number): void {
    this.to(chain.writableIov, chain.writableCount, chain.writableBytes, uniqueLow, uniqueHigh);
  }

  /** The reply goes to these iovecs, `bytes` in all. */
  to(iov: number, count: number, bytes: number, uniqueLow: number, uniqueHigh: number): void {
    this.#iov = iov;
    this.#count = count;
    this.room = bytes - OutHeader.bytes;
    this.#uniqueLow = uniqueLow;
    this.#uniqueHigh = uniqueHigh;
  }

  /**
   * Sends the header and `bytes` of body; with `inPlace` the body is in the guest's buffer already.
   * @returns the bytes of the guest's buffer in use. The opcode table and the handlers have made sure that they fit.
   */
  ok(bytes: number, inPlace: boolean): number {
    const length = OutHeader.bytes + bytes;
    return this.#send(0, length, inPlace ? OutHeader.bytes : length);
  }

  /**
   * Sends an error.
   * @param errno positive
   * @returns the bytes in use; 0 when not even a header fits, and no reply is possible.
   */
  error(errno: number): number {
    if (this.room < 0) return 0;
    return this.#send(-errno, OutHeader.bytes, OutHeader.bytes);
  }

  #send(error: number, length: number, copied: number): number {
    const h = header >> 2;
    u32[h] = length;
    u32[h + (OutHeader.error >> 2)] = error;
    u32[h + (OutHeader.unique >> 2)] = this.#uniqueLow;
    u32[h + (OutHeader.unique >> 2) + 1] = this.#uniqueHigh;
    native.scatter(this.#iov, this.#count, 0, header, copied);
    return length;
  }

  /** fuse_init_out. */
  init(session: Session): number {
    clear(body, InitOut.bytes);
    u32[(body + InitOut.major) >> 2] = FUSE_KERNEL_VERSION;
    u32[(body + InitOut.minor) >> 2] = FUSE_KERNEL_MINOR_VERSION;
    if (session.minor === 0) return InitOut.bytes;
    u32[(body + InitOut.maxReadahead) >> 2] = session.maxReadahead;
    u32[(body + InitOut.flags) >> 2] = session.flags;
    u16[(body + InitOut.maxBackground) >> 1] = MAX_BACKGROUND;
    u16[(body + InitOut.congestionThreshold) >> 1] = CONGESTION_THRESHOLD;
    u32[(body + InitOut.maxWrite) >> 2] = session.maxWrite;
    u32[(body + InitOut.timeGran) >> 2] = 1;
    u16[(body + InitOut.maxPages) >> 1] = (session.flags & InitFlag.MAX_PAGES) !== 0 ? MAX_PAGES : 0;
    u32[(body + InitOut.flags2) >> 2] = session.flags2;
    return InitOut.bytes;
  }

  /** fuse_entry_out of the file system's `entry` and `attr`. */
  entry(): number {
    this.#entryAt(body, this.#fs.entry);
    return EntryOut.bytes;
  }

  /** fuse_entry_out without a node: the guest may remember for a while that the name does not exist. */
  negativeEntry(): number {
    clear(body, EntryOut.bytes);
    u32[(body + EntryOut.entryValid) >> 2] = this.#negativeSeconds;
    u32[(body + EntryOut.entryValidNsec) >> 2] = this.#negativeNsec;
    return EntryOut.bytes;
  }

  /** Whether {@link negativeEntry} is wanted. */
  get negative(): boolean {
    return this.#negativeSeconds > 0 || this.#negativeNsec > 0;
  }

  /** fuse_attr_out of the file system's `attr`. */
  attr(): number {
    const i = body >> 2;
    const linked = isLinked(this.#fs.attr);
    u32[i] = linked ? this.#linkedSeconds : this.#attrSeconds;
    u32[i + 1] = 0;
    u32[i + (AttrOut.attrValidNsec >> 2)] = linked ? this.#linkedNsec : this.#attrNsec;
    u32[i + (AttrOut.dummy >> 2)] = 0;
    attributes(body + AttrOut.attr, this.#fs.attr, 0);
    return AttrOut.bytes;
  }

  /** fuse_statx_out of the file system's `attr`: device numbers and what else only the host can use stay out. */
  statx(): number {
    clear(body, StatxOut.bytes);
    const linked = isLinked(this.#fs.attr);
    u32[(body + StatxOut.attrValid) >> 2] = linked ? this.#linkedSeconds : this.#attrSeconds;
    u32[(body + StatxOut.attrValidNsec) >> 2] = linked ? this.#linkedNsec : this.#attrNsec;
    const to = (body + StatxOut.stat) >> 2;
    const from = this.#fs.attr >> 2;
    for (let i = 0; i < Statx.devMajor >> 2; i++) u32[to + i] = u32[from + i] as number;
    u32[to] = (u32[from] as number) & (STATX_BASIC_STATS | STATX_BTIME);
    return StatxOut.bytes;
  }

  /** fuse_open_out of the file system's `opened`. */
  open(): number {
    opened(body, this.#fs.opened);
    return OpenOut.bytes;
  }

  /** fuse_entry_out and fuse_open_out: CREATE and TMPFILE. */
  create(): number {
    this.#entryAt(body, this.#fs.entry);
    opened(body + EntryOut.bytes, this.#fs.opened);
    return EntryOut.bytes + OpenOut.bytes;
  }

  /** fuse_write_out. */
  written(bytes: number): number {
    u32[(body + WriteOut.size) >> 2] = bytes;
    u32[(body + WriteOut.padding) >> 2] = 0;
    return WriteOut.bytes;
  }

  /** fuse_copy_file_range_out. */
  copied(bytes: number): number {
    set64(body + CopyFileRangeOut.bytesCopied, bytes);
    return CopyFileRangeOut.bytes;
  }

  /** fuse_getxattr_out: the length of a value or list. */
  xattrSize(bytes: number): number {
    u32[(body + GetxattrOut.size) >> 2] = bytes;
    u32[(body + GetxattrOut.padding) >> 2] = 0;
    return GetxattrOut.bytes;
  }

  /** fuse_lseek_out. */
  position(offset: number): number {
    set64(body + LseekOut.offset, offset);
    return LseekOut.bytes;
  }

  /** fuse_lk_out. */
  lock(lock: Lock): number {
    const i = body >> 2;
    u32[i] = lock.startLow;
    u32[i + 1] = lock.startHigh;
    u32[i + (LkOut.end >> 2)] = lock.endLow;
    u32[i + (LkOut.end >> 2) + 1] = lock.endHigh;
    u32[i + (LkOut.type >> 2)] = lock.type;
    u32[i + (LkOut.pid >> 2)] = lock.pid;
    return LkOut.bytes;
  }

  /** fuse_ioctl_out before `bytes` of output that are in the buffer already. */
  ioctl(bytes: number): number {
    clear(body, IoctlOut.bytes);
    return IoctlOut.bytes + bytes;
  }

  /** fuse_kstatfs of the file system's `statfsBuffer`. */
  statfs(): number {
    clear(body, StatfsOut.bytes);
    const to = body >> 2;
    const from = this.#fs.statfsBuffer >> 2;
    // blocks, bfree, bavail, files and ffree are neighbours in the same order on both sides
    for (let i = 0; i < 10; i++) u32[to + i] = u32[from + (Statfs.blocks >> 2) + i] as number;
    u32[to + (StatfsOut.bsize >> 2)] = u32[from + (Statfs.bsize >> 2)] as number;
    u32[to + (StatfsOut.namelen >> 2)] = u32[from + (Statfs.namelen >> 2)] as number;
    u32[to + (StatfsOut.frsize >> 2)] = u32[from + (Statfs.frsize >> 2)] as number;
    return StatfsOut.bytes;
  }

  /** Ours: fuse_fsnotify_out. */
  watch(acceptedLow: number, acceptedHigh: number, supportedLow: number, supportedHigh: number): number {
    const i = body >> 2;
    u32[i] = acceptedLow;
    u32[i + 1] = acceptedHigh;
    u32[i + 2] = supportedLow;
    u32[i + 3] = supportedHigh;
    return FsnotifyOut.bytes;
  }

  /** Directory entries follow, at most `bytes` of them. */
  directory(bytes: number): void {
    this.#at = body;
    this.#end = body + Math.min(bytes, BODY_MAX);
    this.refused = false;
  }

  /** Length of the entries taken. */
  get directoryBytes(): number {
    return this.#at - body;
  }

  add(name: number, nameLength: number, inoLow: number, inoHigh: number, type: number, offsetLow: number, offsetHigh: number): boolean {
    const next = this.#at + recordAlign(Dirent.name + nameLength);
    if (next > this.#end) {
      this.refused = true;
      return false;
    }
    dirent(this.#at, next, name, nameLength, inoLow, inoHigh, type, offsetLow, offsetHigh);
    this.#at = next;
    return true;
  }

  fits(nameLength: number): boolean {
    if (this.#at + recordAlign(Direntplus.dirent + Dirent.name + nameLength) <= this.#end) return true;
    this.refused = true;
    return false;
  }

  addPlus(
    name: number,
    nameLength: number,
    inoLow: number,
    inoHigh: number,
    type: number,
    offsetLow: number,
    offsetHigh: number,
    known: boolean,
  ): boolean {
    if (!this.fits(nameLength)) return false;
    const at = this.#at;
    const next = at + recordAlign(Direntplus.dirent + Dirent.name + nameLength);
    if (known) this.#entryAt(at, this.#fs.entry);
    else clear(at, EntryOut.bytes);
    dirent(at + Direntplus.dirent, next, name, nameLength, inoLow, inoHigh, type, offsetLow, offsetHigh);
    this.#at = next;
    return true;
  }

  #entryAt(at: number, entry: Entry): void {
    const i = at >> 2;
    set64(at + EntryOut.nodeid, entry.nodeid);
    set64(at + EntryOut.generation, entry.generation);
    u32[i + (EntryOut.entryValid >> 2)] = this.#entrySeconds;
    u32[i + (EntryOut.entryValid >> 2) + 1] = 0;
    const linked = isLinked(this.#fs.attr);
    u32[i + (EntryOut.attrValid >> 2)] = linked ? this.#linkedSeconds : this.#attrSeconds;
    u32[i + (EntryOut.attrValid >> 2) + 1] = 0;
    u32[i + (EntryOut.entryValidNsec >> 2)] = this.#entryNsec;
    u32[i + (EntryOut.attrValidNsec >> 2)] = linked ? this.#linkedNsec : this.#attrNsec;
    attributes(at + EntryOut.attr, this.#fs.attr, entry.attrFlags);
    if (entry.volatile) clear(at + EntryOut.entryValid, EntryOut.attr - EntryOut.entryValid);
  }
}

/** Whether the `struct statx` at `from` is of a file with several names. */
function isLinked(from: number): boolean {
  return (u32[(from + Statx.nlink) >> 2] as number) > 1 && ((u16[(from + Statx.mode) >> 1] as number) & S_IFMT) !== S_IFDIR;
}

/** fuse_attr at `at` from the `struct statx` at `from`. */
function attributes(at: number, from: number, flags: number): void {
  const i = at >> 2;
  const s = from >> 2;
  copy64(i + (Attr.ino >> 2), s + (Statx.ino >> 2));
  copy64(i + (Attr.size >> 2), s + (Statx.size >> 2));
  copy64(i + (Attr.blocks >> 2), s + (Statx.blocks >> 2));
  copy64(i + (Attr.atime >> 2), s + (Statx.atime >> 2));
  copy64(i + (Attr.mtime >> 2), s + (Statx.mtime >> 2));
  copy64(i + (Attr.ctime >> 2), s + (Statx.ctime >> 2));
  u32[i + (Attr.atimensec >> 2)] = u32[s + ((Statx.atime + STATX_NSEC) >> 2)] as number;
  u32[i + (Attr.mtimensec >> 2)] = u32[s + ((Statx.mtime + STATX_NSEC) >> 2)] as number;
  u32[i + (Attr.ctimensec >> 2)] = u32[s + ((Statx.ctime + STATX_NSEC) >> 2)] as number;
  u32[i + (Attr.mode >> 2)] = u16[(from + Statx.mode) >> 1] as number;
  u32[i + (Attr.nlink >> 2)] = u32[s + (Statx.nlink >> 2)] as number;
  u32[i + (Attr.uid >> 2)] = u32[s + (Statx.uid >> 2)] as number;
  u32[i + (Attr.gid >> 2)] = u32[s + (Statx.gid >> 2)] as number;
  const major = u32[s + (Statx.rdevMajor >> 2)] as number;
  const minor = u32[s + (Statx.rdevMinor >> 2)] as number;
  u32[i + (Attr.rdev >> 2)] = (minor & 0xff) | (major << 8) | ((minor & ~0xff) << 12); // new_encode_dev()
  u32[i + (Attr.blksize >> 2)] = u32[s + (Statx.blksize >> 2)] as number;
  u32[i + (Attr.flags >> 2)] = flags;
}

/** fuse_dirent at `at`, ending at `next`. */
function dirent(
  at: number,
  next: number,
  name: number,
  nameLength: number,
  inoLow: number,
  inoHigh: number,
  type: number,
  offsetLow: number,
  offsetHigh: number,
): void {
  u32[(next - 8) >> 2] = 0; // the padding lies in the last 8 bytes
  u32[(next - 4) >> 2] = 0;
  const i = at >> 2;
  u32[i] = inoLow;
  u32[i + 1] = inoHigh;
  u32[i + (Dirent.off >> 2)] = offsetLow;
  u32[i + (Dirent.off >> 2) + 1] = offsetHigh;
  u32[i + (Dirent.namelen >> 2)] = nameLength;
  u32[i + (Dirent.type >> 2)] = type;
  const to = at + Dirent.name;
  for (let k = 0; k < nameLength; k++) u8[to + k] = u8[name + k] as number;
}

function opened(at: number, from: Opened): void {
  set64(at + OpenOut.fh, from.fh);
  u32[(at + OpenOut.openFlags) >> 2] = from.openFlags;
  u32[(at + OpenOut.backingId) >> 2] = 0;
}

function copy64(to: number, from: number): void {
  u32[to] = u32[from] as number;
  u32[to + 1] = u32[from + 1] as number;
}

function set64(at: number, value: number): void {
  const i = at >> 2;
  u32[i] = value;
  u32[i + 1] = value / TWO_32;
}

function clear(at: number, bytes: number): void {
  for (let i = at >> 2; i < (at + bytes) >> 2; i++) u32[i] = 0;
}

function nanoseconds(seconds: number): number {
  return Math.min(999_999_999, Math.round((seconds % 1) * 1e9));
}
