/**
 * The opcode table: one row per request, and the handlers it names. Decoding, size checks, names in logs and metric labels all
 * follow from it. A handler reads checked arguments, calls the file system, encodes the result: the same shape for every request.
 */
import { arena } from 'vhost-user-ts/native';
import { KEPT, NO_FH } from '../fs/filesystem.js';
import {
  AccessIn,
  AT_STATX_SYNC_TYPE,
  AttrOut,
  BatchForgetIn,
  BmapIn,
  CopyFileRangeIn,
  CopyFileRangeOut,
  CreateIn,
  EntryOut,
  Errno,
  FallocateIn,
  FlushIn,
  ForgetIn,
  ForgetOne,
  FSYNC_FDATASYNC,
  FsnotifyIn,
  FsnotifyOut,
  FsyncIn,
  FUSE_KERNEL_VERSION,
  GETATTR_FH,
  GetattrIn,
  GetxattrIn,
  InHeader,
  InitFlag,
  InitIn,
  InitOut,
  InterruptIn,
  IoctlIn,
  IoctlOut,
  LinkIn,
  LK_FLOCK,
  LkIn,
  LkOut,
  LseekIn,
  LseekOut,
  MkdirIn,
  MknodIn,
  OPEN_KILL_SUIDGID,
  Opcode,
  OpenIn,
  OpenOut,
  OutHeader,
  PATH_MAX,
  PollIn,
  ReadIn,
  ReadNotifyIn,
  ReleaseIn,
  RemovemappingIn,
  Rename2In,
  RenameIn,
  SetattrIn,
  SetattrValid,
  SetupmappingIn,
  SetxattrIn,
  STATX_BASIC_STATS,
  STATX_BTIME,
  StatfsOut,
  StatxIn,
  StatxOut,
  SyncfsIn,
  WriteIn,
  WriteOut,
  XATTR_SIZE_MAX,
} from './abi.js';
import { BODY_MAX, type Reply } from './reply.js';
import { NameKind, type Request, Tail } from './request.js';
import type { FuseServer } from './server.js';

/** A handler's result when the request has no reply. Below every -errno. */
export const NO_REPLY = -65536;

/**
 * Serves a decoded request.
 * @returns the length of the reply's body (≥ 0), -errno, {@link NO_REPLY} or PENDING; with `encode` in the row, the operation's
 *   count instead of a length.
 */
export type Handler = (server: FuseServer, request: Request, reply: Reply) => number;

/** One request. */
export interface Operation {
  readonly opcode: number;
  /** As in the kernel's header without FUSE_; in lower case the metric label. */
  readonly name: string;
  /** Bytes of fixed arguments. */
  readonly bytes: number;
  /** The same when FUSE_SETXATTR_EXT was agreed on. */
  readonly extendedBytes: number;
  readonly first: number;
  readonly second: number;
  readonly tail: number;
  /** Room that the body of a reply needs. Checked before the handler runs, so that no side effect is ever left unanswered. */
  readonly room: number;
  /** Has no reply, not even for an error. */
  readonly noReply: boolean;
  /** The body is data that the file system has put into the guest's buffer. */
  readonly inPlace: boolean;
  /** Makes the body of a count, at once or when an offloaded job has ended; null: the handler has made it. */
  readonly encode: ((reply: Reply, count: number) => number) | null;
  readonly handler: Handler;
  /** Index in {@link OPCODES}. */
  readonly slot: number;
}

type Row = Pick<Operation, 'opcode' | 'name' | 'bytes' | 'handler'> & Partial<Operation>;

/** No longer read than a READ of max_pages pages of 64 KiB, which arm64 guests have. */
const READ_MAX = 16 << 20;
/** Bytes that one COPY_FILE_RANGE copies at most: a count below PENDING, in whole pages. */
const COPY_MAX = 0x4000_0000 - 4096;
/** Where numbers stop to be exact, and offsets to be served: behind the end of every file. */
const OFFSET_END = 2 ** 53;
const OFFSET_MAX = OFFSET_END - 1;
const O_APPEND = 0x400;
const FALLOC_FL_PUNCH_HOLE = 2;
const SEEK_DATA = 3;
const SEEK_HOLE = 4;

