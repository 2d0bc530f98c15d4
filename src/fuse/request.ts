/**
 * One request: copied out of guest memory, checked, and then read field by field from the copy.
 * The guest can rewrite its memory while we look, so nothing here looks at it twice.
 */
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import type { Caller } from '../fs/filesystem.js';
import {
  Errno,
  EXT_GROUPS,
  EXT_MAX_SECCTX,
  ExtHeader,
  InHeader,
  NAME_MAX,
  PATH_MAX,
  recordAlign,
  Secctx,
  SuppGroups,
  WriteIn,
  XATTR_NAME_MAX,
  XATTR_SIZE_MAX,
} from './abi.js';
import type { Session } from './init.js';

/** One descriptor chain, in the words of vectored I/O. The server reads it only during the call it is given to. */
export interface Chain {
  /** Arena offset of the readable `struct iovec` (16 bytes each, addresses of this process), the request. */
  iov: number;
  readableCount: number;
  /** Sum of their lengths. */
  readableBytes: number;
  /** Arena offset of the writable `struct iovec`: the room for the reply. */
  writableIov: number;
  writableCount: number;
  writableBytes: number;
}

/** Kinds of strings in a request; each has its own limits. */
export const NameKind = {
  none: 0,
  /** A directory entry: 1 to 255 bytes, no '/', not "." or "..". */
  entry: 1,
  /** As entry, and "." and ".." too: LOOKUP alone, for export support. */
  lookup: 2,
  /** Name of an extended attribute: 1 to 255 bytes. */
  xattr: 3,
  /** Target of a symbolic link: 1 to 4095 bytes. */
  target: 4,
  /** Anything: TMPFILE carries the name "/" of a dentry that has none yet (`vfs_tmpfile()`). */
  ignored: 5,
} as const;

/** What may follow the fixed part and the names. */
export const Tail = {
  /** Nothing after names; without names more is ignored (a later minor version may lengthen a structure). */
  none: 0,
  /** Extensions of a create-type request. */
  extensions: 1,
  /** Data that the handler checks. */
  data: 2,
} as const;

/** An id that no file system hands out: what a number above 2^53 becomes, as those are not exact. */
export const UNKNOWN_ID = Number.MAX_SAFE_INTEGER;

const TWO_32 = 4294967296;
/** A high half from here on makes a number that is not exact. */
const EXACT_HIGH = 0x200000;

/**
 * The longest request but WRITE: SETXATTR with a value of 64 KiB. The rest is for BATCH_FORGET, which has no limit of its own
 * (8000 nodes here; the virtio-fs driver sends FORGET alone).
 */
export const REQUEST_MAX = 128 << 10;
/** Requests up to this size are copied as a whole before the opcode is known: nearly all (RENAME2 with two names of 255 bytes has 568). */
const FIRST_COPY = 640;
/** Of a longer one, what a WRITE has before its data. */
const WRITE_COPY = InHeader.bytes + WriteIn.bytes;

const copy = arenaAlloc(REQUEST_MAX + 64);
const args = copy + InHeader.bytes;
const u8 = arena.u8;
const u32 = arena.u32;

const SLASH = 0x2f;
const DOT = 0x2e;

/** The request under way. Numbers only, and one object for all requests. */
export class Request {
  opcode = 0;
  uniqueLow = 0;
  uniqueHigh = 0;
  nodeid = 0;
  /** Bytes after the header. */
  argumentBytes = 0;
  /** Arena offsets and lengths (without NUL) of the strings it carries. */
  name = 0;
  nameLength = 0;
  name2 = 0;
  name2Length = 0;
  /** What follows the fixed part and the names (aligned to 8 if these are extensions). */
  tail = 0;
  tailBytes = 0;

  /**
   * Copies the header and, when the request is short, all of it.
   * @returns 0, or -EINVAL when there is no whole header or its length is not that of the chain. Linux always sends equal
   *   lengths (`virtio_fs_enqueue_req()`); two lengths that differ would leave open which bytes are the request.
   */
  begin(chain: Chain): number {
    this.nameLength = 0;
    this.name2Length = 0;
    this.tailBytes = 0;
    const bytes = chain.readableBytes;
    if (bytes < InHeader.bytes) {
      // Nobody can be answered but by the part of the header that is there.
      for (let i = copy >> 2; i < args >> 2; i++) u32[i] = 0;
    }
    const wanted = bytes > FIRST_COPY ? WRITE_COPY : bytes;
    return this.#header(bytes, wanted, native.gather(chain.iov, chain.readableCount, copy, wanted));
  }

