/**
 * FUSE requests as JSON: what each opcode carries, how a plausible or a broken one is made, and its bytes.
 *
 * Numbers from 0 on are what they are, except for references: a node, a file or a directory is "the n-th that the guest has now"
 * (modulo how many these are; node 0 is the root). Negative numbers are what no honest guest would send: see {@link HUGE}.
 */
import {
  AccessIn,
  BatchForgetIn,
  BmapIn,
  CopyFileRangeIn,
  CreateIn,
  FallocateIn,
  FlushIn,
  ForgetIn,
  FsnotifyIn,
  FsyncIn,
  GetattrIn,
  GetxattrIn,
  InitFlag,
  InitIn,
  InterruptIn,
  IoctlIn,
  LinkIn,
  LkIn,
  LseekIn,
  MkdirIn,
  MknodIn,
  type Opcode,
  OpenIn,
  PollIn,
  ReadIn,
  ReadNotifyIn,
  ReleaseIn,
  RemovemappingIn,
  Rename2In,
  RenameIn,
  SetattrIn,
  SetupmappingIn,
  SetxattrIn,
  StatxIn,
  SyncfsIn,
  WriteIn,
} from '../../src/fuse/abi.js';
import type { Random } from './random.js';
import { NAMES } from './share.js';

export type OpName = keyof typeof Opcode;

/** One request. Fields that are left out are ordinary. */
export interface RequestStep {
  /** A name of `Opcode`, or any number. */
  op: OpName | number;
  /** nodeid of the header. */
  n?: number;
  /** Arguments, in the order of {@link FIELDS}. */
  a?: number[];
  /** First and second name. */
  s?: string;
  t?: string;
  /** Bytes of data behind them. */
  d?: number;
  /** Extensions: 1 a group, 2 a security context, 3 both, 4 and more nonsense. */
  x?: number;
  /** Room for the reply, header included. */
  room?: number;
  /** fuse_in_header.len is off by so much. */
  lie?: number;
  /** Bytes missing at the end (or zeros too many, if negative). */
  cut?: number;
  /** Index into {@link USERS}. */
  u?: number;
  /** Pieces that the two parts are in: 1 to 8; from 8 on in an indirect table. */
  pieces?: number;
  /** The reply is not waited for. */
  later?: 1;
  /** On the queue for urgent requests. */
  urgent?: 1;
}

export const USERS: readonly (readonly [number, number])[] = [
  [0, 0],
  [1000, 1000],
  [0, 100],
  [65534, 65534],
  [0xffffffff, 0xffffffff],
  [12, 0],
];

/** What negative numbers mean in a 64-bit field: -1 is the first one. */
export const HUGE: readonly (readonly [low: number, high: number])[] = [
  [0xffffffff, 0xffffffff],
  [0xffffffff, 0x7fffffff],
  [0, 0x80000000],
  [0, 0x200000],
  [0xffffffff, 0x1fffff],
  [1, 1],
  [0, 0x40000000],
  [0xfffff000, 0xffffffff],
];

type Kind = 'node' | 'file' | 'dir' | 'any' | 'offset' | 'position' | 'long' | 'word';
/** Where an argument lies, what it is, and values to choose from. */
export interface Field {
  readonly at: number;
  readonly kind: Kind;
  readonly values: readonly number[];
}

const field = (at: number, kind: Kind, values: readonly number[] = []): Field => ({ at, kind, values });