const none = (): number => 0;
const written = (reply: Reply, bytes: number): number => reply.written(bytes);
const copied = (reply: Reply, bytes: number): number => reply.copied(bytes);
const unsupported: Handler = () => -Errno.ENOSYS;
const nothing: Handler = () => NO_REPLY;

const { entry, lookup: lookupName, xattr, target, ignored } = NameKind;
const { extensions, data } = Tail;

// biome-ignore format: a table reads best with one row per line
const ROWS: readonly Row[] = [
  // session
  { opcode: Opcode.INIT, name: 'INIT', bytes: InitIn.compatBytes, tail: data, room: InitOut.bytes, handler: init },
  { opcode: Opcode.DESTROY, name: 'DESTROY', bytes: 0, handler: destroy },
  { opcode: Opcode.INTERRUPT, name: 'INTERRUPT', bytes: InterruptIn.bytes, noReply: true, handler: interrupt },
  { opcode: Opcode.NOTIFY_REPLY, name: 'NOTIFY_REPLY', bytes: 0, noReply: true, handler: nothing },
  // nodes
  { opcode: Opcode.LOOKUP, name: 'LOOKUP', bytes: 0, first: lookupName, room: EntryOut.bytes, handler: lookup },
  { opcode: Opcode.FORGET, name: 'FORGET', bytes: ForgetIn.bytes, noReply: true, handler: forget },
  { opcode: Opcode.BATCH_FORGET, name: 'BATCH_FORGET', bytes: BatchForgetIn.bytes, tail: data, noReply: true, handler: batchForget },
  { opcode: Opcode.GETATTR, name: 'GETATTR', bytes: GetattrIn.bytes, room: AttrOut.bytes, handler: getattr },
  { opcode: Opcode.STATX, name: 'STATX', bytes: StatxIn.bytes, room: StatxOut.bytes, handler: statx },
  { opcode: Opcode.SETATTR, name: 'SETATTR', bytes: SetattrIn.bytes, room: AttrOut.bytes, handler: setattr },
  { opcode: Opcode.ACCESS, name: 'ACCESS', bytes: AccessIn.bytes, handler: access },
  { opcode: Opcode.STATFS, name: 'STATFS', bytes: 0, room: StatfsOut.bytes, handler: statfs },
  // names
  { opcode: Opcode.READLINK, name: 'READLINK', bytes: 0, room: 1, handler: readlink },
  { opcode: Opcode.SYMLINK, name: 'SYMLINK', bytes: 0, first: entry, second: target, tail: extensions, room: EntryOut.bytes, handler: symlink },
  { opcode: Opcode.MKNOD, name: 'MKNOD', bytes: MknodIn.bytes, first: entry, tail: extensions, room: EntryOut.bytes, handler: mknod },
  { opcode: Opcode.MKDIR, name: 'MKDIR', bytes: MkdirIn.bytes, first: entry, tail: extensions, room: EntryOut.bytes, handler: mkdir },
  { opcode: Opcode.UNLINK, name: 'UNLINK', bytes: 0, first: entry, handler: unlink },
  { opcode: Opcode.RMDIR, name: 'RMDIR', bytes: 0, first: entry, handler: rmdir },
  { opcode: Opcode.RENAME, name: 'RENAME', bytes: RenameIn.bytes, first: entry, second: entry, handler: rename },
  { opcode: Opcode.RENAME2, name: 'RENAME2', bytes: Rename2In.bytes, first: entry, second: entry, handler: rename2 },
  { opcode: Opcode.LINK, name: 'LINK', bytes: LinkIn.bytes, first: entry, room: EntryOut.bytes, handler: link },
  // files
  { opcode: Opcode.OPEN, name: 'OPEN', bytes: OpenIn.bytes, room: OpenOut.bytes, handler: open },
  { opcode: Opcode.CREATE, name: 'CREATE', bytes: CreateIn.bytes, first: entry, tail: extensions, room: EntryOut.bytes + OpenOut.bytes, handler: create },
  { opcode: Opcode.TMPFILE, name: 'TMPFILE', bytes: CreateIn.bytes, first: ignored, tail: extensions, room: EntryOut.bytes + OpenOut.bytes, handler: tmpfile },
  { opcode: Opcode.READ, name: 'READ', bytes: ReadIn.bytes, inPlace: true, handler: read },
  { opcode: Opcode.WRITE, name: 'WRITE', bytes: WriteIn.bytes, tail: data, room: WriteOut.bytes, encode: written, handler: write },
  { opcode: Opcode.FLUSH, name: 'FLUSH', bytes: FlushIn.bytes, encode: none, handler: flush },
  { opcode: Opcode.RELEASE, name: 'RELEASE', bytes: ReleaseIn.bytes, encode: none, handler: release },
  { opcode: Opcode.FSYNC, name: 'FSYNC', bytes: FsyncIn.bytes, encode: none, handler: fsync },
  { opcode: Opcode.FALLOCATE, name: 'FALLOCATE', bytes: FallocateIn.bytes, encode: none, handler: fallocate },
  { opcode: Opcode.LSEEK, name: 'LSEEK', bytes: LseekIn.bytes, room: LseekOut.bytes, handler: lseek },
  { opcode: Opcode.COPY_FILE_RANGE, name: 'COPY_FILE_RANGE', bytes: CopyFileRangeIn.bytes, room: WriteOut.bytes, encode: written, handler: copyFileRange },
  { opcode: Opcode.COPY_FILE_RANGE_64, name: 'COPY_FILE_RANGE_64', bytes: CopyFileRangeIn.bytes, room: CopyFileRangeOut.bytes, encode: copied, handler: copyFileRange },
  { opcode: Opcode.IOCTL, name: 'IOCTL', bytes: IoctlIn.bytes, tail: data, room: IoctlOut.bytes, handler: ioctl },
  { opcode: Opcode.SYNCFS, name: 'SYNCFS', bytes: SyncfsIn.bytes, encode: none, handler: syncfs },
  // directories
  { opcode: Opcode.OPENDIR, name: 'OPENDIR', bytes: OpenIn.bytes, room: OpenOut.bytes, handler: opendir },
  { opcode: Opcode.READDIR, name: 'READDIR', bytes: ReadIn.bytes, handler: readdir },
  { opcode: Opcode.READDIRPLUS, name: 'READDIRPLUS', bytes: ReadIn.bytes, handler: readdirplus },
  { opcode: Opcode.RELEASEDIR, name: 'RELEASEDIR', bytes: ReleaseIn.bytes, encode: none, handler: releasedir },
  { opcode: Opcode.FSYNCDIR, name: 'FSYNCDIR', bytes: FsyncIn.bytes, encode: none, handler: fsyncdir },
  // extended attributes
  { opcode: Opcode.SETXATTR, name: 'SETXATTR', bytes: SetxattrIn.compatBytes, extendedBytes: SetxattrIn.bytes, first: xattr, tail: data, handler: setxattr },
  { opcode: Opcode.GETXATTR, name: 'GETXATTR', bytes: GetxattrIn.bytes, first: xattr, handler: getxattr },
  { opcode: Opcode.LISTXATTR, name: 'LISTXATTR', bytes: GetxattrIn.bytes, handler: listxattr },
  { opcode: Opcode.REMOVEXATTR, name: 'REMOVEXATTR', bytes: 0, first: xattr, handler: removexattr },
  // file events (our extension)
  { opcode: Opcode.FSNOTIFY, name: 'FSNOTIFY', bytes: FsnotifyIn.bytes, room: FsnotifyOut.bytes, handler: fsnotify },
  { opcode: Opcode.READ_NOTIFY, name: 'READ_NOTIFY', bytes: ReadNotifyIn.bytes, handler: readNotify },
  // locks
  { opcode: Opcode.GETLK, name: 'GETLK', bytes: LkIn.bytes, room: LkOut.bytes, handler: getlk },
  { opcode: Opcode.SETLK, name: 'SETLK', bytes: LkIn.bytes, handler: setlk },
  { opcode: Opcode.SETLKW, name: 'SETLKW', bytes: LkIn.bytes, encode: none, handler: setlkw },
  // Known, and answered ENOSYS: the guest then does without and asks no more.
  { opcode: Opcode.BMAP, name: 'BMAP', bytes: BmapIn.bytes, handler: unsupported },
  { opcode: Opcode.POLL, name: 'POLL', bytes: PollIn.bytes, handler: unsupported },
  { opcode: Opcode.SETUPMAPPING, name: 'SETUPMAPPING', bytes: SetupmappingIn.bytes, handler: unsupported },
  { opcode: Opcode.REMOVEMAPPING, name: 'REMOVEMAPPING', bytes: RemovemappingIn.bytes, tail: data, handler: unsupported },
];

