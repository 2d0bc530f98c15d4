/**
 * A FUSE client over the mock driver: what a guest's fs/fuse and fs/fuse/virtio_fs.c would send, one method per request.
 *
 * Synchronous: a method sends one request, waits for its reply and decodes it; an error reply is thrown as {@link FuseError}
 * ({@link errnoOf} turns that back into a number). For several requests at once there are {@link FuseClient.submit} and
 * {@link FuseClient.wait}; {@link FuseClient.call} takes any bytes at all.
 */
import { Feature, type FrontendOptions, hasFeature, VhostUserFrontend } from 'vhost-user-ts';
import { MockDriver, MockMemory, type QueueDriver, type Segment } from 'vhost-user-ts/testing';
import {
  AccessIn,
  AttrOut,
  BatchForgetIn,
  BmapIn,
  CreateIn,
  EntryOut,
  FallocateIn,
  FlushIn,
  ForgetIn,
  ForgetOne,
  FsnotifyIn,
  FsnotifyOut,
  FUSE_KERNEL_MINOR_VERSION,
  FUSE_KERNEL_VERSION,
  GETATTR_FH,
  GetattrIn,
  GetxattrIn,
  InHeader,
  InitFlag,
  InitFlag2,
  InitIn,
  InitOut,
  InterruptIn,
  IoctlIn,
  IoctlOut,
  LinkIn,
  LseekIn,
  MkdirIn,
  MknodIn,
  Opcode,
  OpenIn,
  OpenOut,
  OutHeader,
  PollIn,
  ReadNotifyIn,
  Rename2In,
  RenameIn,
  SetxattrIn,
  StatfsOut,
  StatxIn,
  StatxOut,
  SyncfsIn,
  WriteIn,
} from '../../src/fuse/abi.js';
import {
  type Attributes,
  cName,
  copyIn,
  type DirectoryEntry,
  decodeAttrOut,
  decodeDirectory,
  decodeEntry,
  decodeOpen,
  decodeReply,
  decodeStatx,
  type EntryReply,
  fsyncIn,
  type Lock,
  lockIn,
  type Name,
  type OpenReply,
  opcodeName,
  type Reply,
  readIn,
  releaseIn,
  type SetAttributes,
  type Statistics,
  type StatxReply,
  Struct,
  setattrIn,
  type U64,
} from './fuse-wire.js';

export { InitFlag2 } from '../../src/fuse/abi.js';
export * from './fuse-wire.js';

export interface InitReply {
  major: number;
  minor: number;
  maxReadahead: number;
  flags: number;
  flags2: number;
  maxBackground: number;
  congestionThreshold: number;
  maxWrite: number;
  timeGran: number;
  maxPages: number;
  mapAlignment: number;
  maxStackDepth: number;
  requestTimeout: number;
}

/** A request under way. */
export interface Pending {
  readonly unique: bigint;
  readonly opcode: number;
  readonly queue: QueueDriver;
  readonly head: number;
  /** Set once the chain came back. */
  reply: Reply | undefined;
  /** Bytes that the back end said it wrote; 0 where no reply was due. */
  used: number;
}

/** A chain in flight, and the buffers that go back with it. */
interface InFlight {
  pending: Pending;
  slot: Slot;
  writable: number;
}

interface Slot {
  input: number;
  output: number;
  large: boolean;
}

/** An error reply. */
export class FuseError extends Error {
  readonly errno: number;
  readonly opcode: number;
  constructor(opcode: number, errno: number) {
    super(`${opcodeName(opcode)}: errno ${errno}`);
    this.name = 'FuseError';
    this.errno = errno;
    this.opcode = opcode;
  }
}

/** The errno that `request` ends with, 0 if it succeeds. */
export function errnoOf(request: () => unknown): number {
  try {
    request();
    return 0;
  } catch (error) {
    if (error instanceof FuseError) return error.errno;
    throw error;
  }
}

export interface ClientOptions {
  /** How many virtqueues there are: hiprio and request queues (2). */
  queues?: number;
  queueSize?: number;
  order?: 'qemu' | 'uml';
  /** Of what the back end offers, the features accepted. */
  features?: bigint;
  protocolFeatures?: bigint;
  /** Runs the back end's turn, where it lives in this thread. */
  turn?: () => void;
  /** Guest memory; 512 MiB (sparse) otherwise. */
  memory?: MockMemory;
  /** Milliseconds to wait for a reply (5000). */
  timeout?: number;
}

const SMALL = 16 << 10;
const LARGE = (1 << 20) + (16 << 10);
/** VIRTIO_FS_F_NOTIFICATION: queue 1 carries notifications, requests begin at queue 2. */
const FEATURE_NOTIFICATION = 0;