const OFFSETS = [0, 0, 0, 1, 9, 4095, 4096, 65536, 131072, 300_000, 1 << 20, 16 << 20];
const SIZES = [0, 1, 9, 100, 1024, 4096, 4096, 8192, 32768, 65536];
const FLAGS = [0, 0, 1, 2, 2, 2, 0o1002, 0o2001, 0o200, 0o100000, 0o40002, 0o4010002, 0o10000000, 3, 0xffffffff];
const MODES = [0o644, 0o755, 0, 0o7777, 0o2755, 0o1777, 0o4711, 0xffffffff];
const TYPES = [0o100644, 0o100644, 0o010644, 0o140644, 0o020644, 0o060644, 0o040755, 0o120777, 0o644, 0o170000, 0xffffffff];
const IDS = [0, 1000, 100, 65534, 0xffffffff, 70000];
const SMALL = [0, 0, 1, 2, 4, 8, 0xffffffff];
const VALID = [1, 2, 4, 6, 8, 9, 16, 32, 48, 0x40, 0x48, 0x80, 0x100, 0x180, 0x200, 0x400, 0x800, 0x808, 0xfff, 0xffffffff];
const TIMES = [0, 1, 1_700_000_000, 4_000_000_000, 0x7fffffff];
const MASKS = [0, 2, 4, 8, 0x100, 0x200, 0x3c0, 0xfff, 0xfff | 0x8000000, 0x40000000, 0x10000000, 0xffffffff];

