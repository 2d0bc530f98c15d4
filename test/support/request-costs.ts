/**
 * The program that request-cost.test.ts runs: the daemon and a driver in one thread, requests in batches of equal ones. What it
 * prints of each batch: JavaScript memory that was allocated while it was served, kicks, interrupts. Under strace the system calls
 * of each batch lie between two markers.
 *
 *   request-costs.js ROUNDS FOLDER   the last ones of so many rounds count (those before them are for the compiler and the caches)
 */
import * as fs from 'node:fs';
import * as path from 'node:path';
import { getHeapStatistics } from 'node:v8';
import type { QueueDriver } from 'vhost-user-ts/testing';
import { commandLine } from '../../src/cli.js';
import { Daemon } from '../../src/daemon.js';
import {
  BmapIn,
  CreateIn,
  EntryOut,
  FallocateIn,
  FlushIn,
  ForgetIn,
  ForgetOne,
  GetattrIn,
  InitFlag2,
  InterruptIn,
  IoctlIn,
  LinkIn,
  LkIn,
  LseekIn,
  Opcode,
  PollIn,
  RemovemappingIn,
  Rename2In,
  RenameIn,
  SetupmappingIn,
  StatxIn,
  WriteIn,
} from '../../src/fuse/abi.js';
import { start } from '../../src/start.js';
import {
  cName,
  copyIn,
  decodeDirectory,
  decodeEntry,
  decodeOpen,
  FuseClient,
  fsyncIn,
  LINUX_INIT_FLAGS2,
  opcodeName,
  type Pending,
  readIn,
  releaseIn,
  Struct,
  setattrIn,
} from './fuse-client.js';
import { stepBegins, stepEnds } from './strace.js';

const [rounds, folder] = [Number(process.argv[2]), process.argv[3] as string];
/** Requests of one batch; jobs come one at a time, since how their ends group is left to chance. */
const BATCH = 16;
const PAGE = 4096;
const ROOM = 8192;
/** So many of the last rounds count. */
const COUNTED = 50;
/** Jobs wait for the disk, and only some tens of buffers can be lent: not in each round. */
const EACH = 8;
const FS_IOC_GETFLAGS = 0x80086601;
/** Opcodes that are answered ENOSYS, and the bytes of their arguments. */
const UNSUPPORTED = new Map<number, number>([
  [Opcode.GETLK, LkIn.bytes],
  [Opcode.SETLK, LkIn.bytes],
  [Opcode.SETLKW, LkIn.bytes],
  [Opcode.BMAP, BmapIn.bytes],
  [Opcode.POLL, PollIn.bytes],
  [Opcode.SETUPMAPPING, SetupmappingIn.bytes],
  [Opcode.REMOVEMAPPING, RemovemappingIn.bytes],
]);

export interface Cost {
  name: string;
  opcode: number;
  requests: number;
  /** Bytes of JavaScript objects in all: 0, or a batch like this one makes work for the garbage collector. */
  heap: number;
  kicks: number;
  interrupts: number;
}

const share = path.join(folder, 'share');
const socket = path.join(folder, 'socket');
fs.mkdirSync(share);
fs.mkdirSync(path.join(share, 'dir'));
for (let i = 0; i < BATCH; i++) fs.writeFileSync(path.join(share, `dir/f${i}`), Buffer.alloc(PAGE, 'x'));
fs.symlinkSync('target', path.join(share, 'link'));
// Files younger than a clock tick are compared by their handle; these measure the rest.
Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 120);

const config = await commandLine([
  ...[
    '--socket-path',
    socket,
    '--shared-dir',
    share,
    '--xattr',
    '--sandbox=none',
    '--seccomp=none',
    '--log-level=error',
    '--thread-pool-size=1',
  ],
]);
const daemon = new Daemon(config, start(config));
const client = FuseClient.connect(socket, { turn: () => daemon.turn(0), features: ~1n, queueSize: 1024 });
const [hiprio, requests] = client.driver.queues as [QueueDriver, QueueDriver];
// FUSE_HAS_FSNOTIFY too: what a guest with our patch offers.
client.init({ flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY });

// --- measuring ---

const costs: Cost[] = [];
/** What each batch has allocated in the last rounds. */
const allocated = new Map<string, number[]>();
/** Rounds to come. */
let left = rounds;