/** What a Linux 7.2 guest offers in FUSE_INIT, as far as a virtio-fs mount goes. */
export const LINUX_INIT_FLAGS =
  InitFlag.ASYNC_READ |
  InitFlag.POSIX_LOCKS |
  InitFlag.ATOMIC_O_TRUNC |
  InitFlag.EXPORT_SUPPORT |
  InitFlag.BIG_WRITES |
  InitFlag.DONT_MASK |
  InitFlag.SPLICE_WRITE |
  InitFlag.SPLICE_MOVE |
  InitFlag.SPLICE_READ |
  InitFlag.FLOCK_LOCKS |
  InitFlag.HAS_IOCTL_DIR |
  InitFlag.AUTO_INVAL_DATA |
  InitFlag.DO_READDIRPLUS |
  InitFlag.READDIRPLUS_AUTO |
  InitFlag.ASYNC_DIO |
  InitFlag.WRITEBACK_CACHE |
  InitFlag.NO_OPEN_SUPPORT |
  InitFlag.PARALLEL_DIROPS |
  InitFlag.HANDLE_KILLPRIV |
  InitFlag.POSIX_ACL |
  InitFlag.ABORT_ERROR |
  InitFlag.MAX_PAGES |
  InitFlag.CACHE_SYMLINKS |
  InitFlag.NO_OPENDIR_SUPPORT |
  InitFlag.EXPLICIT_INVAL_DATA |
  InitFlag.SUBMOUNTS |
  InitFlag.HANDLE_KILLPRIV_V2 |
  InitFlag.SETXATTR_EXT |
  InitFlag.INIT_EXT;
export const LINUX_INIT_FLAGS2 =
  InitFlag2.SECURITY_CTX |
  InitFlag2.CREATE_SUPP_GROUP |
  InitFlag2.HAS_EXPIRE_ONLY |
  InitFlag2.DIRECT_IO_ALLOW_MMAP |
  InitFlag2.NO_EXPORT_SUPPORT |
  InitFlag2.HAS_RESEND |
  InitFlag2.ALLOW_IDMAP;

export class FuseClient {
  readonly driver: MockDriver;
  /** fuse_in_header's uid, gid and pid of the requests to come. */
  caller = { uid: 0, gid: 0, pid: 1 };
  /** What INIT agreed on. */
  session: InitReply | undefined;
  /** Extensions for the next creating requests (supplementary group, security context): see {@link suppGroupExtension}. */
  extensions: Buffer = Buffer.alloc(0);
  /** Which request queue the next requests take, counted from 0. */
  requestQueue = 0;
  /** Splits data into descriptors of this many bytes, as page-sized buffers of a guest would (0: one descriptor). */
  pageSize = 0;

  private unique = 0n;
  private readonly timeout: number;
  private readonly inFlight = new Map<QueueDriver, Map<number, InFlight>>();
  private readonly small: Slot[] = [];
  private readonly large: Slot[] = [];
  private readonly notificationBuffers = new Map<number, Segment>();

  /** Over a driver that was started. */
  constructor(driver: MockDriver, timeout = 5000) {
    this.driver = driver;
    this.timeout = timeout;
  }

  /** Connects to a daemon's socket (or takes a front end to one), and starts the device; {@link init} is the caller's. */
  static connect(to: string | VhostUserFrontend, options: ClientOptions = {}): FuseClient {
    const frontendOptions: FrontendOptions = {};
    if (options.turn !== undefined) frontendOptions.turn = options.turn;
    if (options.timeout !== undefined) frontendOptions.timeout = options.timeout;
    const frontend = typeof to === 'string' ? VhostUserFrontend.connect(to, frontendOptions) : to;
    const driver = new MockDriver(frontend, {
      queues: options.queues ?? 3, // hiprio, notifications (if offered) and requests
      memory: options.memory ?? new MockMemory([{ guestAddress: 0, size: 512 << 20 }]),
      ...(options.queueSize !== undefined && { queueSize: options.queueSize }),
      ...(options.order !== undefined && { order: options.order }),
      ...(options.features !== undefined && { features: options.features }),
      ...(options.protocolFeatures !== undefined && { protocolFeatures: options.protocolFeatures }),
      ...(options.turn !== undefined && { turn: options.turn }),
    });
    driver.start();
    return new FuseClient(driver, options.timeout);
  }

  close(): void {
    this.driver.close();
  }

  /** Runs requests as another user. */
  as<T>(uid: number, gid: number, requests: () => T): T {
    const before = this.caller;
    this.caller = { ...before, uid, gid };
    try {
      return requests();
    } finally {
      this.caller = before;
    }
  }

  // --- session ---