/** The fixed arguments of each request. */
// biome-ignore format: a table reads best with one row per line
export const FIELDS: Readonly<Record<OpName, { bytes: number; fields: readonly Field[] }>> = {
  LOOKUP: { bytes: 0, fields: [] },
  FORGET: { bytes: ForgetIn.bytes, fields: [field(ForgetIn.nlookup, 'long', [0, 1, 1, 1, 2, 5, 0xffffffff, 4294967296])] },
  GETATTR: { bytes: GetattrIn.bytes, fields: [field(GetattrIn.flags, 'word', [0, 0, 1, 1, 0xffffffff]), field(GetattrIn.fh, 'any')] },
  SETATTR: { bytes: SetattrIn.bytes, fields: [field(SetattrIn.valid, 'word', VALID), field(SetattrIn.fh, 'file'), field(SetattrIn.size, 'offset', OFFSETS),
    field(SetattrIn.mode, 'word', MODES), field(SetattrIn.uid, 'word', IDS), field(SetattrIn.gid, 'word', IDS), field(SetattrIn.atime, 'long', TIMES),
    field(SetattrIn.mtime, 'long', TIMES), field(SetattrIn.atimensec, 'word', [0, 999_999_999, 1_000_000_000, 0x3fffffff, 0x3ffffffe, 0xffffffff]), field(SetattrIn.mtimensec, 'word', [0, 5, 0x3ffffffe])] },
  READLINK: { bytes: 0, fields: [] },
  SYMLINK: { bytes: 0, fields: [] },
  MKNOD: { bytes: MknodIn.bytes, fields: [field(MknodIn.mode, 'word', TYPES), field(MknodIn.rdev, 'word', [0, 0x103, 0x105, 0xffffffff]), field(MknodIn.umask, 'word', [0o22, 0, 0o7777])] },
  MKDIR: { bytes: MkdirIn.bytes, fields: [field(MkdirIn.mode, 'word', MODES), field(MkdirIn.umask, 'word', [0o22, 0, 0xffffffff])] },
  UNLINK: { bytes: 0, fields: [] },
  RMDIR: { bytes: 0, fields: [] },
  RENAME: { bytes: RenameIn.bytes, fields: [field(RenameIn.newdir, 'node')] },
  LINK: { bytes: LinkIn.bytes, fields: [field(LinkIn.oldnodeid, 'node')] },
  OPEN: { bytes: OpenIn.bytes, fields: [field(OpenIn.flags, 'word', FLAGS), field(OpenIn.openFlags, 'word', [0, 1])] },
  READ: { bytes: ReadIn.bytes, fields: [field(ReadIn.fh, 'file'), field(ReadIn.offset, 'offset', OFFSETS), field(ReadIn.size, 'word', SIZES), field(ReadIn.readFlags, 'word', SMALL)] },
  WRITE: { bytes: WriteIn.bytes, fields: [field(WriteIn.fh, 'file'), field(WriteIn.offset, 'offset', OFFSETS), field(WriteIn.size, 'word', SIZES), field(WriteIn.writeFlags, 'word', SMALL), field(WriteIn.flags, 'word', [0, 0, 0x400])] },
  STATFS: { bytes: 0, fields: [] },
  RELEASE: { bytes: ReleaseIn.bytes, fields: [field(ReleaseIn.fh, 'file'), field(ReleaseIn.releaseFlags, 'word', SMALL)] },
  FSYNC: { bytes: FsyncIn.bytes, fields: [field(FsyncIn.fh, 'file'), field(FsyncIn.flags, 'word', SMALL)] },
  SETXATTR: { bytes: SetxattrIn.bytes, fields: [field(SetxattrIn.size, 'word', [0, 1, 9, 100, 4096, 65536]), field(SetxattrIn.flags, 'word', [0, 0, 1, 2, 3, 0xffffffff]), field(SetxattrIn.setxattrFlags, 'word', [0, 1])] },
  GETXATTR: { bytes: GetxattrIn.bytes, fields: [field(GetxattrIn.size, 'word', [0, 0, 1, 100, 4096, 65536, 0xffffffff])] },
  LISTXATTR: { bytes: GetxattrIn.bytes, fields: [field(GetxattrIn.size, 'word', [0, 1, 20, 4096, 65536, 0xffffffff])] },
  REMOVEXATTR: { bytes: 0, fields: [] },
  FLUSH: { bytes: FlushIn.bytes, fields: [field(FlushIn.fh, 'any'), field(FlushIn.lockOwner, 'long', [0, 1])] },
  INIT: { bytes: InitIn.bytes, fields: [field(InitIn.major, 'word', [7, 7, 7, 7, 6, 8, 0]), field(InitIn.minor, 'word', [45, 31, 38, 36, 30, 0, 999]), field(InitIn.maxReadahead, 'word', [131072, 0, 0xffffffff]), field(InitIn.flags, 'word', [0x7fffffff, 0, InitFlag.INIT_EXT, 0x13ffffff]), field(InitIn.flags2, 'word', [0xffffffff, 0, 0x10000000])] },
  OPENDIR: { bytes: OpenIn.bytes, fields: [field(OpenIn.flags, 'word', FLAGS)] },
  READDIR: { bytes: ReadIn.bytes, fields: [field(ReadIn.fh, 'dir'), field(ReadIn.offset, 'position'), field(ReadIn.size, 'word', [4096, 4096, 32768, 200, 24, 0, 0xffffffff])] },
  RELEASEDIR: { bytes: ReleaseIn.bytes, fields: [field(ReleaseIn.fh, 'dir')] },
  FSYNCDIR: { bytes: FsyncIn.bytes, fields: [field(FsyncIn.fh, 'dir'), field(FsyncIn.flags, 'word', SMALL)] },
  GETLK: { bytes: LkIn.bytes, fields: [field(LkIn.fh, 'file'), field(LkIn.owner, 'long', [1, 2]), field(LkIn.start, 'long', [0, 1]), field(LkIn.end, 'long', [0, 9]), field(LkIn.type, 'word', [0, 1, 2, 9])] },
  SETLK: { bytes: LkIn.bytes, fields: [field(LkIn.fh, 'file'), field(LkIn.owner, 'long', [1, 2]), field(LkIn.start, 'long', [0, 1]), field(LkIn.end, 'long', [0, 9]), field(LkIn.type, 'word', [0, 1, 2, 9]), field(LkIn.flags, 'word', SMALL)] },
  SETLKW: { bytes: LkIn.bytes, fields: [field(LkIn.fh, 'file'), field(LkIn.owner, 'long', [1, 2]), field(LkIn.start, 'long', [0, 1]), field(LkIn.end, 'long', [0, 9]), field(LkIn.type, 'word', [0, 1, 2, 9]), field(LkIn.flags, 'word', SMALL)] },
  ACCESS: { bytes: AccessIn.bytes, fields: [field(AccessIn.mask, 'word', [0, 1, 2, 4, 7, 0xffffffff])] },
  CREATE: { bytes: CreateIn.bytes, fields: [field(CreateIn.flags, 'word', FLAGS), field(CreateIn.mode, 'word', [0o100644, 0o100755, 0o644, 0o4755, 0xffffffff]), field(CreateIn.umask, 'word', [0o22, 0]), field(CreateIn.openFlags, 'word', [0, 1])] },
  INTERRUPT: { bytes: InterruptIn.bytes, fields: [field(InterruptIn.unique, 'long', [0, 1, 2, 1000])] },
  BMAP: { bytes: BmapIn.bytes, fields: [field(BmapIn.blocksize, 'word', [0, 512])] },
  DESTROY: { bytes: 0, fields: [] },
  IOCTL: { bytes: IoctlIn.bytes, fields: [field(IoctlIn.fh, 'any'), field(IoctlIn.flags, 'word', SMALL), field(IoctlIn.cmd, 'word', [0x80086601, 0x40086602, 0xffffffff]), field(IoctlIn.inSize, 'word', [0, 8, 100, 0xffffffff]), field(IoctlIn.outSize, 'word', [0, 8, 4096, 0xffffffff])] },
  POLL: { bytes: PollIn.bytes, fields: [field(PollIn.fh, 'file')] },
  NOTIFY_REPLY: { bytes: 0, fields: [] },
  BATCH_FORGET: { bytes: BatchForgetIn.bytes, fields: [field(BatchForgetIn.count, 'word', [0, 1, 2, 3, 8000, 0xffffffff])] },
  FALLOCATE: { bytes: FallocateIn.bytes, fields: [field(FallocateIn.fh, 'file'), field(FallocateIn.offset, 'offset', OFFSETS), field(FallocateIn.length, 'offset', [1, 4096, 65536, 0]), field(FallocateIn.mode, 'word', [0, 1, 3, 2, 8, 16, 32, 64, 0xffffffff])] },
  READDIRPLUS: { bytes: ReadIn.bytes, fields: [field(ReadIn.fh, 'dir'), field(ReadIn.offset, 'position'), field(ReadIn.size, 'word', [4096, 4096, 32768, 200, 160, 0, 0xffffffff])] },
  RENAME2: { bytes: Rename2In.bytes, fields: [field(Rename2In.newdir, 'node'), field(Rename2In.flags, 'word', [0, 1, 2, 4, 3, 0xffffffff])] },
  LSEEK: { bytes: LseekIn.bytes, fields: [field(LseekIn.fh, 'file'), field(LseekIn.offset, 'offset', OFFSETS), field(LseekIn.whence, 'word', [0, 1, 2, 3, 4, 5, 0xffffffff])] },
  COPY_FILE_RANGE: { bytes: CopyFileRangeIn.bytes, fields: [field(CopyFileRangeIn.fhIn, 'file'), field(CopyFileRangeIn.offIn, 'offset', OFFSETS), field(CopyFileRangeIn.nodeidOut, 'node'), field(CopyFileRangeIn.fhOut, 'file'), field(CopyFileRangeIn.offOut, 'offset', OFFSETS), field(CopyFileRangeIn.len, 'long', [0, 1, 4096, 131072]), field(CopyFileRangeIn.flags, 'long', [0, 0, 0, 1])] },
  COPY_FILE_RANGE_64: { bytes: CopyFileRangeIn.bytes, fields: [field(CopyFileRangeIn.fhIn, 'file'), field(CopyFileRangeIn.offIn, 'offset', OFFSETS), field(CopyFileRangeIn.nodeidOut, 'node'), field(CopyFileRangeIn.fhOut, 'file'), field(CopyFileRangeIn.offOut, 'offset', OFFSETS), field(CopyFileRangeIn.len, 'long', [0, 1, 4096, 131072]), field(CopyFileRangeIn.flags, 'long', [0, 0, 0, 1])] },
  SETUPMAPPING: { bytes: SetupmappingIn.bytes, fields: [] },
  REMOVEMAPPING: { bytes: RemovemappingIn.bytes, fields: [field(RemovemappingIn.count, 'word', [0, 1, 0xffffffff])] },
  SYNCFS: { bytes: SyncfsIn.bytes, fields: [] },
  TMPFILE: { bytes: CreateIn.bytes, fields: [field(CreateIn.flags, 'word', FLAGS), field(CreateIn.mode, 'word', [0o100644, 0o100755, 0o644]), field(CreateIn.umask, 'word', [0o22, 0])] },
  STATX: { bytes: StatxIn.bytes, fields: [field(StatxIn.flags, 'word', [0, 0, 1, 0xffffffff]), field(StatxIn.fh, 'any'), field(StatxIn.sxFlags, 'word', [0, 0x2000, 0x4000, 0xffffffff]), field(StatxIn.sxMask, 'word', [0xfff, 0, 0xffffffff])] },
  FSNOTIFY: { bytes: FsnotifyIn.bytes, fields: [field(FsnotifyIn.mask, 'word', MASKS), field(FsnotifyIn.mask + 4, 'word', [0, 0, 0, 0, 1]), field(FsnotifyIn.generation, 'word', [0, 0, 0, 1, 0xffffffff]), field(FsnotifyIn.flags, 'word', [0, 0, 0, 1, 2, 0xffffffff])] },
  READ_NOTIFY: { bytes: ReadNotifyIn.bytes, fields: [field(ReadNotifyIn.size, 'word', [4112, 0, 0xffffffff]), field(ReadNotifyIn.flags, 'word', [0, 0, 0, 0, 0, 1, 0xffffffff])] },
};