const UNKNOWN: Row = { opcode: 0, name: 'UNKNOWN', bytes: 0, handler: unsupported };

/** Completes the rows (all of one shape, which keeps the dispatch fast) and checks them against each other. */
export function buildOpcodes(rows: readonly Row[]): readonly Operation[] {
  const opcodes = new Set<number>();
  const names = new Set<string>();
  return [UNKNOWN, ...rows].map((row, slot) => {
    const operation: Operation = {
      opcode: row.opcode,
      name: row.name,
      bytes: row.bytes,
      extendedBytes: row.extendedBytes ?? row.bytes,
      first: row.first ?? NameKind.none,
      second: row.second ?? NameKind.none,
      tail: row.tail ?? Tail.none,
      room: row.room ?? 0,
      noReply: row.noReply ?? false,
      inPlace: row.inPlace ?? false,
      encode: row.encode ?? null,
      handler: row.handler,
      slot,
    };
    const wrong = (what: string): never => {
      throw new Error(`opcode table: ${row.name}: ${what}`);
    };
    if (opcodes.has(row.opcode)) wrong(`opcode ${row.opcode} is there twice`);
    if (names.has(row.name) || !/^[A-Z][A-Z0-9_]*$/.test(row.name)) wrong('a name that is no label, or there twice');
    if (operation.bytes % 4 !== 0 || operation.extendedBytes % 4 !== 0) wrong('arguments that are not whole words');
    if (operation.second !== NameKind.none && operation.first === NameKind.none) wrong('a second name without a first');
    if (operation.tail === Tail.extensions && operation.first === NameKind.none) wrong('extensions without a name');
    if (operation.noReply && operation.room > 0) wrong('room for a reply that there is not');
    opcodes.add(row.opcode);
    names.add(row.name);
    return operation;
  });
}