  init(options: { major?: number; minor?: number; flags?: number; flags2?: number; maxReadahead?: number } = {}): InitReply {
    const body = new Struct(InitIn.bytes)
      .u32(InitIn.major, options.major ?? FUSE_KERNEL_VERSION)
      .u32(InitIn.minor, options.minor ?? FUSE_KERNEL_MINOR_VERSION)
      .u32(InitIn.maxReadahead, options.maxReadahead ?? 128 << 10)
      .u32(InitIn.flags, options.flags ?? LINUX_INIT_FLAGS)
      .u32(InitIn.flags2, options.flags2 ?? LINUX_INIT_FLAGS2);
    const out = this.request(Opcode.INIT, 0, [body.bytes], InitOut.bytes);
    this.session = {
      major: out.readUInt32LE(InitOut.major),
      minor: out.readUInt32LE(InitOut.minor),
      maxReadahead: out.readUInt32LE(InitOut.maxReadahead),
      flags: out.readInt32LE(InitOut.flags),
      flags2: out.readInt32LE(InitOut.flags2),
      maxBackground: out.readUInt16LE(InitOut.maxBackground),
      congestionThreshold: out.readUInt16LE(InitOut.congestionThreshold),
      maxWrite: out.readUInt32LE(InitOut.maxWrite),
      timeGran: out.readUInt32LE(InitOut.timeGran),
      maxPages: out.readUInt16LE(InitOut.maxPages),
      mapAlignment: out.readUInt16LE(InitOut.mapAlignment),
      maxStackDepth: out.readUInt32LE(InitOut.maxStackDepth),
      requestTimeout: out.readUInt16LE(InitOut.requestTimeout),
    };
    return this.session;
  }

  destroy(): void {
    this.request(Opcode.DESTROY, 0, [], 0);
  }

  // --- names and inodes ---

  lookup(parent: number, name: Name): EntryReply {
    return decodeEntry(this.request(Opcode.LOOKUP, parent, [cName(name)], EntryOut.bytes));
  }

  /** Has no reply; returns when the back end has taken it. */
  forget(nodeid: number, nlookup: U64 = 1): void {
    this.oneWay(Opcode.FORGET, nodeid, [new Struct(ForgetIn.bytes).u64(ForgetIn.nlookup, nlookup).bytes]);
  }

  batchForget(forgets: readonly { nodeid: number; nlookup: U64 }[]): void {
    const items = forgets.map((f) => new Struct(ForgetOne.bytes).u64(ForgetOne.nodeid, f.nodeid).u64(ForgetOne.nlookup, f.nlookup).bytes);
    this.oneWay(Opcode.BATCH_FORGET, 0, [new Struct(BatchForgetIn.bytes).u32(BatchForgetIn.count, items.length).bytes, ...items]);
  }

  getattr(nodeid: number, fh?: number): { attr: Attributes; attrValid: number } {
    const body = new Struct(GetattrIn.bytes);
    if (fh !== undefined) body.u32(GetattrIn.flags, GETATTR_FH).u64(GetattrIn.fh, fh);
    return decodeAttrOut(this.request(Opcode.GETATTR, nodeid, [body.bytes], AttrOut.bytes));
  }

  setattr(nodeid: number, set: SetAttributes): { attr: Attributes; attrValid: number } {
    return decodeAttrOut(this.request(Opcode.SETATTR, nodeid, [setattrIn(set)], AttrOut.bytes));
  }

  statx(nodeid: number, options: { fh?: number; flags?: number; mask?: number } = {}): StatxReply {
    const body = new Struct(StatxIn.bytes).u32(StatxIn.sxFlags, options.flags ?? 0).u32(StatxIn.sxMask, options.mask ?? 0xfff);
    if (options.fh !== undefined) body.u32(StatxIn.flags, GETATTR_FH).u64(StatxIn.fh, options.fh);
    return decodeStatx(this.request(Opcode.STATX, nodeid, [body.bytes], StatxOut.bytes));
  }

  readlink(nodeid: number): string {
    return this.request(Opcode.READLINK, nodeid, [], 4096).toString();
  }

  symlink(parent: number, name: Name, target: Name): EntryReply {
    return this.creating(Opcode.SYMLINK, parent, [cName(name), cName(target)]);
  }

  mknod(parent: number, name: Name, mode: number, rdev = 0, umask = 0): EntryReply {
    const body = new Struct(MknodIn.bytes).u32(MknodIn.mode, mode).u32(MknodIn.rdev, rdev).u32(MknodIn.umask, umask);
    return this.creating(Opcode.MKNOD, parent, [body.bytes, cName(name)]);
  }

  mkdir(parent: number, name: Name, mode = 0o755, umask = 0): EntryReply {
    const body = new Struct(MkdirIn.bytes).u32(MkdirIn.mode, mode).u32(MkdirIn.umask, umask);
    return this.creating(Opcode.MKDIR, parent, [body.bytes, cName(name)]);
  }

  unlink(parent: number, name: Name): void {
    this.request(Opcode.UNLINK, parent, [cName(name)], 0);
  }

  rmdir(parent: number, name: Name): void {
    this.request(Opcode.RMDIR, parent, [cName(name)], 0);
  }