/** Requests with a name behind the arguments; with two; whose nodeid must be a directory's. */
const NAMED = new Set<OpName>(['LOOKUP', 'SYMLINK', 'MKNOD', 'MKDIR', 'UNLINK', 'RMDIR', 'RENAME', 'RENAME2', 'LINK', 'CREATE', 'TMPFILE']);
const TWICE = new Set<OpName>(['SYMLINK', 'RENAME', 'RENAME2']);
const XATTR = new Set<OpName>(['SETXATTR', 'GETXATTR', 'REMOVEXATTR']);
const CREATING = new Set<OpName>(['SYMLINK', 'MKNOD', 'MKDIR', 'CREATE', 'TMPFILE']);

/** How often which request comes. */
const OFTEN: readonly (readonly [OpName, number])[] = [
  ['LOOKUP', 24],
  ['FORGET', 6],
  ['BATCH_FORGET', 2],
  ['GETATTR', 8],
  ['SETATTR', 6],
  ['OPEN', 8],
  ['CREATE', 6],
  ['READ', 8],
  ['WRITE', 8],
  ['RELEASE', 6],
  ['OPENDIR', 5],
  ['READDIR', 5],
  ['READDIRPLUS', 6],
  ['RELEASEDIR', 3],
  ['MKDIR', 4],
  ['MKNOD', 3],
  ['SYMLINK', 2],
  ['LINK', 2],
  ['UNLINK', 4],
  ['RMDIR', 2],
  ['RENAME', 3],
  ['RENAME2', 3],
  ['SETXATTR', 3],
  ['GETXATTR', 3],
  ['LISTXATTR', 2],
  ['REMOVEXATTR', 2],
  ['LSEEK', 2],
  ['FALLOCATE', 2],
  ['COPY_FILE_RANGE', 2],
  ['TMPFILE', 2],
  ['STATX', 2],
  ['READLINK', 2],
  ['ACCESS', 2],
  ['FLUSH', 2],
  ['FSNOTIFY', 6],
  ['READ_NOTIFY', 4],
];
const OPS = Object.keys(FIELDS) as OpName[];
const WEIGHTED: OpName[] = [
  ...OPS.filter((op) => op !== 'INIT' && op !== 'DESTROY'),
  ...OFTEN.flatMap(([op, times]) => new Array<OpName>(times).fill(op)),
];