/** Every request, the unknown one first: metrics count by index (`slot`). */
export const OPCODES = buildOpcodes(ROWS);

const unknown = OPCODES[0] as Operation;
const DENSE = 64;
const dense: Operation[] = [];
const ours: Operation[] = [];
for (let i = 0; i < DENSE; i++) {
  dense.push(OPCODES.find((operation) => operation.opcode === i) ?? unknown);
  ours.push(OPCODES.find((operation) => operation.opcode === Opcode.FSNOTIFY + i) ?? unknown);
}

/** The row of an opcode as the guest sent it. */
export function operationOf(opcode: number): Operation {
  if (opcode < DENSE) return dense[opcode] as Operation;
  if (opcode >= Opcode.FSNOTIFY && opcode < Opcode.FSNOTIFY + DENSE) return ours[opcode - Opcode.FSNOTIFY] as Operation;
  return unknown;
}

// --- session ---

function init(server: FuseServer, q: Request, r: Reply): number {
  const major = q.u32(InitIn.major);
  if (major < FUSE_KERNEL_VERSION) {
    server.endSession();
    return -Errno.EPROTO;
  }
  if (major > FUSE_KERNEL_VERSION) {
    // The guest sends another INIT with the major version it reads here.
    server.endSession();
    return r.init(server.session);
  }
  let flags2 = 0;
  const flags = q.u32(InitIn.flags);
  if ((flags & InitFlag.INIT_EXT) !== 0) {
    if (q.argumentBytes < InitIn.flags2 + 4) return -Errno.EINVAL;
    flags2 = q.u32(InitIn.flags2);
  }
  const error = server.beginSession({ minor: q.u32(InitIn.minor), maxReadahead: q.u32(InitIn.maxReadahead), flags, flags2 });
  return error < 0 ? error : r.init(server.session);
}

function destroy(server: FuseServer): number {
  server.endSession();
  return 0;
}

// --- nodes ---

function lookup({ fs }: FuseServer, q: Request, r: Reply): number {
  const error = fs.lookup(q.nodeid, q.name, q.nameLength);
  if (error >= 0) return r.entry();
  return error === -Errno.ENOENT && r.negative ? r.negativeEntry() : error;
}