  rename(parent: number, name: Name, newParent: number, newName: Name): void {
    const body = new Struct(RenameIn.bytes).u64(RenameIn.newdir, newParent);
    this.request(Opcode.RENAME, parent, [body.bytes, cName(name), cName(newName)], 0);
  }

  /** `flags`: RENAME_NOREPLACE 1, RENAME_EXCHANGE 2, RENAME_WHITEOUT 4. */
  rename2(parent: number, name: Name, newParent: number, newName: Name, flags: number): void {
    const body = new Struct(Rename2In.bytes).u64(Rename2In.newdir, newParent).u32(Rename2In.flags, flags);
    this.request(Opcode.RENAME2, parent, [body.bytes, cName(name), cName(newName)], 0);
  }

  link(nodeid: number, newParent: number, newName: Name): EntryReply {
    const body = new Struct(LinkIn.bytes).u64(LinkIn.oldnodeid, nodeid);
    return decodeEntry(this.request(Opcode.LINK, newParent, [body.bytes, cName(newName)], EntryOut.bytes));
  }

  access(nodeid: number, mask: number): void {
    this.request(Opcode.ACCESS, nodeid, [new Struct(AccessIn.bytes).u32(AccessIn.mask, mask).bytes], 0);
  }

  statfs(nodeid = 1): Statistics {
    const out = this.request(Opcode.STATFS, nodeid, [], StatfsOut.bytes);
    return {
      blocks: out.readBigUInt64LE(StatfsOut.blocks),
      bfree: out.readBigUInt64LE(StatfsOut.bfree),
      bavail: out.readBigUInt64LE(StatfsOut.bavail),
      files: out.readBigUInt64LE(StatfsOut.files),
      ffree: out.readBigUInt64LE(StatfsOut.ffree),
      bsize: out.readUInt32LE(StatfsOut.bsize),
      namelen: out.readUInt32LE(StatfsOut.namelen),
      frsize: out.readUInt32LE(StatfsOut.frsize),
    };
  }

  syncfs(nodeid = 1): void {
    this.request(Opcode.SYNCFS, nodeid, [new Struct(SyncfsIn.bytes).bytes], 0);
  }

  // --- files ---

  open(nodeid: number, flags = 0, openFlags = 0): OpenReply {
    const body = new Struct(OpenIn.bytes).u32(OpenIn.flags, flags).u32(OpenIn.openFlags, openFlags);
    return decodeOpen(this.request(Opcode.OPEN, nodeid, [body.bytes], OpenOut.bytes));
  }

  create(parent: number, name: Name, flags: number, mode = 0o644, umask = 0, openFlags = 0): { entry: EntryReply; open: OpenReply } {
    return this.creatingFile(Opcode.CREATE, parent, name, flags, mode, umask, openFlags);
  }

  tmpfile(parent: number, flags: number, mode = 0o644, umask = 0): { entry: EntryReply; open: OpenReply } {
    return this.creatingFile(Opcode.TMPFILE, parent, '/', flags, mode, umask, 0);
  }

  read(
    nodeid: number,
    fh: number,
    offset: U64,
    size: number,
    options: { flags?: number; readFlags?: number; lockOwner?: U64 } = {},
  ): Buffer {
    return this.request(Opcode.READ, nodeid, [readIn(fh, offset, size, options)], size);
  }

  write(
    nodeid: number,
    fh: number,
    offset: U64,
    data: Uint8Array | string,
    options: { flags?: number; writeFlags?: number; lockOwner?: U64; size?: number } = {},
  ): number {
    const bytes = Buffer.from(data);
    const body = new Struct(WriteIn.bytes)
      .u64(WriteIn.fh, fh)
      .u64(WriteIn.offset, offset)
      .u32(WriteIn.size, options.size ?? bytes.length)
      .u32(WriteIn.writeFlags, options.writeFlags ?? 0)
      .u64(WriteIn.lockOwner, options.lockOwner ?? 0)
      .u32(WriteIn.flags, options.flags ?? 0);
    return this.request(Opcode.WRITE, nodeid, [body.bytes, bytes], 8).readUInt32LE(0);
  }

  flush(nodeid: number, fh: number, lockOwner: U64 = 0): void {
    const body = new Struct(FlushIn.bytes).u64(FlushIn.fh, fh).u64(FlushIn.lockOwner, lockOwner);
    this.request(Opcode.FLUSH, nodeid, [body.bytes], 0);
  }

  release(nodeid: number, fh: number, options: { flags?: number; releaseFlags?: number; lockOwner?: U64 } = {}): void {
    this.request(Opcode.RELEASE, nodeid, [releaseIn(fh, options)], 0);
  }

  fsync(nodeid: number, fh: number, dataOnly = false): void {
    this.request(Opcode.FSYNC, nodeid, [fsyncIn(fh, dataOnly)], 0);
  }

