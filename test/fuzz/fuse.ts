/**
 * FUSE requests in stateful sequences, through a real ring, device, server and file system, and a model of what the guest knows by
 * then: which nodes, open files and directories. What comes back is checked as the guest's kernel would, and more strictly.
 */
import * as fs from 'node:fs';
import { dirname, join } from 'node:path';
import { Feature, features, hasFeature } from 'vhost-user-ts';
import type { MockDriver, MockMemory, QueueDriver, Segment } from 'vhost-user-ts/testing';
import { InHeader, InitFlag, InitFlag2, InitOut, NAME_MAX, Opcode } from '../../src/fuse/abi.js';
import { parse } from '../support/watch-guest.js';
import { type Case, must, type Target } from './engine.js';
import type { Random } from './random.js';
import { anyRequest, FIELDS, HUGE, type OpName, type RequestStep, USERS } from './requests.js';
import { lastFds, openFds, Rig, type RigOptions } from './rig.js';
import { type FuzzShare, NAMES } from './share.js';

/** Somebody on the host does something. */
interface HostStep {
  host: 'write' | 'unlink' | 'mkdir' | 'rename' | 'symlink' | 'chmod' | 'replace';
  s: string;
  t: string;
}

export type FuseStep = RequestStep | HostStep;

/** The daemon's options, and the guest's. */
export const SETUPS: readonly RigOptions[] = [
  { fs: { xattr: true }, server: { posixLock: true, flock: true }, fsnotify: 'auto', features: ~features(0, Feature.LOG_ALL) },
  { fs: { xattr: true, readonly: true }, server: { posixAcl: 'auto' } },
  {
    fs: { xattr: true, inodeFileHandles: 'never' },
    server: { writeback: true, killprivV2: true, securityLabel: 'auto' },
    fsnotify: 'inotify',
  },
  {
    fs: {
      xattr: true,
      xattrmap: ':map::user.virtiofs.:',
      cache: 'always',
      allowDirectIo: true,
      preserveNoatime: true,
      maxDescriptors: 64,
      translateUid: ['map:0:0:1', 'map:1000:1000:60000', 'forbid-guest:65534:1'],
    },
    server: { entryTimeout: 86400, attrTimeout: 86400, negativeTimeout: 5, exportSupport: true },
  },
  {
    fs: { xattr: true, cache: 'never' },
    server: { readdirplus: false, posixAcl: 'auto', killprivV2: true },
    inline: true,
    features: features(Feature.VERSION_1, Feature.PROTOCOL_FEATURES),
  },
  { fs: {}, fsnotify: 'auto', features: ~features(Feature.LOG_ALL) },
];

const S_IFMT = 0o170000;
const S_IFDIR = 0o040000;
const S_IFREG = 0o100000;
const TYPES = new Set([0o010000, 0o020000, 0o040000, 0o060000, 0o100000, 0o120000, 0o140000]);

const SLOTS = 24;
const REQUEST_BYTES = 160 << 10;
const REPLY_BYTES = 72 << 10;
const GUARD = 64;
const UNTOUCHED = 0xa5;
const untouched = Buffer.alloc(REPLY_BYTES + GUARD, UNTOUCHED);
/** Buffers that may be lent at a time: the others are for requests. */
const LENT = 10;
const NOTIFY_BUFFERS = 8;
const NOTIFY_BYTES = 4096;

/** Bytes of the body of each reply that has a fixed size. */
const BODY: Readonly<Partial<Record<OpName, number>>> = {
  LOOKUP: 128,
  GETATTR: 104,
  GETLK: 24,
  SETATTR: 104,
  STATX: 288,
  SYMLINK: 128,
  MKNOD: 128,
  MKDIR: 128,
  LINK: 128,
  OPEN: 16,
  OPENDIR: 16,
  CREATE: 144,
  TMPFILE: 144,
  WRITE: 8,
  STATFS: 80,
  LSEEK: 8,
  COPY_FILE_RANGE: 8,
  COPY_FILE_RANGE_64: 8,
  INIT: 64,
  FSNOTIFY: 16,
  UNLINK: 0,
  RMDIR: 0,
  RENAME: 0,
  RENAME2: 0,
  RELEASE: 0,
  RELEASEDIR: 0,
  FSYNC: 0,
  FSYNCDIR: 0,
  FLUSH: 0,
  SETXATTR: 0,
  REMOVEXATTR: 0,
  ACCESS: 0,
  FALLOCATE: 0,
  SYNCFS: 0,
  DESTROY: 0,
};
const NO_REPLY = new Set<string | number>(['FORGET', 'BATCH_FORGET', 'INTERRUPT', 'NOTIFY_REPLY']);
/** Requests that name a directory, and those that name an open file or directory in their first `fh`. */
const IN_DIRECTORY = new Set<string | number>([
  'LOOKUP',
  'SYMLINK',
  'MKNOD',
  'MKDIR',
  'UNLINK',
  'RMDIR',
  'RENAME',
  'RENAME2',
  'LINK',
  'CREATE',
  'TMPFILE',
  'OPENDIR',
]);
/** Requests that must fail for a node that the guest does not have. */
const NEEDS_NODE = new Set<string | number>([
  ...IN_DIRECTORY,
  'GETATTR',
  'STATX',
  'SETATTR',
  'READLINK',
  'OPEN',
  'ACCESS',
  'STATFS',
  'SETXATTR',
  'GETXATTR',
  'LISTXATTR',
  'REMOVEXATTR',
  'FSNOTIFY',
]);