  /** Whether `begin` did not copy everything. */
  get truncated(): boolean {
    return InHeader.bytes + this.argumentBytes > FIRST_COPY;
  }

  /**
   * Copies the whole request anew; the first copy is forgotten, so that a guest that has changed it in between is only judged
   * by this one.
   * @returns 0, -E2BIG above {@link REQUEST_MAX}, -EINVAL when the header is another one now.
   */
  complete(chain: Chain): number {
    const bytes = chain.readableBytes;
    if (bytes > REQUEST_MAX) return -Errno.E2BIG;
    const opcode = this.opcode;
    const error = this.#header(bytes, bytes, native.gather(chain.iov, chain.readableCount, copy, bytes));
    return error === 0 && this.opcode !== opcode ? -Errno.EINVAL : error;
  }

  #header(bytes: number, wanted: number, got: number): number {
    const h = copy >> 2;
    this.opcode = u32[h + (InHeader.opcode >> 2)] as number;
    this.uniqueLow = u32[h + (InHeader.unique >> 2)] as number;
    this.uniqueHigh = u32[h + (InHeader.unique >> 2) + 1] as number;
    const high = u32[h + (InHeader.nodeid >> 2) + 1] as number;
    this.nodeid = high >= EXACT_HIGH ? UNKNOWN_ID : (u32[h + (InHeader.nodeid >> 2)] as number) + high * TWO_32;
    this.argumentBytes = bytes - InHeader.bytes;
    return bytes >= InHeader.bytes && got === wanted && u32[h] === bytes ? 0 : -Errno.EINVAL;
  }

  /** Who asks, as the header says it. */
  caller(caller: Caller): void {
    const h = copy >> 2;
    caller.uid = u32[h + (InHeader.uid >> 2)] as number;
    caller.gid = u32[h + (InHeader.gid >> 2)] as number;
    caller.pid = u32[h + (InHeader.pid >> 2)] as number;
    caller.supplementaryGid = -1;
    caller.securityContexts = 0;
    caller.securityContextCount = 0;
    caller.securityContextBytes = 0;
  }

  /**
   * Checks the sizes and finds the strings of a request with `fixed` bytes of arguments before them.
   * @returns 0 or -errno.
   */
  decode(fixed: number, first: number, second: number, tail: number): number {
    const end = args + this.argumentBytes;
    this.tail = args + fixed;
    if (this.tail > end) return -Errno.EINVAL;
    if (first !== NameKind.none) {
      this.name = this.tail;
      let length = scan(this.name, end, first);
      if (length < 0) return length;
      this.nameLength = length;
      this.tail += length + 1;
      if (second !== NameKind.none) {
        this.name2 = this.tail;
        length = scan(this.name2, end, second);
        if (length < 0) return length;
        this.name2Length = length;
        this.tail += length + 1;
      }
      if (tail === Tail.none && this.tail !== end) return -Errno.EINVAL;
    }
    this.tailBytes = end - this.tail;
    return 0;
  }

  /** A u32 argument. `offset` is below the fixed size that `decode` checked, here and below. */
  u32(offset: number): number {
    return u32[(args + offset) >> 2] as number;
  }

  /** A u64 argument; from 2^53 on the number is not exact. */
  u64(offset: number): number {
    const i = (args + offset) >> 2;
    return (u32[i] as number) + (u32[i + 1] as number) * TWO_32;
  }

  /** An s64 argument: offsets are signed, and only the high half tells 2^63 - 1 from 2^63 (both round to the same number). */
  s64(offset: number): number {
    const i = (args + offset) >> 2;
    return (u32[i] as number) + ((u32[i + 1] as number) | 0) * TWO_32;
  }

  /** A nodeid or file handle; {@link UNKNOWN_ID} when it is no exact number. */
  id(offset: number): number {
    const i = (args + offset) >> 2;
    const high = u32[i + 1] as number;
    return high >= EXACT_HIGH ? UNKNOWN_ID : (u32[i] as number) + high * TWO_32;
  }

  /** A u32 at `offset` of the tail, which is aligned. The caller has checked `tailBytes`. */
  tailU32(offset: number): number {
    return u32[(this.tail + offset) >> 2] as number;
  }

  /** As {@link id}, in the tail. */
  tailId(offset: number): number {
    const i = (this.tail + offset) >> 2;
    const high = u32[i + 1] as number;
    return high >= EXACT_HIGH ? UNKNOWN_ID : (u32[i] as number) + high * TWO_32;
  }

  /**
   * Parses the extensions of a create-type request (`get_create_ext()` in fs/fuse/dir.c) into `caller`. They follow the names
   * without padding, so they are first moved to where their structures are aligned.
   * @returns 0, or -EINVAL: not negotiated, unknown, given twice, or lengths that contradict each other.
   */
  extensions(session: Session, caller: Caller): number {
    const bytes = this.tailBytes;
    // total_extlen came with 7.38; before it, what follows the names was the security context.
    if (session.minor >= 38 && (u32[(copy + InHeader.totalExtlen) >> 2] as number & 0xffff) * 8 !== bytes) return -Errno.EINVAL;
    if (bytes === 0) return 0;
    const start = recordAlign(this.tail);
    u8.copyWithin(start, this.tail, this.tail + bytes);
    this.tail = start;
    const end = start + bytes;
    let contexts = false;
    for (let at = start; at < end; ) {
      if (end - at < ExtHeader.bytes) return -Errno.EINVAL;
      const size = u32[(at + ExtHeader.size) >> 2] as number;
      const type = u32[(at + ExtHeader.type) >> 2] as number;
      if (size < ExtHeader.bytes || size > end - at) return -Errno.EINVAL;
      if (type <= EXT_MAX_SECCTX) {
        if (!session.securityContext || contexts || !securityContexts(at + ExtHeader.bytes, at + size, type)) return -Errno.EINVAL;
        contexts = true;
        if (type > 0) {
          caller.securityContexts = at + ExtHeader.bytes;
          caller.securityContextCount = type;
          caller.securityContextBytes = size - ExtHeader.bytes;
        }
      } else if (type === EXT_GROUPS) {
        // Linux sends the one group that matches the parent directory's.
        if (!session.createSuppGroup || caller.supplementaryGid !== -1) return -Errno.EINVAL;
        if (size < SuppGroups.groups + 4 || u32[(at + SuppGroups.nrGroups) >> 2] !== 1) return -Errno.EINVAL;
        caller.supplementaryGid = u32[(at + SuppGroups.groups) >> 2] as number;
      } else return -Errno.EINVAL;
      at += recordAlign(size);
    }
    return 0;
  }
}