const ORDINARY = ['a', 'b', 'c', 'd', 'e', ...NAMES, 'file', 'dir', 'sub', 'dir', '0', '1xxxxxxx'];
const N255 = 'n'.repeat(255);
const HOSTILE = ['', '.', '..', '/', 'a/b', '../outside', N255, `${N255}n`, '\xff\xfe', 'a\0b', '\0', 'x'.repeat(4096), ' ', '-rf'];
const TARGETS = ['file', '../outside/secret', '/nowhere/at/all', '..', '', 'loop', 'y'.repeat(4095), 'z'.repeat(4096)];
const ATTRIBUTES = [
  'user.a',
  'user.b',
  'user.a',
  'trusted.t',
  'security.capability',
  'security.selinux',
  'system.posix_acl_access',
  'system.posix_acl_default',
  'user.virtiofs.user.a',
  '',
  'nothing',
  `user.${'n'.repeat(250)}`,
  `user.${'n'.repeat(251)}`,
];

function name(random: Random): string {
  return random.oneIn(30) ? random.pick(HOSTILE) : random.pick(ORDINARY);
}

function argument({ kind, values }: Field, random: Random): number {
  const odd = random.below(40) === 0;
  switch (kind) {
    case 'word':
      return odd ? random.u32() : random.pick(values);
    case 'long':
    case 'offset':
      return odd ? -1 - random.below(HUGE.length) : random.pick(values);
    default:
      return odd ? -1 - random.below(9) : random.below(64);
  }
}

