/** Structures of the FUSE ABI, built and taken apart for tests: what {@link FuseClient} sends and what it gets. */
import {
  Attr,
  AttrOut,
  CopyFileRangeIn,
  Dirent,
  Direntplus,
  EntryOut,
  EXT_GROUPS,
  ExtHeader,
  FSYNC_FDATASYNC,
  FsyncIn,
  LkIn,
  Opcode,
  OpenOut,
  OutHeader,
  ReadIn,
  ReleaseIn,
  recordAlign,
  Secctx,
  SetattrIn,
  SetattrValid,
  STATX_NSEC,
  Statx,
  StatxOut,
} from '../../src/fuse/abi.js';

/** A name or value: bytes where it is no UTF-8. */
export type Name = string | Uint8Array;
/** A u64 of the ABI. Results that are always small (nodeid, fh, sizes) are plain numbers. */
export type U64 = number | bigint;

export interface Time {
  sec: bigint;
  nsec: number;
}

export interface Attributes {
  ino: bigint;
  size: number;
  blocks: number;
  atime: Time;
  mtime: Time;
  ctime: Time;
  mode: number;
  nlink: number;
  uid: number;
  gid: number;
  rdev: number;
  blksize: number;
  /** FUSE_ATTR_*. */
  flags: number;
}

export interface EntryReply {
  /** 0 in a negative entry. */
  nodeid: number;
  generation: bigint;
  /** Seconds, with their fraction. */
  entryValid: number;
  attrValid: number;
  attr: Attributes;
}

export interface OpenReply {
  fh: number;
  /** FOPEN_*. */
  openFlags: number;
}

export interface DirectoryEntry {
  ino: bigint;
  /** Where the next READDIR goes on. */
  offset: bigint;
  type: number;
  name: string;
  /** The name's bytes. */
  rawName: Buffer;
  /** READDIRPLUS only. */
  entry?: EntryReply;
}

export interface SetAttributes {
  mode?: number;
  uid?: number;
  gid?: number;
  size?: U64;
  atime?: Time | 'now';
  mtime?: Time | 'now';
  ctime?: Time;
  fh?: number;
  lockOwner?: U64;
  killSuidgid?: boolean;
}

export interface Lock {
  start: U64;
  /** The last byte, 2^63 - 1 for the end of the file. */
  end: U64;
  /** F_RDLCK 0, F_WRLCK 1, F_UNLCK 2. */
  type: number;
  pid: number;
}

/** A reply as it came. */
export interface Reply {
  /** 0 or -errno. */
  error: number;
  unique: bigint;
  body: Buffer;
}

export interface StatxReply {
  attrValid: number;
  mask: number;
  blksize: number;
  attributes: bigint;
  nlink: number;
  uid: number;
  gid: number;
  mode: number;
  ino: bigint;
  size: bigint;
  blocks: bigint;
  atime: Time;
  btime: Time;
  ctime: Time;
  mtime: Time;
  rdevMajor: number;
  rdevMinor: number;
  devMajor: number;
  devMinor: number;
}

export interface Statistics {
  blocks: bigint;
  bfree: bigint;
  bavail: bigint;
  files: bigint;
  ffree: bigint;
  bsize: number;
  namelen: number;
  frsize: number;
}

// --- building ---

/** Extension FUSE_EXT_GROUPS: the group that the new object's directory needs. */
export function suppGroupExtension(gid: number): Buffer {
  return new Struct(16).u32(ExtHeader.size, 16).u32(ExtHeader.type, EXT_GROUPS).u32(8, 1).u32(12, gid).bytes;
}

/** Extension fuse_secctx_header with these contexts. */
export function securityContextExtension(contexts: readonly { name: string; value: Uint8Array }[]): Buffer {
  const parts = contexts.map(({ name, value }) => {
    const part = Buffer.alloc(recordAlign(Secctx.bytes + name.length + 1 + value.length));
    part.writeUInt32LE(value.length, Secctx.size);
    part.write(name, Secctx.bytes);
    part.set(value, Secctx.bytes + name.length + 1);
    return part;
  });
  const size = parts.reduce<number>((sum, part) => sum + part.length, ExtHeader.bytes);
  return Buffer.concat([new Struct(ExtHeader.bytes).u32(ExtHeader.size, size).u32(ExtHeader.type, parts.length).bytes, ...parts]);
}

/** A structure of the ABI, zeroed, filled by offset. */
export class Struct {
  readonly bytes: Buffer;
  constructor(size: number) {
    this.bytes = Buffer.alloc(size);
  }
  u16(offset: number, value: number): this {
    this.bytes.writeUInt16LE(value, offset);
    return this;
  }
  u32(offset: number, value: number): this {
    this.bytes.writeUInt32LE(value >>> 0, offset);
    return this;
  }
  u64(offset: number, value: U64): this {
    this.bytes.writeBigUInt64LE(BigInt.asUintN(64, BigInt(value)), offset);
    return this;
  }
  time(secOffset: number, nsecOffset: number, time: Time): this {
    return this.u64(secOffset, time.sec).u32(nsecOffset, time.nsec);
  }
}