function forget({ fs }: FuseServer, q: Request): number {
  fs.forget(q.nodeid, q.u64(ForgetIn.nlookup));
  return NO_REPLY;
}

function batchForget({ fs }: FuseServer, q: Request): number {
  const bytes = q.u32(BatchForgetIn.count) * ForgetOne.bytes;
  if (bytes > q.tailBytes) return -Errno.EINVAL;
  for (let at = 0; at < bytes; at += ForgetOne.bytes) fs.forget(q.tailId(at + ForgetOne.nodeid), q.tailId(at + ForgetOne.nlookup));
  return NO_REPLY;
}

function getattr({ fs }: FuseServer, q: Request, r: Reply): number {
  const fh = (q.u32(GetattrIn.flags) & GETATTR_FH) !== 0 ? q.id(GetattrIn.fh) : NO_FH;
  const error = fs.getattr(q.nodeid, fh, 0, 0);
  return error < 0 ? error : r.attr();
}

function statx({ fs }: FuseServer, q: Request, r: Reply): number {
  const fh = (q.u32(StatxIn.flags) & GETATTR_FH) !== 0 ? q.id(StatxIn.fh) : NO_FH;
  const mask = q.u32(StatxIn.sxMask) & (STATX_BASIC_STATS | STATX_BTIME);
  const error = fs.getattr(q.nodeid, fh, q.u32(StatxIn.sxFlags) & AT_STATX_SYNC_TYPE, mask);
  return error < 0 ? error : r.statx();
}

function setattr({ fs, change }: FuseServer, q: Request, r: Reply): number {
  const valid = q.u32(SetattrIn.valid);
  change.valid = valid;
  change.fh = (valid & SetattrValid.FH) !== 0 ? q.id(SetattrIn.fh) : NO_FH;
  change.mode = q.u32(SetattrIn.mode);
  change.uid = q.u32(SetattrIn.uid);
  change.gid = q.u32(SetattrIn.gid);
  change.size = q.s64(SetattrIn.size);
  change.atime = q.s64(SetattrIn.atime);
  change.atimeNsec = q.u32(SetattrIn.atimensec);
  change.mtime = q.s64(SetattrIn.mtime);
  change.mtimeNsec = q.u32(SetattrIn.mtimensec);
  change.ctime = q.s64(SetattrIn.ctime);
  change.ctimeNsec = q.u32(SetattrIn.ctimensec);
  if ((valid & SetattrValid.SIZE) !== 0) {
    if (change.size < 0) return -Errno.EINVAL;
    if (change.size >= OFFSET_END) return -Errno.EFBIG;
  }
  const error = fs.setattr(q.nodeid, change);
  return error < 0 ? error : r.attr();
}

function access({ fs }: FuseServer, q: Request): number {
  return fs.access(q.nodeid, q.u32(AccessIn.mask));
}

function statfs({ fs }: FuseServer, q: Request, r: Reply): number {
  const error = fs.statfs(q.nodeid);
  return error < 0 ? error : r.statfs();
}

// --- names ---

function readlink({ fs }: FuseServer, q: Request, r: Reply): number {
  return fs.readlink(q.nodeid, r.body, Math.min(r.room, PATH_MAX - 1));
}

function symlink({ fs, session }: FuseServer, q: Request, r: Reply): number {
  let error = q.extensions(session, fs.caller);
  if (error === 0) error = fs.symlink(q.nodeid, q.name, q.name2);
  return error < 0 ? error : r.entry();
}

function mknod({ fs, session }: FuseServer, q: Request, r: Reply): number {
  let error = q.extensions(session, fs.caller);
  if (error === 0) error = fs.mknod(q.nodeid, q.name, q.u32(MknodIn.mode), q.u32(MknodIn.umask), q.u32(MknodIn.rdev));
  return error < 0 ? error : r.entry();
}

function mkdir({ fs, session }: FuseServer, q: Request, r: Reply): number {
  let error = q.extensions(session, fs.caller);
  if (error === 0) error = fs.mkdir(q.nodeid, q.name, q.u32(MkdirIn.mode), q.u32(MkdirIn.umask));
  return error < 0 ? error : r.entry();
}