/** Bytes of objects in use; the answer is an object itself, of a size that does not change. */
const heapUsed = (): number => getHeapStatistics().used_heap_size;
/** What is allocated between two calls when nothing happens. */
function heapOfNothing(): number {
  const before = heapUsed();
  return heapUsed() - before;
}

/** Now and then the garbage collector gives something back meanwhile, or the runtime takes something. */
function mostFrequent(numbers: readonly number[]): number {
  const counts = new Map<number, number>();
  for (const number of numbers) counts.set(number, (counts.get(number) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? 0;
}

/** Serves what `submit` submits, `count` times, as one batch. Returns the replies' bodies. */
function batch(name: string, count: number, submit: (i: number) => Pending): Buffer[] {
  const before = hiprio.kicks + requests.kicks;
  const pending = Array.from({ length: count }, (_, i) => submit(i));
  const { queue, opcode } = pending[0] as Pending;
  const kicks = hiprio.kicks + requests.kicks - before;
  const nothing = heapOfNothing();
  queue.takeCalls();
  if (left === 0) stepBegins(costs.length + 1);
  const heapBefore = heapUsed();
  daemon.turn();
  // A job: its end is the next thing that happens.
  if (!queue.ready && opcode !== Opcode.READ_NOTIFY) daemon.turn();
  const heap = heapUsed() - heapBefore - nothing;
  if (left === 0) stepEnds();
  const interrupts = queue.takeCalls();
  if (left < COUNTED) allocated.set(name, [...(allocated.get(name) ?? []), heap]);
  if (left === 0) costs.push({ name, opcode, requests: count, heap: mostFrequent(allocated.get(name) ?? []), kicks, interrupts });
  if (opcode === Opcode.READ_NOTIFY) return [];
  return pending.map((one) => {
    const { error, body } = client.wait(one);
    // Not every file system has flags: the call is made all the same.
    if (error !== 0 && !UNSUPPORTED.has(opcode) && opcode !== Opcode.IOCTL) throw new Error(`${name}: errno ${-error}`);
    return body;
  });
}

type Body = readonly Uint8Array[];
const many = (name: string, opcode: number, nodeid: (i: number) => number, body: (i: number) => Body): Buffer[] =>
  batch(name, BATCH, (i) => client.submit(opcode, nodeid(i), body(i), ROOM));
const one = (name: string, opcode: number, nodeid: number, ...body: Body): Buffer[] =>
  batch(name, 1, () => client.submit(opcode, nodeid, body, ROOM));
const oneWay = (name: string, opcode: number, count: number, nodeid: (i: number) => number, body: (i: number) => Body): Buffer[] =>
  batch(name, count, (i) => client.submit(opcode, nodeid(i), body(i), 0, { queue: hiprio, writable: 0 }));

const nodeids = (replies: Buffer[]): number[] => replies.map((reply) => decodeEntry(reply).nodeid);
const handles = (replies: Buffer[], offset = 0): number[] => replies.map((reply) => decodeOpen(reply.subarray(offset)).fh);
const oneReference = new Struct(ForgetIn.bytes).u64(ForgetIn.nlookup, 1).bytes;
const nothing = (): Body => [];
const words = (...values: number[]): Uint8Array => new Uint8Array(Uint32Array.from(values).buffer);

const dir = client.lookup(1, 'dir').nodeid;
const link = client.lookup(1, 'link').nodeid;
const files = Array.from({ length: BATCH }, (_, i) => client.lookup(dir, `f${i}`).nodeid);
const file = (i: number): number => files[i] as number;
const inDir = (): number => dir;
const page = Buffer.alloc(PAGE, 'y');

/** What goes to the offload threads. */
function jobs(fh: (i: number) => number): void {
  one('FSYNC, a job', Opcode.FSYNC, file(0), fsyncIn(fh(0), false));
  one(
    'FALLOCATE, a job',
    Opcode.FALLOCATE,
    file(0),
    new Struct(FallocateIn.bytes).u64(FallocateIn.fh, fh(0)).u64(FallocateIn.length, PAGE).bytes,
  );
  const part = (i: number) => ({ nodeid: file(i), fh: fh(i), offset: 0 });
  one('COPY_FILE_RANGE, a job', Opcode.COPY_FILE_RANGE, file(0), copyIn(part(0), part(1), PAGE, 0));
  one('COPY_FILE_RANGE_64, a job', Opcode.COPY_FILE_RANGE_64, file(0), copyIn(part(0), part(1), PAGE, 0));
  one('SYNCFS, a job', Opcode.SYNCFS, 1, new Uint8Array(8));
}

function round(): void {
  // nodes
  many('LOOKUP', Opcode.LOOKUP, inDir, (i) => [cName(`f${i}`)]);
  oneWay('FORGET', Opcode.FORGET, BATCH, file, () => [oneReference]);
  many('LOOKUP of what is to be forgotten', Opcode.LOOKUP, inDir, (i) => [cName(`f${i}`)]);
  const forgets = files.map((nodeid) => new Struct(ForgetOne.bytes).u64(ForgetOne.nodeid, nodeid).u64(ForgetOne.nlookup, 1).bytes);
  oneWay(
    'BATCH_FORGET of 16',
    Opcode.BATCH_FORGET,
    1,
    () => 0,
    () => [words(BATCH, 0), ...forgets],
  );
  many('GETATTR', Opcode.GETATTR, file, () => [new Uint8Array(GetattrIn.bytes)]);
  many('STATX', Opcode.STATX, file, () => [new Struct(StatxIn.bytes).u32(StatxIn.sxMask, 0xfff).bytes]);
  many('SETATTR, mode', Opcode.SETATTR, file, () => [setattrIn({ mode: 0o644 })]);
  many('ACCESS', Opcode.ACCESS, file, () => [words(4, 0)]);
  many('STATFS', Opcode.STATFS, inDir, nothing);
  // names
  many('READLINK', Opcode.READLINK, () => link, nothing);
  const links = nodeids(many('SYMLINK', Opcode.SYMLINK, inDir, (i) => [cName(`s${i}`), cName('target')]));
  const nodes = nodeids(many('MKNOD', Opcode.MKNOD, inDir, (i) => [words(0o100644, 0, 0, 0), cName(`n${i}`)]));
  const folders = nodeids(many('MKDIR', Opcode.MKDIR, inDir, (i) => [words(0o755, 0), cName(`d${i}`)]));
  const named = nodeids(
    many('LINK', Opcode.LINK, inDir, (i) => [new Struct(LinkIn.bytes).u64(LinkIn.oldnodeid, file(i)).bytes, cName(`l${i}`)]),
  );
  many('RENAME', Opcode.RENAME, inDir, (i) => [new Struct(RenameIn.bytes).u64(RenameIn.newdir, dir).bytes, cName(`n${i}`), cName(`o${i}`)]);
  many('RENAME2', Opcode.RENAME2, inDir, (i) => [
    new Struct(Rename2In.bytes).u64(Rename2In.newdir, dir).u32(Rename2In.flags, 1).bytes,
    cName(`o${i}`),
    cName(`n${i}`),
  ]);
  many('UNLINK', Opcode.UNLINK, inDir, (i) => [cName(`s${i}`)]);
  many('RMDIR', Opcode.RMDIR, inDir, (i) => [cName(`d${i}`)]);
  for (const name of ['l', 'n']) many(`UNLINK of ${name}`, Opcode.UNLINK, inDir, (i) => [cName(`${name}${i}`)]);
  oneWay(
    'FORGET of what is gone',
    Opcode.FORGET,
    BATCH,
    (i) => nodes[i] as number,
    () => [oneReference],
  );
  for (const nodeid of [...links, ...folders, ...named]) client.forget(nodeid);
  // files
  const opened = handles(many('OPEN', Opcode.OPEN, file, () => [words(2, 0)]));
  const fh = (i: number): number => opened[i] as number;
  many('GETATTR with fh', Opcode.GETATTR, file, (i) => [
    new Struct(GetattrIn.bytes).u32(GetattrIn.flags, 1).u64(GetattrIn.fh, fh(i)).bytes,
  ]);
  many('READ', Opcode.READ, file, (i) => [readIn(fh(i), 0, PAGE, {})]);
  many('WRITE', Opcode.WRITE, file, (i) => [new Struct(WriteIn.bytes).u64(WriteIn.fh, fh(i)).u32(WriteIn.size, PAGE).bytes, page]);
  many('LSEEK', Opcode.LSEEK, file, (i) => [new Struct(LseekIn.bytes).u64(LseekIn.fh, fh(i)).u32(LseekIn.whence, 3).bytes]);
  many('IOCTL', Opcode.IOCTL, file, (i) => [
    new Struct(IoctlIn.bytes).u64(IoctlIn.fh, fh(i)).u32(IoctlIn.cmd, FS_IOC_GETFLAGS).u32(IoctlIn.outSize, 4).bytes,
  ]);
  many('FLUSH', Opcode.FLUSH, file, (i) => [new Struct(FlushIn.bytes).u64(FlushIn.fh, fh(i)).bytes]);
  if (left % EACH === 0) jobs(fh);
  many('RELEASE', Opcode.RELEASE, file, (i) => [releaseIn(fh(i), {})]);
  const creation = new Struct(CreateIn.bytes).u32(CreateIn.flags, 2).u32(CreateIn.mode, 0o644).bytes;
  const created = many('CREATE', Opcode.CREATE, inDir, (i) => [creation, cName(`c${i}`)]);
  const unnamed = many('TMPFILE', Opcode.TMPFILE, inDir, () => [creation, cName('/')]);
  for (const reply of [...created, ...unnamed]) {
    const { nodeid } = decodeEntry(reply);
    client.release(nodeid, handles([reply], EntryOut.bytes)[0] as number);
    client.forget(nodeid);
  }
  for (let i = 0; i < BATCH; i++) client.unlink(dir, `c${i}`);
  // directories
  const directories = handles(many('OPENDIR', Opcode.OPENDIR, inDir, () => [words(0, 0)]));
  const dirFh = (i: number): number => directories[i] as number;
  many('READDIR of 18', Opcode.READDIR, inDir, (i) => [readIn(dirFh(i), 0, PAGE, {})]);
  for (let i = 0; i < BATCH; i++) client.releasedir(dir, dirFh(i));
  const again = handles(many('OPENDIR again', Opcode.OPENDIR, inDir, () => [words(0, 0)]));
  const listed = one('READDIRPLUS of 18, known', Opcode.READDIRPLUS, dir, readIn(again[0] as number, 0, PAGE, {}));
  for (const { entry } of decodeDirectory(listed[0] as Buffer, true))
    if (entry !== undefined && entry.nodeid !== 0) client.forget(entry.nodeid);
  if (left % EACH === 0) one('FSYNCDIR, a job', Opcode.FSYNCDIR, dir, fsyncIn(again[0] as number, false));
  many('RELEASEDIR', Opcode.RELEASEDIR, inDir, (i) => [releaseIn(again[i] as number, {})]);
  // extended attributes
  const set = words(5, 0); // SETXATTR_EXT is only agreed on with ACLs
  many('SETXATTR', Opcode.SETXATTR, file, () => [set, cName('user.bench'), Buffer.from('value')]);
  many('GETXATTR', Opcode.GETXATTR, file, () => [words(256, 0), cName('user.bench')]);
  many('LISTXATTR', Opcode.LISTXATTR, file, () => [words(256, 0)]);
  many('REMOVEXATTR', Opcode.REMOVEXATTR, file, () => [cName('user.bench')]);
  // file events
  many('FSNOTIFY', Opcode.FSNOTIFY, file, () => [words(2, 0, 0, 0)]);
  many('FSNOTIFY, none', Opcode.FSNOTIFY, file, () => [words(0, 0, 0, 0)]);
  // Only so many can be lent, and none comes back without an event.
  if (left % EACH === 0) one('READ_NOTIFY', Opcode.READ_NOTIFY, 0, words(PAGE, 0));
  // what is answered without the file system
  oneWay(
    'INTERRUPT',
    Opcode.INTERRUPT,
    BATCH,
    () => 0,
    () => [new Uint8Array(InterruptIn.bytes)],
  );
  oneWay('NOTIFY_REPLY', Opcode.NOTIFY_REPLY, BATCH, () => 0, nothing);
  for (const [opcode, bytes] of UNSUPPORTED) many(opcodeName(opcode), opcode, file, () => [new Uint8Array(bytes)]);
}

while (left-- > 0) round();
console.log(JSON.stringify(costs));
process.exit();