/** A name with its NUL. */
export function cName(name: Name): Buffer {
  return Buffer.concat([Buffer.from(name as string), Buffer.alloc(1)]);
}

/** fuse_setattr_in with exactly these fields valid. */
export function setattrIn(set: SetAttributes): Buffer {
  const body = new Struct(SetattrIn.bytes);
  let valid = 0;
  const u32 = (bit: number, offset: number, value: number | undefined) => {
    if (value === undefined) return;
    valid |= bit;
    body.u32(offset, value);
  };
  const u64 = (bit: number, offset: number, value: U64 | undefined) => {
    if (value === undefined) return;
    valid |= bit;
    body.u64(offset, value);
  };
  const time = (bit: number, now: number, sec: number, nsec: number, value: Time | 'now' | undefined) => {
    if (value === undefined) return;
    valid |= value === 'now' ? bit | now : bit;
    if (value !== 'now') body.time(sec, nsec, value);
  };
  u32(SetattrValid.MODE, SetattrIn.mode, set.mode);
  u32(SetattrValid.UID, SetattrIn.uid, set.uid);
  u32(SetattrValid.GID, SetattrIn.gid, set.gid);
  u64(SetattrValid.SIZE, SetattrIn.size, set.size);
  u64(SetattrValid.FH, SetattrIn.fh, set.fh);
  u64(SetattrValid.LOCKOWNER, SetattrIn.lockOwner, set.lockOwner);
  time(SetattrValid.ATIME, SetattrValid.ATIME_NOW, SetattrIn.atime, SetattrIn.atimensec, set.atime);
  time(SetattrValid.MTIME, SetattrValid.MTIME_NOW, SetattrIn.mtime, SetattrIn.mtimensec, set.mtime);
  time(SetattrValid.CTIME, 0, SetattrIn.ctime, SetattrIn.ctimensec, set.ctime);
  if (set.killSuidgid === true) valid |= SetattrValid.KILL_SUIDGID;
  return body.u32(SetattrIn.valid, valid).bytes;
}

export function readIn(fh: number, offset: U64, size: number, options: { flags?: number; readFlags?: number; lockOwner?: U64 }): Buffer {
  return new Struct(ReadIn.bytes)
    .u64(ReadIn.fh, fh)
    .u64(ReadIn.offset, offset)
    .u32(ReadIn.size, size)
    .u32(ReadIn.readFlags, options.readFlags ?? 0)
    .u64(ReadIn.lockOwner, options.lockOwner ?? 0)
    .u32(ReadIn.flags, options.flags ?? 0).bytes;
}

export function releaseIn(fh: number, options: { flags?: number; releaseFlags?: number; lockOwner?: U64 }): Buffer {
  return new Struct(ReleaseIn.bytes)
    .u64(ReleaseIn.fh, fh)
    .u32(ReleaseIn.flags, options.flags ?? 0)
    .u32(ReleaseIn.releaseFlags, options.releaseFlags ?? 0)
    .u64(ReleaseIn.lockOwner, options.lockOwner ?? 0).bytes;
}

export function fsyncIn(fh: number, dataOnly: boolean): Buffer {
  return new Struct(FsyncIn.bytes).u64(FsyncIn.fh, fh).u32(FsyncIn.flags, dataOnly ? FSYNC_FDATASYNC : 0).bytes;
}

export function lockIn(fh: number, owner: U64, lock: Lock, flags: number): Buffer {
  return new Struct(LkIn.bytes)
    .u64(LkIn.fh, fh)
    .u64(LkIn.owner, owner)
    .u64(LkIn.start, lock.start)
    .u64(LkIn.end, lock.end)
    .u32(LkIn.type, lock.type)
    .u32(LkIn.pid, lock.pid)
    .u32(LkIn.flags, flags).bytes;
}

export function copyIn(
  from: { fh: number; offset: U64 },
  to: { nodeid: number; fh: number; offset: U64 },
  length: U64,
  flags: number,
): Buffer {
  return new Struct(CopyFileRangeIn.bytes)
    .u64(CopyFileRangeIn.fhIn, from.fh)
    .u64(CopyFileRangeIn.offIn, from.offset)
    .u64(CopyFileRangeIn.nodeidOut, to.nodeid)
    .u64(CopyFileRangeIn.fhOut, to.fh)
    .u64(CopyFileRangeIn.offOut, to.offset)
    .u64(CopyFileRangeIn.len, length)
    .u64(CopyFileRangeIn.flags, flags).bytes;
}

// --- decoding ---

export function decodeReply(bytes: Buffer): Reply {
  if (bytes.length < OutHeader.bytes) throw new Error(`a reply of ${bytes.length} bytes`);
  const length = bytes.readUInt32LE(OutHeader.len);
  if (length !== bytes.length) throw new Error(`a reply of ${bytes.length} bytes says it has ${length}`);
  return {
    error: bytes.readInt32LE(OutHeader.error),
    unique: bytes.readBigUInt64LE(OutHeader.unique),
    body: bytes.subarray(OutHeader.bytes),
  };
}