function unlink({ fs }: FuseServer, q: Request): number {
  return fs.unlink(q.nodeid, q.name);
}

function rmdir({ fs }: FuseServer, q: Request): number {
  return fs.rmdir(q.nodeid, q.name);
}

function rename({ fs }: FuseServer, q: Request): number {
  return fs.rename(q.nodeid, q.name, q.id(RenameIn.newdir), q.name2, 0);
}

function rename2({ fs }: FuseServer, q: Request): number {
  return fs.rename(q.nodeid, q.name, q.id(Rename2In.newdir), q.name2, q.u32(Rename2In.flags));
}

function link({ fs }: FuseServer, q: Request, r: Reply): number {
  const error = fs.link(q.id(LinkIn.oldnodeid), q.nodeid, q.name);
  return error < 0 ? error : r.entry();
}

// --- files ---

function open({ fs }: FuseServer, q: Request, r: Reply): number {
  const error = fs.open(q.nodeid, q.u32(OpenIn.flags), (q.u32(OpenIn.openFlags) & OPEN_KILL_SUIDGID) !== 0);
  return error < 0 ? error : r.open();
}

function create({ fs, session }: FuseServer, q: Request, r: Reply): number {
  let error = q.extensions(session, fs.caller);
  if (error < 0) return error;
  const killPriv = (q.u32(CreateIn.openFlags) & OPEN_KILL_SUIDGID) !== 0;
  error = fs.create(q.nodeid, q.name, q.u32(CreateIn.flags), q.u32(CreateIn.mode), q.u32(CreateIn.umask), killPriv);
  return error < 0 ? error : r.create();
}

function tmpfile({ fs, session }: FuseServer, q: Request, r: Reply): number {
  let error = q.extensions(session, fs.caller);
  if (error === 0) error = fs.tmpfile(q.nodeid, q.u32(CreateIn.flags), q.u32(CreateIn.mode), q.u32(CreateIn.umask));
  return error < 0 ? error : r.create();
}

function read({ fs, chain }: FuseServer, q: Request, r: Reply): number {
  const size = q.u32(ReadIn.size);
  if (size > r.room || size > READ_MAX) return -Errno.EINVAL;
  const offset = q.s64(ReadIn.offset);
  if (offset < 0) return -Errno.EINVAL;
  return fs.read(q.nodeid, q.id(ReadIn.fh), Math.min(offset, OFFSET_MAX), size, chain.writableIov, chain.writableCount, OutHeader.bytes);
}

function write({ fs, chain, session }: FuseServer, q: Request): number {
  const size = q.u32(WriteIn.size);
  if (size !== q.tailBytes || size > session.maxWrite) return -Errno.EINVAL;
  const offset = q.s64(WriteIn.offset);
  if (offset < 0) return -Errno.EINVAL;
  if (offset >= OFFSET_END) return -Errno.EFBIG;
  const flags = q.u32(WriteIn.writeFlags) | (q.u32(WriteIn.flags) & O_APPEND);
  return fs.write(q.nodeid, q.id(WriteIn.fh), offset, size, flags, chain.iov, chain.readableCount, InHeader.bytes + WriteIn.bytes);
}

function flush({ fs, session }: FuseServer, q: Request): number {
  const result = fs.flush(q.nodeid, q.id(FlushIn.fh));
  if (session.posixLock) fs.unlockOwner(q.nodeid, q.u32(FlushIn.lockOwner), q.u32(FlushIn.lockOwner + 4));
  return result;
}

function release({ fs }: FuseServer, q: Request): number {
  return fs.release(q.nodeid, q.id(ReleaseIn.fh));
}

function fsync({ fs }: FuseServer, q: Request): number {
  return fs.fsync(q.nodeid, q.id(FsyncIn.fh), (q.u32(FsyncIn.flags) & FSYNC_FDATASYNC) !== 0);
}

function fallocate({ fs }: FuseServer, q: Request): number {
  const mode = q.u32(FallocateIn.mode);
  const offset = q.s64(FallocateIn.offset);
  let length = q.s64(FallocateIn.length);
  if (offset < 0 || length <= 0) return -Errno.EINVAL;
  if (offset + length > OFFSET_MAX) {
    // "Punch to the end" is asked for with the largest length there is; nothing else can reach that far.
    if ((mode & FALLOC_FL_PUNCH_HOLE) === 0 || offset >= OFFSET_MAX) return -Errno.EFBIG;
    length = OFFSET_MAX - offset;
  }
  return fs.fallocate(q.nodeid, q.id(FallocateIn.fh), offset, length, mode);
}