/** Any request: mostly one that makes sense where it comes. */
export function anyRequest(random: Random): RequestStep {
  if (random.oneIn(500))
    return { op: random.pick([0, 7, 19, 54, 63, 64, 2047, 2050, 4096, 0xffffffff]), n: random.below(4), d: random.below(100) };
  const op = random.oneIn(1500) ? random.pick(['INIT', 'DESTROY'] as const) : random.pick(WEIGHTED);
  const step: RequestStep = { op, n: random.oneIn(50) ? -1 - random.below(9) : random.below(64) };
  const { fields } = FIELDS[op];
  if (fields.length > 0) step.a = fields.map((one) => argument(one, random));
  if (NAMED.has(op)) step.s = name(random);
  else if (XATTR.has(op)) step.s = random.pick(ATTRIBUTES);
  if (op === 'SYMLINK') step.t = random.pick(TARGETS);
  else if (TWICE.has(op)) step.t = name(random);
  if (op === 'WRITE') step.d = random.oneIn(20) ? random.below(5000) : -1;
  else if (op === 'SETXATTR') step.d = random.oneIn(20) ? random.below(5000) : -1;
  else if (op === 'IOCTL' || op === 'NOTIFY_REPLY') step.d = random.below(120);
  if (CREATING.has(op) && random.oneIn(8)) step.x = 1 + random.below(9);
  if (random.oneIn(25)) step.room = random.pick([0, 1, 15, 16, 17, 40, 100, 144, 200]);
  if (random.oneIn(150)) step.lie = random.pick([-40, -8, -1, 1, 8, 4096, -0x80000000]);
  if (random.oneIn(60)) step.cut = random.pick([1, 2, 4, 8, 20, 40, 60, -1, -4, -8, -600]);
  if (random.oneIn(4)) step.u = random.below(USERS.length);
  if (random.oneIn(3)) step.pieces = 1 + random.below(16);
  if (random.oneIn(10)) step.later = 1;
  if (random.oneIn(20)) step.urgent = 1;
  return step;
}