  fallocate(nodeid: number, fh: number, offset: U64, length: U64, mode = 0): void {
    const body = new Struct(FallocateIn.bytes)
      .u64(FallocateIn.fh, fh)
      .u64(FallocateIn.offset, offset)
      .u64(FallocateIn.length, length)
      .u32(FallocateIn.mode, mode);
    this.request(Opcode.FALLOCATE, nodeid, [body.bytes], 0);
  }

  lseek(nodeid: number, fh: number, offset: U64, whence: number): bigint {
    const body = new Struct(LseekIn.bytes).u64(LseekIn.fh, fh).u64(LseekIn.offset, offset).u32(LseekIn.whence, whence);
    return this.request(Opcode.LSEEK, nodeid, [body.bytes], 8).readBigUInt64LE(0);
  }

  copyFileRange(
    from: { nodeid: number; fh: number; offset: U64 },
    to: { nodeid: number; fh: number; offset: U64 },
    length: U64,
    flags = 0,
  ): number {
    return this.request(Opcode.COPY_FILE_RANGE, from.nodeid, [copyIn(from, to, length, flags)], 8).readUInt32LE(0);
  }

  copyFileRange64(
    from: { nodeid: number; fh: number; offset: U64 },
    to: { nodeid: number; fh: number; offset: U64 },
    length: U64,
    flags = 0,
  ): bigint {
    return this.request(Opcode.COPY_FILE_RANGE_64, from.nodeid, [copyIn(from, to, length, flags)], 8).readBigUInt64LE(0);
  }

  bmap(nodeid: number, block: U64, blocksize: number): bigint {
    const body = new Struct(BmapIn.bytes).u64(BmapIn.block, block).u32(BmapIn.blocksize, blocksize);
    return this.request(Opcode.BMAP, nodeid, [body.bytes], 8).readBigUInt64LE(0);
  }

  ioctl(
    nodeid: number,
    fh: number,
    cmd: number,
    input: Uint8Array = new Uint8Array(0),
    outSize = 0,
    options: { flags?: number; arg?: U64 } = {},
  ): { result: number; flags: number; data: Buffer } {
    const body = new Struct(IoctlIn.bytes)
      .u64(IoctlIn.fh, fh)
      .u32(IoctlIn.flags, options.flags ?? 0)
      .u32(IoctlIn.cmd, cmd)
      .u64(IoctlIn.arg, options.arg ?? 0)
      .u32(IoctlIn.inSize, input.length)
      .u32(IoctlIn.outSize, outSize);
    const out = this.request(Opcode.IOCTL, nodeid, [body.bytes, input], IoctlOut.bytes + outSize);
    return { result: out.readInt32LE(IoctlOut.result), flags: out.readUInt32LE(IoctlOut.flags), data: out.subarray(IoctlOut.bytes) };
  }

  /** Returns revents. */
  poll(nodeid: number, fh: number, events: number, kh: U64 = 0, flags = 0): number {
    const body = new Struct(PollIn.bytes).u64(PollIn.fh, fh).u64(PollIn.kh, kh).u32(PollIn.flags, flags).u32(PollIn.events, events);
    return this.request(Opcode.POLL, nodeid, [body.bytes], 8).readUInt32LE(0);
  }

  // --- directories ---

  opendir(nodeid: number, flags = 0): OpenReply {
    return decodeOpen(this.request(Opcode.OPENDIR, nodeid, [new Struct(OpenIn.bytes).u32(OpenIn.flags, flags).bytes], OpenOut.bytes));
  }

  readdir(nodeid: number, fh: number, offset: U64 = 0, size = 4096): DirectoryEntry[] {
    return decodeDirectory(this.request(Opcode.READDIR, nodeid, [readIn(fh, offset, size, {})], size), false);
  }

  readdirplus(nodeid: number, fh: number, offset: U64 = 0, size = 32768): DirectoryEntry[] {
    return decodeDirectory(this.request(Opcode.READDIRPLUS, nodeid, [readIn(fh, offset, size, {})], size), true);
  }

  /** The whole directory: OPENDIR, READDIR until it is empty, RELEASEDIR. */
  list(nodeid: number, size = 32768): DirectoryEntry[] {
    const { fh } = this.opendir(nodeid);
    const all: DirectoryEntry[] = [];
    for (let part = this.readdir(nodeid, fh, 0, size); part.length > 0; part = this.readdir(nodeid, fh, all.at(-1)?.offset ?? 0, size))
      all.push(...part);
    this.releasedir(nodeid, fh);
    return all;
  }

  releasedir(nodeid: number, fh: number): void {
    this.request(Opcode.RELEASEDIR, nodeid, [releaseIn(fh, {})], 0);
  }

  fsyncdir(nodeid: number, fh: number, dataOnly = false): void {
    this.request(Opcode.FSYNCDIR, nodeid, [fsyncIn(fh, dataOnly)], 0);
  }

  // --- extended attributes ---