function lseek({ fs }: FuseServer, q: Request, r: Reply): number {
  const whence = q.u32(LseekIn.whence);
  const offset = q.s64(LseekIn.offset);
  if (offset >= OFFSET_END || offset <= -OFFSET_END) return whence === SEEK_DATA || whence === SEEK_HOLE ? -Errno.ENXIO : -Errno.EINVAL;
  const position = fs.lseek(q.nodeid, q.id(LseekIn.fh), offset, whence);
  return position < 0 ? position : r.position(position);
}

function copyFileRange({ fs }: FuseServer, q: Request): number {
  if (q.u32(CopyFileRangeIn.flags) !== 0 || q.u32(CopyFileRangeIn.flags + 4) !== 0) return -Errno.EINVAL;
  const offsetIn = q.s64(CopyFileRangeIn.offIn);
  const offsetOut = q.s64(CopyFileRangeIn.offOut);
  if (offsetIn < 0 || offsetOut < 0) return -Errno.EINVAL;
  if (offsetOut >= OFFSET_END) return -Errno.EFBIG;
  const length = Math.min(q.u64(CopyFileRangeIn.len), COPY_MAX); // a short copy is allowed, the guest asks again
  return fs.copyFileRange(
    q.id(CopyFileRangeIn.fhIn),
    Math.min(offsetIn, OFFSET_MAX),
    q.id(CopyFileRangeIn.nodeidOut),
    q.id(CopyFileRangeIn.fhOut),
    offsetOut,
    length,
  );
}

function ioctl({ fs }: FuseServer, q: Request, r: Reply): number {
  const inSize = q.u32(IoctlIn.inSize);
  const outSize = q.u32(IoctlIn.outSize);
  if (inSize > q.tailBytes || outSize > r.room - IoctlOut.bytes || outSize > BODY_MAX - IoctlOut.bytes) return -Errno.EINVAL;
  const at = r.body + IoctlOut.bytes;
  arena.u8.copyWithin(at, q.tail, q.tail + inSize);
  const n = fs.ioctl(q.nodeid, q.id(IoctlIn.fh), q.u32(IoctlIn.cmd), at, inSize, outSize);
  return n < 0 ? n : r.ioctl(n);
}

function syncfs({ fs }: FuseServer, q: Request): number {
  return fs.syncfs(q.nodeid);
}

// --- directories ---

function opendir({ fs }: FuseServer, q: Request, r: Reply): number {
  const error = fs.opendir(q.nodeid, q.u32(OpenIn.flags));
  return error < 0 ? error : r.open();
}

function readdir(server: FuseServer, q: Request, r: Reply): number {
  return entries(server, q, r, false);
}

function readdirplus(server: FuseServer, q: Request, r: Reply): number {
  return entries(server, q, r, true);
}

function entries({ fs }: FuseServer, q: Request, r: Reply, plus: boolean): number {
  const size = Math.min(q.u32(ReadIn.size), BODY_MAX);
  if (size > r.room) return -Errno.EINVAL;
  r.directory(size);
  const error = fs.readdir(q.nodeid, q.id(ReadIn.fh), q.u32(ReadIn.offset), q.u32(ReadIn.offset + 4), size, r, plus);
  if (r.directoryBytes > 0) return r.directoryBytes; // those entries are looked up already; the error comes again
  if (error < 0) return error;
  return r.refused ? -Errno.EINVAL : 0; // as getdents(2): an empty reply would mean the end of the directory
}

function releasedir({ fs }: FuseServer, q: Request): number {
  return fs.releasedir(q.nodeid, q.id(ReleaseIn.fh));
}

function fsyncdir({ fs }: FuseServer, q: Request): number {
  return fs.fsyncdir(q.nodeid, q.id(FsyncIn.fh), (q.u32(FsyncIn.flags) & FSYNC_FDATASYNC) !== 0);
}

// --- extended attributes ---