function decodeAttr(b: Buffer): Attributes {
  const time = (sec: number, nsec: number): Time => ({ sec: b.readBigInt64LE(sec), nsec: b.readUInt32LE(nsec) });
  return {
    ino: b.readBigUInt64LE(Attr.ino),
    size: Number(b.readBigUInt64LE(Attr.size)),
    blocks: Number(b.readBigUInt64LE(Attr.blocks)),
    atime: time(Attr.atime, Attr.atimensec),
    mtime: time(Attr.mtime, Attr.mtimensec),
    ctime: time(Attr.ctime, Attr.ctimensec),
    mode: b.readUInt32LE(Attr.mode),
    nlink: b.readUInt32LE(Attr.nlink),
    uid: b.readUInt32LE(Attr.uid),
    gid: b.readUInt32LE(Attr.gid),
    rdev: b.readUInt32LE(Attr.rdev),
    blksize: b.readUInt32LE(Attr.blksize),
    flags: b.readUInt32LE(Attr.flags),
  };
}

export function decodeEntry(b: Buffer): EntryReply {
  return {
    nodeid: Number(b.readBigUInt64LE(EntryOut.nodeid)),
    generation: b.readBigUInt64LE(EntryOut.generation),
    entryValid: seconds(b, EntryOut.entryValid, EntryOut.entryValidNsec),
    attrValid: seconds(b, EntryOut.attrValid, EntryOut.attrValidNsec),
    attr: decodeAttr(b.subarray(EntryOut.attr)),
  };
}

export function decodeAttrOut(b: Buffer): { attr: Attributes; attrValid: number } {
  return { attr: decodeAttr(b.subarray(AttrOut.attr)), attrValid: seconds(b, AttrOut.attrValid, AttrOut.attrValidNsec) };
}

export function decodeOpen(b: Buffer): OpenReply {
  return { fh: Number(b.readBigUInt64LE(OpenOut.fh)), openFlags: b.readUInt32LE(OpenOut.openFlags) };
}

export function decodeStatx(b: Buffer): StatxReply {
  const s = b.subarray(StatxOut.stat);
  const time = (at: number): Time => ({ sec: s.readBigInt64LE(at), nsec: s.readUInt32LE(at + STATX_NSEC) });
  return {
    attrValid: seconds(b, StatxOut.attrValid, StatxOut.attrValidNsec),
    mask: s.readUInt32LE(Statx.mask),
    blksize: s.readUInt32LE(Statx.blksize),
    attributes: s.readBigUInt64LE(Statx.attributes),
    nlink: s.readUInt32LE(Statx.nlink),
    uid: s.readUInt32LE(Statx.uid),
    gid: s.readUInt32LE(Statx.gid),
    mode: s.readUInt16LE(Statx.mode),
    ino: s.readBigUInt64LE(Statx.ino),
    size: s.readBigUInt64LE(Statx.size),
    blocks: s.readBigUInt64LE(Statx.blocks),
    atime: time(Statx.atime),
    btime: time(Statx.btime),
    ctime: time(Statx.ctime),
    mtime: time(Statx.mtime),
    rdevMajor: s.readUInt32LE(Statx.rdevMajor),
    rdevMinor: s.readUInt32LE(Statx.rdevMinor),
    devMajor: s.readUInt32LE(Statx.devMajor),
    devMinor: s.readUInt32LE(Statx.devMinor),
  };
}

export function decodeDirectory(b: Buffer, plus: boolean): DirectoryEntry[] {
  const entries: DirectoryEntry[] = [];
  for (let at = 0; at < b.length; ) {
    const dirent = at + (plus ? Direntplus.dirent : 0);
    const namelen = b.readUInt32LE(dirent + Dirent.namelen);
    const rawName = Buffer.from(b.subarray(dirent + Dirent.name, dirent + Dirent.name + namelen));
    if (rawName.length !== namelen) throw new Error('a directory entry beyond the reply');
    entries.push({
      ino: b.readBigUInt64LE(dirent + Dirent.ino),
      offset: b.readBigUInt64LE(dirent + Dirent.off),
      type: b.readUInt32LE(dirent + Dirent.type),
      name: rawName.toString(),
      rawName,
      ...(plus && { entry: decodeEntry(b.subarray(at)) }),
    });
    at += (plus ? Direntplus.dirent : 0) + recordAlign(Dirent.name + namelen);
  }
  return entries;
}

function seconds(b: Buffer, sec: number, nsec: number): number {
  return Number(b.readBigUInt64LE(sec)) + b.readUInt32LE(nsec) / 1e9;
}

export function opcodeName(opcode: number): string {
  return Object.entries(Opcode).find(([, code]) => code === opcode)?.[0] ?? `opcode ${opcode}`;
}