  /** With FUSE_SETXATTR_EXT agreed in INIT the longer structure is sent. */
  setxattr(nodeid: number, name: Name, value: Uint8Array | string, flags = 0, setxattrFlags = 0): void {
    const bytes = Buffer.from(value);
    const extended = ((this.session?.flags ?? 0) & InitFlag.SETXATTR_EXT) !== 0;
    const body = new Struct(SetxattrIn.bytes)
      .u32(SetxattrIn.size, bytes.length)
      .u32(SetxattrIn.flags, flags)
      .u32(SetxattrIn.setxattrFlags, setxattrFlags);
    this.request(
      Opcode.SETXATTR,
      nodeid,
      [body.bytes.subarray(0, extended ? SetxattrIn.bytes : SetxattrIn.compatBytes), cName(name), bytes],
      0,
    );
  }

  getxattr(nodeid: number, name: Name, size = 65536): Buffer {
    return this.request(Opcode.GETXATTR, nodeid, [new Struct(GetxattrIn.bytes).u32(GetxattrIn.size, size).bytes, cName(name)], size);
  }

  /** How long the value is. */
  getxattrSize(nodeid: number, name: Name): number {
    return this.request(Opcode.GETXATTR, nodeid, [new Struct(GetxattrIn.bytes).bytes, cName(name)], 8).readUInt32LE(0);
  }

  listxattr(nodeid: number, size = 65536): string[] {
    const list = this.request(Opcode.LISTXATTR, nodeid, [new Struct(GetxattrIn.bytes).u32(GetxattrIn.size, size).bytes], size).toString();
    return list.length === 0 ? [] : list.slice(0, -1).split('\0');
  }

  listxattrSize(nodeid: number): number {
    return this.request(Opcode.LISTXATTR, nodeid, [new Struct(GetxattrIn.bytes).bytes], 8).readUInt32LE(0);
  }

  removexattr(nodeid: number, name: Name): void {
    this.request(Opcode.REMOVEXATTR, nodeid, [cName(name)], 0);
  }

  // --- locks ---

  getlk(nodeid: number, fh: number, owner: U64, lock: Lock): Lock {
    const out = this.request(Opcode.GETLK, nodeid, [lockIn(fh, owner, lock, 0)], 24);
    return { start: out.readBigUInt64LE(0), end: out.readBigUInt64LE(8), type: out.readUInt32LE(16), pid: out.readUInt32LE(20) };
  }

  /** `flags` 1 (FUSE_LK_FLOCK): as by flock(2). */
  setlk(nodeid: number, fh: number, owner: U64, lock: Lock, flags = 0): void {
    this.request(Opcode.SETLK, nodeid, [lockIn(fh, owner, lock, flags)], 0);
  }

  /** Waits in the back end: use {@link submit} where the lock may be taken. */
  setlkw(nodeid: number, fh: number, owner: U64, lock: Lock, flags = 0): void {
    this.request(Opcode.SETLKW, nodeid, [lockIn(fh, owner, lock, flags)], 0);
  }

  /** SETLKW without waiting for it here. */
  submitSetlkw(nodeid: number, fh: number, owner: U64, lock: Lock, flags = 0): Pending {
    return this.submit(Opcode.SETLKW, nodeid, [lockIn(fh, owner, lock, flags)], 0);
  }

  interrupt(unique: bigint): void {
    this.oneWay(Opcode.INTERRUPT, 0, [new Struct(InterruptIn.bytes).u64(InterruptIn.unique, unique).bytes]);
  }

  // --- events of the host ---

  /** Watches a nodeid for `mask` (0: no longer). */
  fsnotify(nodeid: number, mask: U64, generation = 0, flags = 0): { mask: bigint; supported: bigint } {
    const body = new Struct(FsnotifyIn.bytes)
      .u64(FsnotifyIn.mask, mask)
      .u32(FsnotifyIn.generation, generation)
      .u32(FsnotifyIn.flags, flags);
    const out = this.request(Opcode.FSNOTIFY, nodeid, [body.bytes], FsnotifyOut.bytes);
    return { mask: out.readBigUInt64LE(FsnotifyOut.mask), supported: out.readBigUInt64LE(FsnotifyOut.supported) };
  }

  /** Lends one buffer for a notification: answered when there is one. */
  submitReadNotify(size = 4096, flags = 0): Pending {
    const body = new Struct(ReadNotifyIn.bytes).u32(ReadNotifyIn.size, size).u32(ReadNotifyIn.flags, flags);
    return this.submit(Opcode.READ_NOTIFY, 0, [body.bytes], size);
  }

  /** Whether queue 1 carries notifications. */
  get hasNotificationQueue(): boolean {
    return hasFeature(this.driver.features, FEATURE_NOTIFICATION);
  }