function setxattr({ fs, session }: FuseServer, q: Request): number {
  const size = q.u32(SetxattrIn.size);
  if (size > XATTR_SIZE_MAX) return -Errno.E2BIG;
  if (size !== q.tailBytes) return -Errno.EINVAL;
  return fs.setxattr(q.nodeid, q.name, q.tail, size, q.u32(SetxattrIn.flags), session.setxattrExt ? q.u32(SetxattrIn.setxattrFlags) : 0);
}

function getxattr({ fs }: FuseServer, q: Request, r: Reply): number {
  const size = xattrRoom(q, r);
  if (size < 0) return size;
  const n = fs.getxattr(q.nodeid, q.name, r.body, size);
  return n < 0 || size > 0 ? n : r.xattrSize(n);
}

function listxattr({ fs }: FuseServer, q: Request, r: Reply): number {
  const size = xattrRoom(q, r);
  if (size < 0) return size;
  const n = fs.listxattr(q.nodeid, r.body, size);
  return n < 0 || size > 0 ? n : r.xattrSize(n);
}

/** Bytes that the guest takes, at most 64 KiB, which no value or list exceeds; 0: the length alone. */
function xattrRoom(q: Request, r: Reply): number {
  const size = Math.min(q.u32(GetxattrIn.size), XATTR_SIZE_MAX);
  return r.room < (size === 0 ? GetxattrIn.bytes : size) ? -Errno.EINVAL : size;
}

function removexattr({ fs }: FuseServer, q: Request): number {
  return fs.removexattr(q.nodeid, q.name);
}

// --- locks ---

function getlk(server: FuseServer, q: Request, r: Reply): number {
  const error = lock(server, q);
  if (error < 0) return error;
  const result = server.fs.getlk(q.nodeid, q.id(LkIn.fh), server.lock);
  return result < 0 ? result : r.lock(server.lock);
}

function setlk(server: FuseServer, q: Request): number {
  const error = lock(server, q);
  return error < 0 ? error : server.fs.setlk(q.nodeid, q.id(LkIn.fh), server.lock, false);
}

function setlkw(server: FuseServer, q: Request): number {
  const error = lock(server, q);
  return error < 0 ? error : server.fs.setlk(q.nodeid, q.id(LkIn.fh), server.lock, true);
}

/** Reads fuse_lk_in. -ENOSYS for a kind of lock that the guest keeps to itself. */
function lock({ lock, session }: FuseServer, q: Request): number {
  lock.flock = (q.u32(LkIn.flags) & LK_FLOCK) !== 0;
  if (!(lock.flock ? session.flock : session.posixLock)) return -Errno.ENOSYS;
  lock.ownerLow = q.u32(LkIn.owner);
  lock.ownerHigh = q.u32(LkIn.owner + 4);
  lock.startLow = q.u32(LkIn.start);
  lock.startHigh = q.u32(LkIn.start + 4);
  lock.endLow = q.u32(LkIn.end);
  lock.endHigh = q.u32(LkIn.end + 4);
  lock.type = q.u32(LkIn.type);
  lock.pid = q.u32(LkIn.pid);
  lock.uniqueLow = q.uniqueLow;
  lock.uniqueHigh = q.uniqueHigh;
  return 0;
}

function interrupt(server: FuseServer, q: Request): number {
  server.interrupt(q.u32(InterruptIn.unique), q.u32(InterruptIn.unique + 4));
  return NO_REPLY;
}

// --- file events ---

function fsnotify({ session, events }: FuseServer, q: Request, r: Reply): number {
  if (!session.fsnotify || events === null) return -Errno.ENOSYS;
  const low = q.u32(FsnotifyIn.mask);
  const high = q.u32(FsnotifyIn.mask + 4);
  const error = events.watch(q.nodeid, q.u32(FsnotifyIn.generation), low, high, q.u32(FsnotifyIn.flags));
  return error < 0 ? error : r.watch(low, high, events.supportedLow, events.supportedHigh);
}

function readNotify({ session, events, chain }: FuseServer, q: Request): number {
  if (!session.fsnotify || events === null) return -Errno.ENOSYS;
  const error = events.lend(chain, q.uniqueLow, q.uniqueHigh, q.u32(ReadNotifyIn.size), q.u32(ReadNotifyIn.flags));
  return error < 0 || error === KEPT ? error : 0;
}
