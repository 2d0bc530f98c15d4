/**
 * Streams of live migration as no daemon writes them: records in any order, of wrong sizes, with numbers that mean nothing, paths and file
 * handles that lead out of the share, in pieces, cut off.
 *
 * Whatever comes, nothing of it is outside the share, nothing in the share changes, and a reset leaves no descriptor. What was taken over
 * can be saved.
 */
import { readlinkSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { arena, arenaAlloc, cString, native } from 'vhost-user-ts/native';
import { Kind } from '../../src/fs/handles.js';
import { Inode, ROOT_NODEID, SHIFT } from '../../src/fs/inodes.js';
import { InitFlag2 } from '../../src/fuse/abi.js';
import { DEFAULT_SERVER_OPTIONS, negotiate, type Session } from '../../src/fuse/init.js';
import { Migration, type MigrationOptions } from '../../src/migration/migration.js';
import {
  Found,
  HandleRecord,
  InodeRecord,
  LockRecord,
  MAGIC_HIGH,
  MAGIC_LOW,
  padded,
  RecordType,
  VERSION,
} from '../../src/migration/stream.js';
import { LINUX_INIT_FLAGS, LINUX_INIT_FLAGS2 } from '../support/fuse-client.js';
import { type Case, must, type Target } from './engine.js';
import type { Random } from './random.js';
import { lastFds, openFds, Rig, type RigOptions } from './rig.js';

/** What is off about a record. */
interface Broken {
  /** The length in its header is off by so much. */
  lie?: number;
  /** Only so many bytes of it are there, and nothing behind it. */
  cut?: number;
}

/** Doubles are as they are, or, below 0, one of {@link ODD}. */
type Step = Broken &
  (
    | { op: 'start'; version?: number; magic?: number }
    | { op: 'session'; minor?: number; flags?: number; flags2?: number; readahead?: number; inodes?: number; handles?: number }
    | { op: 'mount'; index: number; path: string; bytes?: number }
    | {
        op: 'inode';
        id: number;
        count: number;
        type: number;
        found: number;
        mount: number;
        path: string;
        /** The file handle is that of this file; bytes of a random one. */
        of?: string;
        random?: number;
        handleBytes?: number;
        pathBytes?: number;
      }
    | { op: 'handle'; fh: number; id: number; kind: number; flags: number; lost: number }
    | { op: 'lock'; id: number; fh: number; words: number[] }
    | { op: 'watch'; id: number; mask: number }
    | { op: 'end'; counts?: number[] }
    | { op: 'raw'; type: number; bytes: number; seed: number }
    | { op: 'pieces'; bytes: number }
  );

const ODD = [
  Number.NaN,
  Number.POSITIVE_INFINITY,
  Number.NEGATIVE_INFINITY,
  -1,
  -0,
  0.5,
  1.5,
  2 ** 24 + 2.5,
  2 ** 53,
  2 ** 64,
  1e308,
  5e-324,
  2 ** 53 - 1,
  -(2 ** 24) - 2,
];
const GENERATION = 2 ** 24;
const TYPES = [0o100000, 0o040000, 0o120000, 0o010000, 0o100000, 0o040000, 0, 0o170000, 0o140000, 0o020000];

interface Setup {
  rig: RigOptions;
  options: MigrationOptions;
}

const SETUPS: readonly Setup[] = [
  {
    rig: { fs: { xattr: true }, server: { exportSupport: true, posixLock: true, flock: true }, fsnotify: 'auto' },
    options: { mode: 'file-handles', onError: 'guest-error', verifyHandles: false, confirmPaths: false, readonly: false },
  },
  {
    rig: { fs: { inodeFileHandles: 'never' }, fsnotify: 'inotify' },
    options: { mode: 'find-paths', onError: 'guest-error', verifyHandles: true, confirmPaths: true, readonly: false },
  },
  {
    rig: { fs: { readonly: true }, server: { flock: true } },
    options: { mode: 'find-paths', onError: 'guest-error', verifyHandles: false, confirmPaths: false, readonly: true },
  },
  {
    rig: { fs: {}, fsnotify: 'auto' },
    options: { mode: 'find-paths', onError: 'abort', verifyHandles: false, confirmPaths: false, readonly: false },
  },
];

/** What there is, and what there must not be. */
const PATHS = ['file', 'dir', 'dir/sub', 'many', 'deep/dir/file', 'deep/dir/dir/dir', 'out', 'abs', 'up', 'loop', 'big', 'hard', 'missing'];
const ODD_PATHS = [
  '',
  '/',
  '.',
  '..',
  '../outside/secret',
  'dir/../../outside/file',
  'up/outside/secret',
  'out/secret',
  'abs',
  '/etc/passwd',
  'dir//sub',
  'dir/',
  'dir/.',
  'file/x',
  'a\0b',
  'dir\0/sub',
  '/proc/self/root',
  `${'x'.repeat(255)}`,
  `${'x'.repeat(256)}`,
  `${'d/'.repeat(3000)}d`,
  'line\nof a log',
];
/**
 * Relative to the base, which holds the share: whose handles are sent. With `file-handles` the source is trusted with what is outside
 * (SECURITY.md): the case has the first of them alone.
 */
const TRUSTED = 4;
const HANDLES_OF = ['share/file', 'share/dir', 'share/big', 'share', 'outside/secret', 'outside/dir', 'outside'];

const ROOM = 512 << 10;
const area = arenaAlloc(ROOM);
const handleArea = arenaAlloc(192);
const pairArea = arenaAlloc(16);
const AT_FDCWD = -100;
const WRITE_WAIT_MS = 10_000;
const POLLOUT = 4;
const EAGAIN = 11;

class Destination {
  readonly rig: Rig;
  readonly #migration: Migration;
  readonly #contents: string;
  readonly #handles = new Map<string, Buffer>();
  readonly #agreed = Buffer.alloc(24);
  readonly #mode: MigrationOptions['mode'];
  #lines = 0;
  #loads = 0;

  constructor({ rig, options }: Setup) {
    this.#mode = options.mode;
    this.rig = new Rig(rig);
    const { server, fs, events, loop, share } = this.rig;
    this.#migration = new Migration(
      server,
      fs.share,
      events?.fsnotify,
      loop,
      options,
      () => ({ ...DEFAULT_SERVER_OPTIONS, ...rig.server }),
      () => void this.#lines++,
    );
    this.#contents = share.contents();
    for (const name of HANDLES_OF) {
      const error = native.nameToHandle(AT_FDCWD, cString(join(share.base, name)), 0, handleArea);
      const bytes = error < 0 ? 0 : 8 + (arena.u32[handleArea >> 2] as number);
      this.#handles.set(name, Buffer.from(arena.u8.subarray(handleArea, handleArea + bytes)));
    }
    const offers = { minor: 45, flags: LINUX_INIT_FLAGS, flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY, maxReadahead: 131072 };
    const agreed = negotiate(offers, { ...DEFAULT_SERVER_OPTIONS, ...rig.server }, events !== undefined, () => undefined) as Session;
    this.#agreed.writeUInt32LE(agreed.minor, 0);
    this.#agreed.writeUInt32LE(agreed.flags >>> 0, 4);
    this.#agreed.writeUInt32LE(agreed.flags2 >>> 0, 8);
    this.#agreed.writeUInt32LE(agreed.maxReadahead, 12);
    this.#agreed.writeUInt32LE(1, 16);
    this.#agreed.writeUInt32LE(1, 20);
  }

  /** Reads a stream. @returns how many records it had */
  load(steps: readonly Step[]): number {
    const { share, server } = this.rig;
    this.#lines = 0;
    const { bytes, records, pieces } = this.#stream(steps);
    const well = this.#transfer(bytes, pieces);
    must(this.#lines <= 3, () => `${this.#lines} lines for one migration`);
    this.#checkInside();
    if (well) this.#save();
    const { share: state } = this.rig.fs;
    if (!well) must(state.inodes.size === 1 && state.handles.open === 0, 'half a session is left');
    server.reset();
    this.rig.turn();
    must(state.inodes.size === 1, () => `${state.inodes.size} inodes are left`);
    must(state.handles.open === 0, () => `${state.handles.open} handles are left`);
    // To look at all of it takes longer than the rest; the first time it is, for a case that runs alone.
    if (this.#loads++ % 8 === 0) {
      share.checkOutside();
      must(share.contents() === this.#contents, 'something in the share has changed, in this case or one of the last 7');
    }
    return records;
  }

  #transfer(bytes: number, pieces: number): boolean {
    if (pieces === 0) {
      const file = native.memfdCreate(cString('state'), 0);
      native.write(file, area, bytes);
      native.lseek(file, 0, 0);
      return this.#migration.begin(1, file);
    }
    native.socketpair(pairArea);
    const [ours = -1, theirs = -1] = [arena.i32[pairArea >> 2], arena.i32[(pairArea >> 2) + 1]];
    must(this.#migration.begin(1, theirs), 'a transfer does not begin');
    for (let at = 0; at < bytes; ) {
      const n = native.write(ours, area + at, Math.min(pieces, bytes - at));
      if (n === -EAGAIN) native.poll(ours, POLLOUT, WRITE_WAIT_MS);
      else if (n < 0)
        break; // it has been refused
      else at += n;
      this.rig.turn();
    }
    native.close(ours);
    return this.#migration.check();
  }

  /** Everything that is known or open lies in the share. */
  #checkInside(): void {
    const { share, fs } = this.rig;
    const inside = (fd: number, what: string): void => {
      if (fd < 0) return;
      const path = readlinkSync(`/proc/self/fd/${fd}`);
      must(path === share.path || path.startsWith(`${share.path}/`), () => `${what} is ${path}`);
    };
    const { inodes, handles } = fs.share;
    inodes.each((slot) => {
      if (inodes.u32[(slot << SHIFT) + Inode.inoLow] !== 0) inside(fs.share.fd(slot), `inode ${slot}`);
    });
    for (const slot of handles.slots()) inside(handles.fd(slot), `open file ${slot}`);
  }

  /** What was taken over goes on to the next one. */
  #save(): void {
    const file = native.memfdCreate(cString('state'), 0);
    const size = (): number => statSync(`/proc/self/fd/${copy}`).size;
    const copy = native.dup(file);
    const saved = this.#migration.begin(0, file);
    must(saved, 'what was taken over cannot be saved');
    must(size() >= 48, 'nothing was saved');
    native.close(copy);
  }

  #stream(steps: readonly Step[]): { bytes: number; records: number; pieces: number } {
    const { u8, u32, f64 } = arena;
    const counts = [0, 0, 0, 0];
    let end = 0;
    let records = 0;
    let pieces = 0;
    for (const step of steps) {
      if (step.op === 'pieces') {
        pieces = Math.max(1, step.bytes);
        continue;
      }
      if (end > ROOM - (80 << 10)) break;
      const at = area + end + 8;
      const word = at >> 2;
      u8.fill(0, at - 8, at + 512);
      let type: number;
      let bytes: number;
      switch (step.op) {
        case 'start':
          type = RecordType.start;
          bytes = 16;
          u32[word] = step.magic ?? MAGIC_LOW;
          u32[word + 1] = MAGIC_HIGH;
          u32[word + 2] = step.version ?? VERSION;
          break;
        case 'session': {
          type = RecordType.session;
          bytes = 24;
          u8.set(this.#agreed, at);
          for (const [i, value] of [step.minor, step.flags, step.flags2, step.readahead, step.inodes, step.handles].entries())
            if (value !== undefined) u32[word + i] = value >>> 0;
          break;
        }
        case 'mount': {
          type = RecordType.mount;
          u32[word] = step.index >>> 0;
          const path = Buffer.from(step.path, 'latin1');
          u32[word + 1] = (step.bytes ?? path.length) >>> 0;
          u8.set(path, at + 8);
          bytes = 8 + path.length;
          break;
        }
        case 'inode': {
          type = RecordType.inode;
          counts[0] = (counts[0] as number) + 1;
          f64[at >> 3] = double(step.id);
          f64[(at >> 3) + 1] = double(step.count);
          u32[(at + InodeRecord.type) >> 2] = step.type >>> 0;
          u32[(at + InodeRecord.found) >> 2] = step.found >>> 0;
          u32[(at + InodeRecord.mount) >> 2] = step.mount >>> 0;
          const trusted = this.#mode === 'find-paths' || HANDLES_OF.indexOf(step.of ?? '') < TRUSTED;
          const handle = step.of === undefined || !trusted ? random(step.random ?? 0) : (this.#handles.get(step.of) ?? Buffer.alloc(0));
          const handleBytes = Math.max(0, handle.length - 8);
          u32[(at + InodeRecord.handleBytes) >> 2] = (step.handleBytes ?? handleBytes) >>> 0;
          if (handle.length >= 8) u32[(at + InodeRecord.handleType) >> 2] = handle.readUInt32LE(4);
          u8.set(handle.subarray(8), at + InodeRecord.handle);
          const path = Buffer.from(step.path, 'latin1');
          u32[(at + InodeRecord.pathBytes) >> 2] = (step.pathBytes ?? path.length) >>> 0;
          const start = InodeRecord.handle + padded(handleBytes);
          u8.set(path, at + start);
          bytes = start + path.length;
          break;
        }
        case 'handle':
          type = RecordType.handle;
          bytes = HandleRecord.bytes;
          counts[1] = (counts[1] as number) + 1;
          f64[at >> 3] = double(step.fh);
          f64[(at >> 3) + 1] = double(step.id);
          u32[(at + HandleRecord.kind) >> 2] = step.kind >>> 0;
          u32[(at + HandleRecord.openFlags) >> 2] = step.flags >>> 0;
          u32[(at + HandleRecord.lost) >> 2] = step.lost >>> 0;
          break;
        case 'lock':
          type = RecordType.lock;
          bytes = LockRecord.bytes;
          counts[3] = (counts[3] as number) + 1;
          f64[at >> 3] = double(step.id);
          f64[(at >> 3) + 1] = double(step.fh);
          for (const [i, value] of step.words.slice(0, 10).entries()) u32[word + 4 + i] = value >>> 0;
          break;
        case 'watch':
          type = RecordType.watch;
          bytes = 16;
          counts[2] = (counts[2] as number) + 1;
          f64[at >> 3] = double(step.id);
          u32[word + 2] = step.mask >>> 0;
          break;
        case 'end':
          type = RecordType.end;
          bytes = 16;
          for (const [i, value] of (step.counts ?? counts).slice(0, 4).entries()) u32[word + i] = value >>> 0;
          break;
        case 'raw': {
          type = step.type;
          bytes = Math.min(Math.max(0, step.bytes), 40_000);
          let state = step.seed | 1;
          for (let i = 0; i < bytes; i++) {
            state = (Math.imul(state, 1664525) + 1013904223) | 0;
            u8[at + i] = state >>> 24;
          }
          break;
        }
      }
      u32[(at - 8) >> 2] = type >>> 0;
      u32[(at - 4) >> 2] = (bytes + (step.lie ?? 0)) >>> 0;
      u8.fill(0, at + bytes, at + padded(bytes));
      records++;
      end += 8 + padded(bytes);
      if (step.cut !== undefined) {
        end -= Math.min(Math.max(0, step.cut), 8 + padded(bytes));
        break;
      }
    }
    return { bytes: end, records, pieces };
  }

  close(): void {
    this.rig.close();
  }
}

function double(value: number): number {
  return value < 0 ? (ODD[(-1 - value) % ODD.length] as number) : value;
}

/** A file handle of random bytes. */
function random(seed: number): Buffer {
  if (seed === 0) return Buffer.alloc(0);
  const bytes = Buffer.alloc(8 + (seed % 130));
  for (let i = 4; i < bytes.length; i++) bytes[i] = (seed >>> (i % 24)) * i;
  return bytes;
}

export class MigrationTarget implements Target<Step> {
  readonly name = 'migration';
  readonly #devices: (Destination | undefined)[] = [];

  generate(random: Random): Case<Step> {
    const steps: Step[] = [];
    const odd = (value: number): number => (random.oneIn(150) ? -1 - random.below(ODD.length) : value);
    const number = (value: number): number => (random.oneIn(150) ? random.pick([0, 1, 0xffffffff, 0x80000000, random.u32()]) : value);
    const path = (): string => (random.oneIn(10) ? random.pick(ODD_PATHS) : random.pick(PATHS));
    const id = (slot: number): number => odd(slot <= 1 ? ROOT_NODEID : GENERATION * (1 + random.below(3)) + slot);
    if (random.oneIn(3)) steps.push({ op: 'pieces', bytes: random.pick([1, 7, 8, 64, 1000, 70_000]) });
    if (!random.oneIn(60))
      steps.push({
        op: 'start',
        ...(random.oneIn(60) ? { version: random.below(4) } : {}),
        ...(random.oneIn(60) ? { magic: random.u32() } : {}),
      });
    if (!random.oneIn(60)) {
      const session: Step = { op: 'session' };
      for (const key of ['minor', 'flags', 'flags2', 'readahead', 'inodes', 'handles'] as const)
        if (random.oneIn(key.startsWith('flags') ? 20 : 40)) session[key] = random.oneIn(2) ? 1 << random.below(31) : random.u32();
      steps.push(session);
    }
    const known: { id: number; path: string }[] = [];
    if (random.oneIn(2)) steps.push({ op: 'mount', index: 0, path: random.oneIn(10) ? path() : '' });
    for (let i = random.below(12); i > 0; i--) {
      if (random.oneIn(12)) {
        const index = number(random.oneIn(30) ? random.below(3) : 10 + i);
        steps.push({ op: 'mount', index, path: path(), ...(random.oneIn(20) ? { bytes: random.below(100) } : {}) });
        continue;
      }
      const where = path();
      const nodeid = id(random.oneIn(200) ? random.pick([0, 1, GENERATION - 1, random.below(GENERATION)]) : 2 + known.length);
      const found = number(
        random.oneIn(4) ? random.pick([Found.gone, Found.lost, random.oneIn(4) ? Found.handle : Found.lost]) : Found.path,
      );
      const type = random.oneIn(12) ? random.pick(TYPES) : typeIn(where);
      const inode: Step = {
        op: 'inode',
        id: nodeid,
        count: odd(random.oneIn(20) ? 0 : 1 + random.below(3)),
        type,
        found,
        mount: number(0),
        path: where,
      };
      if (found === Found.handle || random.oneIn(8)) {
        if (random.oneIn(6)) inode.random = random.u32();
        else inode.of = random.pick(HANDLES_OF);
      }
      if (random.oneIn(60)) inode.handleBytes = random.pick([0, 1, 127, 128, 129, 0xffffffff, random.below(200)]);
      if (random.oneIn(60)) inode.pathBytes = random.pick([0, 1, 40_000, 0xffffffff, random.below(200)]);
      steps.push(inode);
      known.push({ id: nodeid, path: where });
    }
    const opened: { fh: number; id: number }[] = [];
    for (let i = random.below(5); i > 0 && known.length > 0; i--) {
      const { id, path } = random.pick(known);
      const kind = number(random.oneIn(40) ? random.below(5) : typeIn(path) === 0o040000 ? Kind.directory : Kind.file);
      const fh = odd((1 + random.below(3)) * 2 ** 20 + 1 + opened.length);
      const flags = random.oneIn(40)
        ? random.u32()
        : random.pick(random.oneIn(12) ? [0o2000, 0o1000, 0o100, 0o200000] : [0, 1, 2, 0o40000, 0o1000000]);
      steps.push({
        op: 'handle',
        fh,
        id: odd(id),
        kind,
        flags: kind === Kind.directory && !random.oneIn(20) ? 0 : flags,
        lost: random.oneIn(8) ? 1 : 0,
      });
      opened.push({ fh, id });
    }
    for (let i = random.below(3); i > 0 && opened.length > 0; i--) {
      const { fh, id } = random.pick(opened);
      const words = [
        random.below(3),
        0,
        number(0),
        0,
        number(0xffffffff),
        number(0x7fffffff),
        number(random.below(2)),
        number(7),
        random.below(2),
        0,
      ];
      steps.push({ op: 'lock', id: odd(id), fh: odd(fh), words });
    }
    for (let i = random.oneIn(4) ? random.below(5) : 0; i > 0; i--)
      steps.push({
        op: 'watch',
        id: odd(known.length > 0 && !random.oneIn(4) ? random.pick(known).id : random.below(3)),
        mask: random.u32(),
      });
    if (!random.oneIn(15))
      steps.push({ op: 'end', ...(random.oneIn(20) ? { counts: Array.from({ length: 4 }, () => random.below(20)) } : {}) });
    for (let i = random.oneIn(5) ? 1 + random.below(3) : 0; i > 0 && steps.length > 0; i--) {
      const at = random.below(steps.length + 1);
      const step = steps[Math.min(at, steps.length - 1)] as Step;
      switch (random.below(6)) {
        case 0:
          steps.splice(at, 0, {
            op: 'raw',
            type: number(random.below(10)),
            bytes: random.pick([0, 8, 16, 24, 40, 33_000, random.below(200)]),
            seed: random.u32(),
          });
          break;
        case 1:
          step.lie = random.pick([-8, -1, 1, 8, 40_000, -1000, random.u32()]);
          break;
        case 2:
          step.cut = random.below(64);
          break;
        case 3:
          steps.splice(at, 1);
          break;
        case 4:
          steps.splice(at, 0, step);
          break;
        default:
          steps.splice(at, 0, random.pick(steps));
      }
    }
    return { setup: random.below(SETUPS.length), steps };
  }

  run({ setup, steps }: Case<Step>): number {
    const index = setup % SETUPS.length;
    const device = this.#devices[index] ?? new Destination(SETUPS[index] as Setup);
    this.#devices[index] = device;
    const fds = openFds();
    try {
      const records = device.load(steps);
      // The root's descriptor by which other file handles are opened may be new, and an inotify or fanotify group.
      must(openFds() - fds < 4, () => `${openFds() - fds} descriptors are left: ${lastFds()}`);
      return records;
    } catch (error) {
      this.#devices[index] = undefined;
      device.close();
      throw error;
    }
  }

  close(): void {
    for (const device of this.#devices) device?.close();
  }
}

/** S_IFMT of what is at a path of the share. */
function typeIn(path: string): number {
  if (['dir', 'dir/sub', 'many', 'deep/dir/dir/dir', ''].includes(path)) return 0o040000;
  return ['out', 'abs', 'up', 'loop'].includes(path) ? 0o120000 : 0o100000;
}