  /** Gives the notification queue `count` buffers of `size` bytes (header included). */
  lendNotificationBuffers(count: number, size = 4096): void {
    const queue = this.queueAt(1);
    for (let i = 0; i < count; i++) {
      const segment = { address: this.driver.memory.allocate(size), length: size };
      this.notificationBuffers.set(queue.add([], [segment]), segment);
    }
    queue.publish();
    queue.kick();
  }

  /** Takes the notifications that arrived, waiting up to `timeout` ms for the first; their buffers are lent again. */
  takeNotifications(timeout = 0): Reply[] {
    const queue = this.queueAt(1);
    queue.wait(timeout);
    const replies: Reply[] = [];
    const segments: Segment[] = [];
    for (const { head, length } of queue.collect()) {
      const segment = this.notificationBuffers.get(head) as Segment;
      this.notificationBuffers.delete(head);
      segments.push(segment);
      replies.push(decodeReply(this.driver.memory.read(segment.address, length)));
    }
    // Only now: the heads that become free are used again.
    for (const segment of segments) this.notificationBuffers.set(queue.add([], [segment]), segment);
    if (replies.length > 0) {
      queue.publish();
      queue.kick();
    }
    return replies;
  }

  // --- any request ---

  /** Sends a request and waits for its reply; throws {@link FuseError} for an error. `size` is the room for the reply's body. */
  request(opcode: number, nodeid: U64, body: readonly Uint8Array[], size: number): Buffer {
    const { error, body: reply } = this.call(opcode, nodeid, body, size);
    if (error !== 0) throw new FuseError(opcode, -error);
    return reply;
  }

  /** As {@link request}, with the error as a value. */
  call(opcode: number, nodeid: U64, body: readonly Uint8Array[], size: number, header: HeaderFields = {}): Reply {
    const pending = this.submit(opcode, nodeid, body, size, header);
    return this.wait(pending);
  }

  /** Sends a request whose reply {@link wait} takes later. */
  submit(opcode: number, nodeid: U64, body: readonly Uint8Array[], size: number, header: HeaderFields = {}): Pending {
    const queue = header.queue ?? this.queueAt((this.hasNotificationQueue ? 2 : 1) + this.requestQueue);
    return this.enqueue(queue, opcode, nodeid, body, OutHeader.bytes + size, header);
  }

  /** Sends a request without a reply, through the hiprio queue, and waits until the back end has taken it. */
  oneWay(opcode: number, nodeid: U64, body: readonly Uint8Array[], header: HeaderFields = {}): void {
    const pending = this.enqueue(header.queue ?? this.queueAt(0), opcode, nodeid, body, 0, header);
    this.wait(pending);
  }

  /** Sends bytes that need not be a request, with `writable` bytes of room for the answer. */
  submitBytes(bytes: Uint8Array, writable: number, queue = this.queueAt((this.hasNotificationQueue ? 2 : 1) + this.requestQueue)): Pending {
    return this.place(queue, 0, ++this.unique, [bytes], writable);
  }

  /** Waits for the reply of a request. */
  wait(pending: Pending, timeout = this.timeout): Reply {
    const end = performance.now() + timeout;
    while (pending.reply === undefined) {
      const left = end - performance.now();
      if (left <= 0 || !pending.queue.wait(left)) throw new Error(`${opcodeName(pending.opcode)}: no reply within ${timeout} ms`);
      this.collect(pending.queue);
    }
    return pending.reply;
  }

  /** Whether the reply is there, without waiting. */
  done(pending: Pending): boolean {
    pending.queue.turn?.();
    this.collect(pending.queue);
    return pending.reply !== undefined;
  }

  /** Whether the reply comes within `timeout` ms. */
  settled(pending: Pending, timeout: number): boolean {
    for (const end = performance.now() + timeout; !this.done(pending); )
      if (!pending.queue.wait(end - performance.now())) return this.done(pending);
    return true;
  }

  /** Forgets what is in flight in a queue that was reset. */
  dropInFlight(queue: QueueDriver): void {
    this.inFlight.delete(queue);
  }

  private queueAt(index: number): QueueDriver {
    const queue = this.driver.queues[index];
    if (queue === undefined) throw new RangeError(`no queue ${index}`);
    return queue;
  }

  private creating(opcode: number, parent: number, body: Buffer[]): EntryReply {
    return decodeEntry(this.extended(opcode, parent, body, EntryOut.bytes));
  }

  private creatingFile(opcode: number, parent: number, name: Name, flags: number, mode: number, umask: number, openFlags: number) {
    const body = new Struct(CreateIn.bytes)
      .u32(CreateIn.flags, flags)
      .u32(CreateIn.mode, mode)
      .u32(CreateIn.umask, umask)
      .u32(CreateIn.openFlags, openFlags);
    const out = this.extended(opcode, parent, [body.bytes, cName(name)], EntryOut.bytes + OpenOut.bytes);
    return { entry: decodeEntry(out), open: decodeOpen(out.subarray(EntryOut.bytes)) };
  }