const O_ACCMODE = 3;
const EBADF = 9;
const EIO = 5;
const O_RDONLY = 0;
const O_RDWR = 2;

interface Node {
  /** nodeid in two halves, and as a number. */
  low: number;
  high: number;
  id: number;
  count: number;
  type: number;
}

interface Handle {
  low: number;
  high: number;
  node: Node;
  readable: boolean;
  /** Where the next READDIR goes on. */
  positionLow: number;
  positionHigh: number;
}

/** Guest memory of one request. */
interface Slot {
  readonly request: Buffer;
  readonly words: Uint32Array;
  readonly address: number;
  readonly reply: Buffer;
  readonly room: number;
}

/** A request that is out. */
interface Flight {
  step: RequestStep;
  slot: Slot;
  room: number;
  /** What it was sent for, when that exists: then it may not fail for that reason. */
  node: Node | undefined;
  handle: Handle | undefined;
  /** Whether there was a session when it was sent. */
  session: boolean;
  /** Whether any part of it is broken on purpose, or others under way may come before it. */
  broken: boolean;
}

const ROOT: Node = { low: 1, high: 0, id: 1, count: 1, type: S_IFDIR };
const NOBODY: Node = { low: 0, high: 0, id: 0, count: 0, type: 0 };

const names = new Map<string, Buffer>();
function bytesOf(name: string): Buffer {
  let bytes = names.get(name);
  if (bytes === undefined) {
    bytes = Buffer.from(name, 'latin1');
    if (names.size < 10_000) names.set(name, bytes);
  }
  return bytes;
}

/** What serves the guest: the device in this thread, or a daemon. */
export interface FuseHost {
  readonly memory: MockMemory;
  readonly share: FuzzShare;
  /** Whether there can be notifications. */
  readonly events: boolean;
  /** A driver whose queues run. */
  drive(): MockDriver;
  /** A queue has requests. */
  kick(index: number): void;
  /** Waits until one that is under way is answered; false when none is. */
  job(): boolean;
  /** What the host did becomes events. */
  turn(): void;
  /** @throws Finding when the end of a session has left something */
  check(): void;
  close(): void;
}

/** A guest of one host. */
export class FuseGuest {
  readonly host: FuseHost;
  readonly driver: MockDriver;
  requests = 0;
  readonly #queue: number;
  readonly #free: Slot[] = [];
  readonly #flights: (Flight | undefined)[][];
  #lent = 0;
  #unique = 0;
  #session = false;
  /** An INIT was refused: whether it has ended the session is not known. */
  #unsure = false;
  #setxattrExt = false;
  #exportSupport = false;
  /** Requests that are not answered yet, but for what is lent. */
  #out = 0;

  #nodes: Node[] = [ROOT];
  #dirs: Node[] = [ROOT];
  readonly #byId = new Map<number, Node>();
  #files: Handle[] = [];
  #open: Handle[] = [];
  #forgotten: Node = NOBODY;
  #released: Handle | undefined;

  // The reference resolved last.
  #low = 0;
  #high = 0;
  readonly #notify: Segment[] = [];