/** Length of the NUL-terminated string that starts at `from`, or -errno: no NUL before `end`, or not what `kind` allows. */
function scan(from: number, end: number, kind: number): number {
  const limit = Math.min(end, from + PATH_MAX);
  let at = from;
  let slash = false;
  for (; at < limit; at++) {
    const c = u8[at] as number;
    if (c === 0) break;
    if (c === SLASH) slash = true;
  }
  if (at === limit) return limit === end ? -Errno.EINVAL : -Errno.ENAMETOOLONG;
  const length = at - from;
  switch (kind) {
    case NameKind.entry:
    case NameKind.lookup:
      if (length === 0 || slash) return -Errno.EINVAL;
      if (length > NAME_MAX) return -Errno.ENAMETOOLONG;
      if (kind === NameKind.entry && u8[from] === DOT && (length === 1 || (length === 2 && u8[from + 1] === DOT))) return -Errno.EINVAL;
      return length;
    case NameKind.xattr:
      return length === 0 || length > XATTR_NAME_MAX ? -Errno.ERANGE : length; // as setxattr(2) answers
    case NameKind.target:
      return length === 0 ? -Errno.ENOENT : length; // as symlink(2) answers
    default:
      return length;
  }
}

/** Whether `count` records (fuse_secctx, name, NUL, context) lie in [at, end). */
function securityContexts(at: number, end: number, count: number): boolean {
  for (let i = 0; i < count; i++) {
    if (end - at < Secctx.bytes) return false;
    const size = u32[(at + Secctx.size) >> 2] as number;
    if (size > XATTR_SIZE_MAX) return false;
    const name = at + Secctx.bytes;
    const length = scan(name, end, NameKind.xattr);
    if (length < 0) return false;
    const after = name + length + 1 + size;
    if (after > end) return false;
    at = recordAlign(after);
  }
  return true;
}