  /** A creating request with the extensions behind its arguments (total_extlen counts 8 bytes). */
  private extended(opcode: number, parent: number, body: Buffer[], size: number): Buffer {
    const { error, body: reply } = this.call(opcode, parent, [...body, this.extensions], size, {
      extensionWords: this.extensions.length / 8,
    });
    if (error !== 0) throw new FuseError(opcode, -error);
    return reply;
  }

  private enqueue(
    queue: QueueDriver,
    opcode: number,
    nodeid: U64,
    body: readonly Uint8Array[],
    writable: number,
    fields: HeaderFields,
  ): Pending {
    this.unique += 2n; // the kernel counts in twos: odd ones are interrupts
    const unique = fields.unique ?? this.unique;
    const args = body.filter((part) => part.length > 0);
    const length = args.reduce<number>((sum, part) => sum + part.length, InHeader.bytes);
    const header = new Struct(InHeader.bytes)
      .u32(InHeader.len, fields.length ?? length)
      .u32(InHeader.opcode, opcode)
      .u64(InHeader.unique, unique)
      .u64(InHeader.nodeid, nodeid)
      .u32(InHeader.uid, this.caller.uid)
      .u32(InHeader.gid, this.caller.gid)
      .u32(InHeader.pid, this.caller.pid)
      .u16(InHeader.totalExtlen, fields.extensionWords ?? 0);
    return this.place(queue, opcode, unique, [header.bytes, ...args], fields.writable ?? writable);
  }

  private place(queue: QueueDriver, opcode: number, unique: bigint, parts: readonly Uint8Array[], writable: number): Pending {
    const length = parts.reduce((sum, part) => sum + part.length, 0);
    const slot = this.takeSlot(Math.max(length, writable));
    const readable: Segment[] = [];
    let at = slot.input;
    for (const part of parts) {
      this.driver.memory.write(at, part);
      this.split(readable, at, part.length);
      at += part.length;
    }
    const writables: Segment[] = [];
    const head = Math.min(writable, OutHeader.bytes);
    if (head > 0) writables.push({ address: slot.output, length: head });
    this.split(writables, slot.output + head, writable - head);
    this.driver.memory.view(slot.output, writable).fill(0xee);
    const indirect = hasFeature(this.driver.features, Feature.INDIRECT_DESC) && readable.length + writables.length > 1;
    let chain = queue.send(readable, writables, indirect);
    for (
      const end = performance.now() + this.timeout;
      chain < 0 && performance.now() < end;
      chain = queue.send(readable, writables, indirect)
    ) {
      queue.wait(100);
      this.collect(queue);
    }
    if (chain < 0) throw new Error(`queue ${queue.index} stays full`);
    const pending: Pending = { unique, opcode, queue, head: chain, reply: undefined, used: 0 };
    let chains = this.inFlight.get(queue);
    if (chains === undefined) {
      chains = new Map();
      this.inFlight.set(queue, chains);
    }
    chains.set(chain, { pending, slot, writable });
    return pending;
  }

  private split(segments: Segment[], address: number, length: number): void {
    const step = this.pageSize > 0 ? this.pageSize : length;
    for (let done = 0; done < length; done += step) segments.push({ address: address + done, length: Math.min(step, length - done) });
  }

  private collect(queue: QueueDriver): void {
    const chains = this.inFlight.get(queue);
    if (chains === undefined) return;
    for (const { head, length } of queue.collect()) {
      const { pending, slot, writable } = chains.get(head) as InFlight;
      chains.delete(head);
      pending.used = length;
      pending.reply =
        writable === 0 || length === 0 ? { error: 0, unique: 0n, body: Buffer.alloc(0) } : this.takeReply(pending, slot, length);
      (slot.large ? this.large : this.small).push(slot);
    }
  }

  private takeReply(pending: Pending, slot: Slot, length: number): Reply {
    const reply = decodeReply(this.driver.memory.read(slot.output, length));
    if (pending.opcode !== 0 && reply.unique !== pending.unique)
      throw new Error(`${opcodeName(pending.opcode)}: a reply to another request`);
    return reply;
  }

  private takeSlot(bytes: number): Slot {
    const large = bytes > SMALL;
    if (bytes > LARGE) throw new RangeError(`a request of ${bytes} bytes`);
    const spare = (large ? this.large : this.small).pop();
    if (spare !== undefined) return spare;
    const size = large ? LARGE : SMALL;
    return { input: this.driver.memory.allocate(size, 4096), output: this.driver.memory.allocate(size, 4096), large };
  }
}

/** Fields of fuse_in_header that are not to be as they should. */
export interface HeaderFields {
  unique?: bigint;
  /** header.len. */
  length?: number;
  /** header.total_extlen. */
  extensionWords?: number;
  /** Bytes of room for the reply, header included. */
  writable?: number;
  queue?: QueueDriver;
}