  constructor(host: FuseHost) {
    this.host = host;
    this.driver = host.drive();
    const { memory } = host;
    for (let i = 0; i < SLOTS; i++) {
      const address = memory.allocate(REQUEST_BYTES, 4096);
      const room = memory.allocate(REPLY_BYTES + GUARD, 4096);
      const request = memory.view(address, REQUEST_BYTES);
      this.#free.push({
        request,
        words: new Uint32Array(request.buffer, request.byteOffset, REQUEST_BYTES >> 2),
        address,
        reply: memory.view(room, REPLY_BYTES + GUARD),
        room,
      });
    }
    this.#flights = this.driver.queues.map(() => []);
    const notification = hasFeature(this.driver.features, 0);
    this.#queue = notification ? 2 : 1;
    if (notification) {
      for (let i = 0; i < NOTIFY_BUFFERS; i++) this.#notify.push({ address: memory.allocate(NOTIFY_BYTES), length: NOTIFY_BYTES });
    }
  }

  /** From a fresh mount on. */
  begin(): void {
    this.#forget();
    this.#init();
    if (this.#notify.length > 0) {
      const queue = this.#driverQueue(1);
      for (const buffer of this.#notify) queue.add([], [buffer]);
      queue.publish();
      this.host.kick(1);
    }
  }

  run(steps: readonly FuseStep[]): void {
    let n = 0;
    for (const step of steps) {
      if ('host' in step) this.#host(step);
      else this.send(step);
      if ((++n & 15) === 0) this.#events();
    }
  }

  /** The end of a case: the device is as good as before, and nothing is left behind. */
  end(): void {
    this.#settle();
    if (!this.#session || this.#unsure) this.#init();
    const before = this.requests;
    this.send({ op: 'GETATTR', n: 0, a: [0, 0] });
    this.send({ op: 'DESTROY' });
    this.#settle();
    must(this.requests === before + 2, 'the last requests were not served');
    this.host.check();
    if (this.#notify.length > 0) {
      // The queue's buffers come back when it is stopped and started, as after a reset.
      const { frontend } = this.driver;
      frontend.getVringBase(1);
      this.#driverQueue(1).reset();
      this.driver.placeQueue(this.#driverQueue(1), 0);
      frontend.setVringKick(1, this.#driverQueue(1).kickFd);
    }
    this.host.turn();
  }

  #driverQueue(index: number): QueueDriver {
    return this.driver.queues[index] as QueueDriver;
  }

  #init(): void {
    this.#unsure = false;
    this.send({ op: 'INIT', a: [7, 45, 131072, 0x7fffffff & ~InitFlag.NO_OPEN_SUPPORT, 0x7fffffff & ~InitFlag2.OVER_IO_URING] });
    must(this.#session, 'no session could be begun');
  }

  /** All that the guest was given is void. */
  #forget(): void {
    for (const node of this.#nodes) if (node !== ROOT) this.#forgotten = node;
    this.#nodes = [ROOT];
    this.#dirs = [ROOT];
    this.#byId.clear();
    this.#files = [];
    this.#open = [];
  }

  // --- references ---

  #set(low: number, high: number): undefined {
    this.#low = low;
    this.#high = high;
    return undefined;
  }

  #node(ref: number, directory: boolean): Node | undefined {
    // Now and then something else where a directory is meant.
    const list = directory && ref < 56 ? this.#dirs : this.#nodes;
    if (ref >= 0) {
      const node = list[ref % list.length] as Node;
      this.#set(node.low, node.high);
      return node;
    }
    const last = this.#nodes[this.#nodes.length - 1] as Node;
    switch (ref) {
      case -1:
        return this.#set(0, 0);
      case -2:
      case -3:
        return this.#set(this.#forgotten.low, this.#forgotten.high);
      case -4:
        return this.#set(2, 0);
      case -5:
        return this.#set((last.low + (1 << 24)) >>> 0, last.high);
      case -6:
        return this.#set(last.low, last.high + 0x200000);
      default:
        return this.#set(...(HUGE[-ref % HUGE.length] as readonly [number, number]));
    }
  }

  #handle(ref: number, kind: 'file' | 'dir' | 'any'): Handle | undefined {
    const directory = kind === 'dir' || (kind === 'any' && (ref & 1) === 1);
    const list = directory ? this.#open : this.#files;
    if (ref >= 0 && list.length > 0) {
      const handle = list[ref % list.length] as Handle;
      this.#set(handle.low, handle.high);
      return handle;
    }
    const other = (directory ? this.#files : this.#open)[0];
    const same = list[0];
    if (ref === -1) return this.#set(0, 0);
    if (ref === -2 && this.#released !== undefined) return this.#set(this.#released.low, this.#released.high);
    if (ref === -3 && other !== undefined) {
      this.#set(other.low, other.high);
      return kind === 'any' ? other : undefined;
    }
    if (ref === -4 && same !== undefined) return this.#set(same.low + 1, same.high);
    if (ref === -5 && same !== undefined) return this.#set((same.low + (1 << 20)) >>> 0, same.high);
    if (ref >= 0) return this.#set(ref, 0);
    return this.#set(...(HUGE[-ref % HUGE.length] as readonly [number, number]));
  }

  // --- requests ---

  send(step: RequestStep): void {
    const { op } = step;
    const lends = lendsBuffer(step);
    if (lends && this.#lent >= LENT) return;
    if (this.#unsure && op !== 'INIT') this.#init();
    if (this.#free.length === 0) this.#settle();
    const racing = step.later === 1 || this.#out > 0;
    const slot = this.#free.pop() as Slot;
    const { words, request } = slot;
    const layout = typeof op === 'string' ? FIELDS[op] : { bytes: 0, fields: [] };
    const fixed = op === 'SETXATTR' && !this.#setxattrExt ? 8 : layout.bytes;
    let handle: Handle | undefined;
    let firstHandle = true;
    let broken = step.lie !== undefined || step.cut !== undefined;
    words.fill(0, 0, (InHeader.bytes + layout.bytes) >> 2);
    for (const [i, { at, kind }] of layout.fields.entries()) {
      const value = step.a?.[i] ?? 0;
      const word = (InHeader.bytes + at) >> 2;
      if (kind === 'word') {
        words[word] = value;
        continue;
      }
      if (kind === 'node') {
        if (this.#node(value, op !== 'LINK' && op !== 'COPY_FILE_RANGE' && op !== 'COPY_FILE_RANGE_64') === undefined) broken = true;
      } else if (kind === 'file' || kind === 'dir' || kind === 'any') {
        const found = this.#handle(value, kind);
        if (firstHandle) {
          handle = found;
          firstHandle = false;
        }
        if (found === undefined) broken = true;
      } else if (kind === 'position') {
        const from = (value & 7) === 7 ? undefined : value & 1 ? handle : ROOT;
        if (value < 0) this.#set(...(HUGE[-value % HUGE.length] as readonly [number, number]));
        else if (from === undefined) this.#set(value, 0);
        else if (from === ROOT) this.#set(0, 0);
        else this.#set((from as Handle).positionLow, (from as Handle).positionHigh);
      } else if (value < 0) {
        this.#set(...(HUGE[(-1 - value) % HUGE.length] as readonly [number, number]));
        broken = true;
      } else this.#set(value >>> 0, Math.floor(value / 4294967296));
      words[word] = this.#low;
      words[word + 1] = this.#high;
    }
    // Who has an open file names its node, too; sometimes another one.
    const ref = step.n ?? 0;
    let node: Node | undefined;
    if (!firstHandle && handle !== undefined && op !== 'GETATTR' && op !== 'STATX' && op !== 'SETATTR' && ref >= 0 && ref < 60) {
      node = handle.node;
      this.#set(node.low, node.high);
    } else {
      node = this.#node(ref, IN_DIRECTORY.has(op));
      if (!firstHandle && node !== handle?.node) broken = true;
    }
    const nodeLow = this.#low;
    const nodeHigh = this.#high;

    let end = InHeader.bytes + fixed;
    if (step.s !== undefined) end = this.#name(request, end, step.s);
    if (step.t !== undefined) end = this.#name(request, end, step.t);
    if (op === 'BATCH_FORGET') end = this.#forgets(step, words, end);
    else if (step.d !== undefined) {
      const said = op === 'WRITE' ? step.a?.[2] : step.a?.[0];
      const bytes = Math.min(step.d < 0 ? (said ?? 0) : step.d, REQUEST_BYTES - 8192);
      if (step.d >= 0 && step.d !== said) broken = true;
      end += bytes; // whatever the memory holds
    }
    let extensions = 0;
    if (step.x !== undefined) {
      const start = end;
      end = this.#extensions(request, end, step.x);
      extensions = (end - start) >> 3;
      broken = true;
    }
    if (step.cut !== undefined) {
      if (step.cut < 0) request.fill(0, end, end - step.cut);
      end = Math.max(0, end - step.cut);
    }
    const user = USERS[step.u ?? 0] ?? USERS[0];
    words[0] = end + (step.lie ?? 0);
    words[1] = typeof op === 'string' ? Opcode[op] : op;
    words[2] = ++this.#unique;
    words[3] = 0x1234;
    words[4] = nodeLow;
    words[5] = nodeHigh;
    words[6] = user?.[0] as number;
    words[7] = user?.[1] as number;
    words[8] = 4242;
    words[9] = extensions;

    const room = Math.min(step.room ?? this.#room(step), REPLY_BYTES);
    if (step.room !== undefined) broken = true;
    slot.reply.fill(UNTOUCHED, 0, room + GUARD);
    const index = step.urgent === 1 ? 0 : this.#queue;
    const queue = this.#driverQueue(index);
    const pieces = Math.max(1, step.pieces ?? 1);
    const indirect = pieces > 8 && hasFeature(this.driver.features, Feature.INDIRECT_DESC);
    const count = pieces > 8 ? pieces - 7 : pieces;
    const readable = split(slot.address, end, count);
    const writable = room === 0 ? [] : split(slot.room, room, count);
    let head = queue.add(readable, writable, indirect);
    if (head < 0) {
      this.#settle();
      head = queue.add(readable, writable, indirect);
      must(head >= 0, 'the ring is full of requests that are not answered');
    }
    const flights = this.#flights[index] as (Flight | undefined)[];
    flights[head] = { step, slot, room, node, handle, session: this.#session, broken: broken || racing };
    if (lends) this.#lent++;
    else this.#out++;
    queue.publish();
    this.requests++;
    this.host.kick(index);
    this.#collect(index);
    if (lends || step.later === 1) return;
    while (flights[head] !== undefined) this.#await();
  }

  #room({ op, a }: RequestStep): number {
    switch (op) {
      case 'READ':
      case 'READDIR':
      case 'READDIRPLUS': {
        const size = a?.[2] ?? 0;
        return 16 + (size <= 65536 ? size : 4096);
      }
      case 'GETXATTR':
      case 'LISTXATTR': {
        const size = a?.[0] ?? 0;
        return 16 + (size <= 65536 ? Math.max(size, 8) : 65536);
      }
      case 'READ_NOTIFY':
        return 16 + NOTIFY_BYTES;
      case 'READLINK':
        return 16 + 4096;
      case 'IOCTL':
        return 32 + 4096;
      default:
        return 16 + (BODY[op as OpName] ?? 100);
    }
  }

  #name(request: Buffer, at: number, name: string): number {
    const bytes = bytesOf(name);
    bytes.copy(request, at);
    request[at + bytes.length] = 0;
    return at + bytes.length + 1;
  }

  #forgets({ n, a }: RequestStep, words: Uint32Array, at: number): number {
    const count = Math.min(a?.[0] ?? 0, 3);
    for (let i = 0; i < count; i++, at += 16) {
      this.#node((n ?? 0) + i, false);
      words[at >> 2] = this.#low;
      words[(at >> 2) + 1] = this.#high;
      words[(at >> 2) + 2] = 1;
      words[(at >> 2) + 3] = 0;
    }
    return at;
  }

  /** Extensions that are what they should be (1 to 3), and others. */
  #extensions(request: Buffer, at: number, kind: number): number {
    const put = (...values: number[]): void => {
      for (const value of values) at = request.writeUInt32LE(value >>> 0, at);
    };
    if (kind & 1) put(16, 32, kind >= 8 ? 2 : 1, 100);
    if (kind & 2) {
      const name = Buffer.from('security.selinux\0context\0');
      const size = kind >= 4 ? [7, 200, 0xffffffff, 26][kind & 3] : 8;
      const bytes = (8 + 8 + name.length + 7) & ~7;
      request.fill(0, at, at + bytes);
      put(kind === 6 ? 4 : bytes, kind === 7 ? 31 : 1, size as number, 0);
      name.copy(request, at);
      at += bytes - 16;
    }
    if (kind >= 8) put(8, 33);
    return at;
  }

  // --- replies ---

  #collect(index: number): void {
    const queue = this.#driverQueue(index);
    if (!queue.ready) return;
    const flights = this.#flights[index] as (Flight | undefined)[];
    for (const { head, length } of queue.collect()) {
      const flight = flights[head] as Flight;
      flights[head] = undefined;
      this.#free.push(flight.slot);
      this.#reply(flight, length);
    }
  }

  /** Something is under way, and comes back. */
  #await(): void {
    must(this.host.job(), 'a request was neither answered nor is it under way');
    for (const index of [0, this.#queue]) this.#collect(index);
  }

  /** Waits until nothing is under way but what the guest has lent; then that is called back, too. */
  #settle(): void {
    for (const index of [0, this.#queue]) this.#collect(index);
    while (this.#out > 0) this.#await();
    // One that is on its way in the other queue is lent after the first STOP; a busy queue is served 512 times before another.
    for (let tries = 0; this.#lent > 0; tries++) {
      must(tries < 2000 && this.#free.length > 0, () => `${this.#lent} lent buffers did not come back`);
      this.send({ op: 'READ_NOTIFY', a: [0, 1], room: 16 });
      for (const index of [0, this.#queue]) this.#collect(index);
    }
  }

  #events(): void {
    if (!this.host.events) return;
    this.host.turn();
    this.#collect(0);
    this.#collect(this.#queue);
    if (this.#notify.length === 0) return;
    const queue = this.#driverQueue(1);
    if (!queue.ready) return;
    const back: Segment[] = [];
    for (const { head, length } of queue.collect()) {
      const address = this.#addressOf(head);
      if (length > 0) parse(this.host.memory.view(address, length));
      back.push({ address, length: NOTIFY_BYTES });
    }
    for (const buffer of back) queue.add([], [buffer]);
    queue.publish();
    this.host.kick(1);
  }

  /** Where the descriptor of a returned notification points. */
  #addressOf(head: number): number {
    const queue = this.#driverQueue(1);
    return Number(this.host.memory.view(queue.descriptors + 16 * head, 8).readBigUInt64LE(0));
  }

  #reply(flight: Flight, used: number): void {
    const { step, slot, room } = flight;
    const { op } = step;
    const { reply } = slot;
    const tell = (): string => JSON.stringify(step);
    if (lendsBuffer(step)) this.#lent--;
    else this.#out--;
    // O_DIRECT reads whole blocks, also where the file ends.
    const free = op === 'READ' ? room : used;
    must(
      untouched.compare(reply, free, room + GUARD, 0, room + GUARD - free) === 0,
      () => `${tell()}: bytes behind the ${used} of the reply were written`,
    );
    if (NO_REPLY.has(op) && flight.step.lie === undefined && flight.step.cut === undefined)
      must(used === 0, () => `${tell()} was answered`);
    if (used === 0) {
      must(room < 16 || NO_REPLY.has(op), () => `${tell()} was not answered`);
      if (op === 'FORGET' || op === 'BATCH_FORGET') this.#forgot(flight);
      return;
    }
    must(used >= 16 && reply.readUInt32LE(0) === used, () => `${tell()}: length ${reply.readUInt32LE(0)} in ${used} bytes`);
    must(reply.readUInt32LE(12) === 0x1234 || step.cut !== undefined, () => `${tell()}: unique of somebody else`);
    const error = reply.readInt32LE(4);
    must(error <= 0 && error > -512, () => `${tell()}: error ${error}`);
    must(error === 0 || used === 16, () => `${tell()}: error ${error} and ${used} bytes`);
    if (!this.#session && op !== 'INIT') {
      must(error < 0 || flight.session, () => `${tell()} was served without a session`);
      return;
    }
    if (error === 0) this.#succeeded(flight, used - 16);
    else this.#failed(flight, -error);
  }

  /** What may not fail in this way. */
  #failed({ step, node, handle, broken }: Flight, errno: number): void {
    const tell = (): string => `${JSON.stringify(step)}: errno ${errno}`;
    const { op } = step;
    if (op === 'INIT') {
      // One that was refused before it was read has ended nothing.
      this.#ended();
      this.#unsure = true;
      return;
    }
    if (broken) return;
    if (op === 'GETATTR' && node === ROOT && (step.a?.[0] ?? 0) % 2 === 0) must(false, tell);
    if (handle !== undefined && handle.node === node) {
      if (op === 'RELEASE' || op === 'RELEASEDIR') must(false, tell);
      if (op === 'READ' && handle.readable) must(errno !== EBADF && errno !== EIO, tell);
      if (op === 'READDIR' || op === 'READDIRPLUS') must(errno !== EBADF, tell);
    }
  }

  #succeeded(flight: Flight, bytes: number): void {
    const { step, node, handle } = flight;
    const { op } = step;
    const { reply } = flight.slot;
    const tell = (): string => JSON.stringify(step);
    const size = BODY[op as OpName];
    if (size !== undefined) must(bytes === size, () => `${tell()}: a body of ${bytes} bytes`);
    // An open file answers for its node, also when that is forgotten.
    const { words } = flight.slot;
    const byHandle =
      (op === 'GETATTR' || op === 'STATX') &&
      (step.a?.[0] ?? 0) % 2 === 1 &&
      handle?.node.low === words[4] &&
      handle?.node.high === words[5];
    // With export support what was forgotten can be found for a while.
    const exported = this.#exportSupport && words[4] === this.#forgotten.low && words[5] === this.#forgotten.high;
    must(node !== undefined || byHandle || exported || !NEEDS_NODE.has(op), () => `${tell()} was served for a node that nobody has`);
    switch (op) {
      case 'LOOKUP':
      case 'SYMLINK':
      case 'MKNOD':
      case 'MKDIR':
      case 'LINK':
        this.#entry(reply, 16, tell, op === 'LOOKUP');
        break;
      case 'CREATE':
      case 'TMPFILE':
        this.#opened(reply, 16 + 128, this.#entry(reply, 16, tell, false), step.a?.[0] ?? 0, false, tell);
        break;
      case 'OPEN':
      case 'OPENDIR':
        this.#opened(reply, 16, node ?? this.#forgotten, step.a?.[0] ?? 0, op === 'OPENDIR', tell);
        break;
      case 'GETATTR':
      case 'SETATTR':
        if (node !== undefined)
          must((reply.readUInt32LE(16 + 16 + 60) & S_IFMT) === node.type, () => `${tell()}: another type than ${node.type}`);
        break;
      case 'READ':
        must(bytes <= (step.a?.[2] ?? 0), () => `${tell()}: ${bytes} bytes read`);
        must(handle !== undefined, () => `${tell()}: read from a file that is not open`);
        break;
      case 'WRITE':
        must(handle !== undefined, () => `${tell()}: written to a file that is not open`);
        break;
      case 'READDIR':
      case 'READDIRPLUS':
        must(handle !== undefined, () => `${tell()}: entries of a directory that is not open`);
        must(bytes <= (step.a?.[2] ?? 0), () => `${tell()}: ${bytes} bytes of entries`);
        this.#entries(reply, bytes, op === 'READDIRPLUS', handle, tell);
        break;
      case 'READLINK':
        must(bytes > 0 && bytes < 4096, () => `${tell()}: ${bytes} bytes`);
        break;
      case 'GETXATTR':
      case 'LISTXATTR':
        must(step.a?.[0] === 0 ? bytes === 8 : bytes <= Math.min(step.a?.[0] ?? 0, 65536), () => `${tell()}: ${bytes} bytes`);
        break;
      case 'RELEASE':
      case 'RELEASEDIR':
        must(handle !== undefined, () => `${tell()}: released what is not open`);
        this.#close(handle as Handle, op === 'RELEASEDIR');
        break;
      case 'READ_NOTIFY':
        if (bytes > 0) parse(reply.subarray(16, 16 + bytes));
        break;
      case 'INIT':
        this.#ended();
        // To another major version only 7 is said, and the guest asks anew.
        this.#session = (step.a?.[0] ?? 0) === 7;
        this.#setxattrExt = (reply.readUInt32LE(16 + InitOut.flags) & InitFlag.SETXATTR_EXT) !== 0;
        this.#exportSupport = (reply.readUInt32LE(16 + InitOut.flags) & InitFlag.EXPORT_SUPPORT) !== 0;
        break;
      case 'DESTROY':
        this.#ended();
        break;
    }
  }

  #ended(): void {
    this.#session = false;
    this.#forget();
  }

  /** fuse_entry_out: the guest has one reference more. */
  #entry(reply: Buffer, at: number, tell: () => string, negative: boolean): Node {
    const low = reply.readUInt32LE(at);
    const high = reply.readUInt32LE(at + 4);
    const id = low + high * 4294967296;
    if (id === 0) {
      must(negative, () => `${tell()}: no node`);
      return NOBODY;
    }
    const type = reply.readUInt32LE(at + 40 + 60) & S_IFMT;
    must(TYPES.has(type) && high < 0x200000, () => `${tell()}: node ${id} of type ${type.toString(8)}`);
    must((reply[at + 40 + 15] as number) < 0x80, () => `${tell()}: a negative size`);
    if (id === 1) {
      must(type === S_IFDIR, () => `${tell()}: a root of type ${type.toString(8)}`);
      return ROOT;
    }
    let node = this.#byId.get(id);
    if (node === undefined) {
      node = { low, high, id, count: 0, type };
      this.#byId.set(id, node);
      this.#nodes.push(node);
      if (type === S_IFDIR) this.#dirs.push(node);
    }
    must(node.type === type, () => `${tell()}: node ${id} was of type ${node.type.toString(8)}, is of type ${type.toString(8)}`);
    node.count++;
    return node;
  }

  #opened(reply: Buffer, at: number, node: Node, flags: number, directory: boolean, tell: () => string): void {
    must(
      (node.type === S_IFDIR) === directory && (directory || node.type === S_IFREG),
      () => `${tell()}: something of type ${node.type.toString(8)} was opened`,
    );
    const low = reply.readUInt32LE(at);
    const high = reply.readUInt32LE(at + 4);
    const list = directory ? this.#open : this.#files;
    const used = (one: Handle): boolean => one.low === low && one.high === high;
    must(!this.#files.some(used) && !this.#open.some(used), () => `${tell()}: a file handle that is in use`);
    const readable = (flags & O_ACCMODE) === O_RDONLY || (flags & O_ACCMODE) === O_RDWR;
    // The server bounds what is open; so does this guest.
    list.push({ low, high, node, readable, positionLow: 0, positionHigh: 0 });
  }

  #close(handle: Handle, directory: boolean): void {
    this.#released = handle;
    remove(directory ? this.#open : this.#files, handle);
  }

  /** The entries as fs/fuse/readdir.c parses them. */
  #entries(reply: Buffer, bytes: number, plus: boolean, handle: Handle | undefined, tell: () => string): void {
    for (let at = 16; at < 16 + bytes; ) {
      const dirent = plus ? at + 128 : at;
      const length = reply.readUInt32LE(dirent + 16);
      const end = dirent + 24 + length;
      must(length > 0 && length <= NAME_MAX && end <= 16 + bytes, () => `${tell()}: a name of ${length} bytes`);
      for (let i = dirent + 24; i < end; i++) must(reply[i] !== 0 && reply[i] !== 0x2f, () => `${tell()}: a name with / or NUL`);
      if (plus && (reply.readUInt32LE(at) !== 0 || reply.readUInt32LE(at + 4) !== 0)) this.#entry(reply, at, tell, false);
      if (handle !== undefined) {
        handle.positionLow = reply.readUInt32LE(dirent + 8);
        handle.positionHigh = reply.readUInt32LE(dirent + 12);
      }
      at = (end + 7) & ~7;
    }
  }

  #forgot({ step, node, slot }: Flight): void {
    if (!this.#session || (step.lie ?? 0) !== 0) return;
    const bytes = slot.words[0] as number;
    if (step.op === 'FORGET') {
      if (node === undefined || bytes < 48) return;
      this.#drop(node, (slot.words[10] as number) + (slot.words[11] as number) * 4294967296);
      return;
    }
    const count = slot.words[10] as number;
    if (bytes < 48 || count * 16 > bytes - 48) return;
    for (let i = 0; i < count; i++) {
      const word = (48 + i * 16) >> 2;
      const found = this.#byId.get((slot.words[word] as number) + (slot.words[word + 1] as number) * 4294967296);
      if (found !== undefined) this.#drop(found, (slot.words[word + 2] as number) + (slot.words[word + 3] as number) * 4294967296);
    }
  }

  #drop(node: Node, count: number): void {
    if (node === ROOT) return;
    node.count -= count;
    if (node.count > 0) return;
    this.#forgotten = node;
    this.#byId.delete(node.id);
    remove(this.#nodes, node);
    remove(this.#dirs, node);
  }

  // --- the host ---

  #host({ host, s, t }: HostStep): void {
    const { path } = this.host.share;
    // The guest has made symbolic links of directories: they lead this program out of the share.
    const at = (name = ''): string => {
      const to = join(path, name);
      if (!`${fs.realpathSync(dirname(to))}/`.startsWith(`${path}/`)) throw new Error('outside');
      return to;
    };
    try {
      switch (host) {
        case 'write':
          write(at(s), t);
          break;
        case 'unlink':
          fs.rmSync(at(s), { recursive: true, force: true });
          break;
        case 'mkdir':
          fs.mkdirSync(at(s));
          break;
        case 'rename':
          fs.renameSync(at(s), at(t));
          break;
        case 'replace':
          fs.rmSync(at(s), { recursive: true, force: true });
          fs.mkdirSync(at(s));
          break;
        case 'symlink':
          fs.symlinkSync('../outside', at(s));
          break;
        case 'chmod':
          fs.lchownSync(at(s), 1000, 1000);
          break;
      }
    } catch {
      // Whatever can be done now.
    }
  }
}

/** Whether the request stays with the device until there is a notification, and is no STOP. */
function lendsBuffer({ op, a }: RequestStep): boolean {
  return op === 'READ_NOTIFY' && ((a?.[1] ?? 0) & 1) === 0;
}

function remove<T>(list: T[], item: T): void {
  const at = list.indexOf(item);
  if (at >= 0) list.splice(at, 1);
}

/** Writes to a file, never through a symbolic link and never waiting for a FIFO's reader. */
function write(path: string, text: string): void {
  const { O_WRONLY, O_CREAT, O_NOFOLLOW, O_NONBLOCK } = fs.constants;
  const fd = fs.openSync(path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK);
  fs.writeSync(fd, text);
  fs.closeSync(fd);
}

/** `count` pieces of memory one behind the other. */
function split(address: number, bytes: number, count: number): Segment[] {
  if (count === 1) return [{ address, length: bytes }];
  const pieces: Segment[] = [];
  const each = Math.floor(bytes / count);
  for (let i = 0; i < count; i++) pieces.push({ address: address + i * each, length: i === count - 1 ? bytes - i * each : each });
  return pieces;
}

/** The device in this thread. */
class InThread implements FuseHost {
  readonly memory: MockMemory;
  readonly share: FuzzShare;
  readonly events: boolean;
  readonly #rig: Rig;

  constructor(options: RigOptions) {
    this.#rig = new Rig(options);
    this.memory = this.#rig.memory;
    this.share = this.#rig.share;
    this.events = this.#rig.events !== undefined;
  }

  drive(): MockDriver {
    return this.#rig.drive();
  }

  kick(index: number): void {
    const queue = this.#rig.backend?.queue(index);
    if (queue !== undefined) this.#rig.device.serve(queue);
  }

  job(): boolean {
    return this.#rig.job();
  }

  turn(): void {
    this.#rig.turn();
  }

  check(): void {
    const { share } = this.#rig.fs;
    must(share.handles.open === 0, () => `${share.handles.open} file handles are left`);
    must(share.descriptors === 1, () => `${share.descriptors} descriptors are left of ${openFds()}`);
    must(this.#rig.lines < 200, () => `${this.#rig.lines} lines in the log`);
    this.#rig.lines = 0;
  }

  close(): void {
    this.#rig.close();
  }
}

const HOST_NAMES = ['a', 'b', 'c', 'd', 'dir', 'dir/a', 'dir/sub', 'file', 'many/0', 'deep/dir'];
const HOST: readonly HostStep['host'][] = ['write', 'write', 'unlink', 'mkdir', 'rename', 'symlink', 'chmod', 'replace'];

/** What a guest does from its mount on, and the host meanwhile. */
export function anySession(random: Random, hosts: boolean): FuseStep[] {
  const steps: FuseStep[] = [];
  // Most of a guest's first requests are look-ups.
  for (let i = random.below(10); i > 0; i--) steps.push({ op: 'LOOKUP', n: random.below(8), s: random.pick(NAMES) });
  for (let i = 20 + random.below(random.oneIn(4) ? 2500 : 600); i > 0; i--) {
    if (hosts && random.oneIn(80)) steps.push({ host: random.pick(HOST), s: random.pick(HOST_NAMES), t: random.pick(HOST_NAMES) });
    else steps.push(anyRequest(random));
  }
  return steps;
}

export class FuseTarget implements Target<FuseStep> {
  readonly name = 'fuse';
  readonly #guests: (FuseGuest | undefined)[] = [];
  /** Descriptors that each guest's cases have left. */
  readonly #left: number[] = [];

  generate(random: Random): Case<FuseStep> {
    const setup = random.below(SETUPS.length);
    return { setup, steps: anySession(random, SETUPS[setup]?.fs?.readonly !== true) };
  }

  run({ setup, steps }: Case<FuseStep>): number {
    const index = setup % SETUPS.length;
    let guest = this.#guests[index];
    const options = SETUPS[index] as RigOptions;
    if (guest === undefined) {
      guest = new FuseGuest(new InThread(options));
      this.#guests[index] = guest;
    }
    const { share } = guest.host;
    const readonly = options.fs?.readonly === true;
    if (!readonly) share.refill();
    const before = readonly ? share.contents() : '';
    const fds = openFds();
    guest.requests = 0;
    try {
      guest.begin();
      guest.run(steps);
      guest.end();
      share.checkOutside();
      if (readonly) must(share.contents() === before, 'a read-only share has changed');
      this.#left[index] = (this.#left[index] ?? 0) + openFds() - fds;
      // What a mount needs is opened once.
      must(this.#left[index] < 64, () => `${this.#left[index]} descriptors are left: ${lastFds()}`);
    } catch (error) {
      // The next case begins with a daemon that has not seen this one.
      this.#guests[index] = undefined;
      delete this.#left[index];
      try {
        guest.host.close();
      } catch {
        // It was the daemon's end that failed.
      }
      throw error;
    }
    return guest.requests;
  }

  close(): void {
    for (const guest of this.#guests) guest?.host.close();
    this.#guests.length = 0;
  }
}
