/**
 * The two sides that the FUSE server stands between, for its unit tests: a guest whose memory is a piece of the arena, and a file
 * system that does what a test tells it and remembers what it was asked.
 */
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import type { Caller, DirectorySink, Entry, FileSystem, Lock, Opened, SessionOptions, SetAttr } from '../../src/fs/filesystem.js';
import { PENDING } from '../../src/fs/filesystem.js';
import type { Chain, FuseServer } from '../../src/fuse/server.js';

const MEMORY = 4 << 20;
const IOVECS = 2048;
/** What guest memory holds that nobody has written to. */
export const UNTOUCHED = 0xa5;

/** Bytes from hex digits; white space and comments (`# …` to the end of the line) do not count. */
export function hex(text: string): Buffer {
  const digits = text.replace(/#.*$/gm, '').replace(/\s+/g, '');
  if (!/^([0-9a-f]{2})*$/.test(digits)) throw new SyntaxError(`not hex: ${digits}`);
  return Buffer.from(digits, 'hex');
}

/** Little-endian words of 32 bits. */
export function words(...values: number[]): Buffer {
  const bytes = Buffer.alloc(4 * values.length);
  for (const [i, value] of values.entries()) bytes.writeUInt32LE(value >>> 0, 4 * i);
  return bytes;
}

/** Little-endian words of 64 bits. */
export function longs(...values: (number | bigint)[]): Buffer {
  const bytes = Buffer.alloc(8 * values.length);
  for (const [i, value] of values.entries()) bytes.writeBigUInt64LE(BigInt.asUintN(64, BigInt(value)), 8 * i);
  return bytes;
}

/** A NUL-terminated string. */
export function string(text: string): Buffer {
  return Buffer.concat([Buffer.from(text), Buffer.of(0)]);
}

/** Header fields of a request; what is not given is an ordinary value. */
export interface Header {
  nodeid?: number | bigint;
  unique?: number | bigint;
  uid?: number;
  gid?: number;
  pid?: number;
  totalExtlen?: number;
  /** header.len, if it is to lie. */
  len?: number;
}

/** A whole request: header and parts, with the right length. */
export function request(opcode: number, header: Header, ...parts: Buffer[]): Buffer {
  const body = Buffer.concat(parts);
  return Buffer.concat([
    words(header.len ?? 40 + body.length, opcode),
    longs(header.unique ?? 7, header.nodeid ?? 1),
    words(header.uid ?? 1000, header.gid ?? 100, header.pid ?? 4242, header.totalExtlen ?? 0),
    body,
  ]);
}

/** Puts requests into chains, and looks at what came back. */
export class Guest {
  readonly server: FuseServer;
  /** What the last `serve` or `complete` returned. */
  used = 0;
  readonly chain: Chain = { iov: 0, readableCount: 0, readableBytes: 0, writableIov: 0, writableCount: 0, writableBytes: 0 };
  readonly #memory = memory;
  #writable: { at: number; bytes: number }[] = [];

  constructor(server: FuseServer) {
    this.server = server;
  }

  /**
   * Serves a request and returns the reply; empty when there is none or it is PENDING (`used` tells).
   * The readable part is cut into pieces of the given lengths (the last one takes the rest), and so is the writable part of
   * `room` bytes. Throws when the server has written elsewhere than it says.
   */
  send(bytes: Buffer, room = 4096, readable: number[] = [], writable: number[] = []): Buffer {
    arena.u8.fill(UNTOUCHED, this.#memory, this.#memory + bytes.length + room + 4096);
    const next = { at: this.#memory + 64, iov: iovecs };
    const source = this.#pieces(bytes.length, readable, next);
    let from = 0;
    for (const piece of source) {
      bytes.copy(arena.buffer, piece.at, from, from + piece.bytes);
      from += piece.bytes;
    }
    const chain = this.chain;
    chain.iov = iovecs;
    chain.readableCount = source.length;
    chain.readableBytes = bytes.length;
    chain.writableIov = next.iov;
    this.#writable = this.#pieces(room, writable, next);
    chain.writableCount = this.#writable.length;
    chain.writableBytes = room;
    this.used = this.server.serve(chain);
    return this.reply();
  }

  /** The reply of an offloaded request; the chain's iovecs are gone by then, as the device reuses them. */
  complete(job: number, result: number): Buffer {
    arena.u8.fill(UNTOUCHED, iovecs, iovecs + IOVECS * 16);
    this.used = this.server.complete(job, result);
    return this.reply();
  }

  /** The first `used` bytes of the writable part. */
  reply(): Buffer {
    const all = Buffer.concat(this.#writable.map((piece) => arena.buffer.subarray(piece.at, piece.at + piece.bytes)));
    const used = this.used === PENDING ? 0 : this.used;
    if (!all.subarray(used).every((byte) => byte === UNTOUCHED)) throw new Error(`bytes behind the ${used} used ones were written`);
    for (const piece of this.#writable) {
      if (arena.u8[piece.at - 1] !== UNTOUCHED || arena.u8[piece.at + piece.bytes] !== UNTOUCHED)
        throw new Error('a byte beside a buffer was written');
    }
    return Buffer.from(all.subarray(0, used));
  }

  #pieces(total: number, cuts: number[], next: { at: number; iov: number }): { at: number; bytes: number }[] {
    const pieces: { at: number; bytes: number }[] = [];
    let left = total;
    for (let i = 0; left > 0 || i < cuts.length; i++) {
      const bytes = Math.min(left, cuts[i] ?? left);
      pieces.push({ at: next.at, bytes });
      const address = native.arenaAddress() + next.at;
      arena.u32.set([address % 2 ** 32, Math.floor(address / 2 ** 32), bytes, 0], next.iov >> 2);
      next.iov += 16;
      next.at += bytes + 3; // odd addresses, and a gap to notice writes beside a buffer
      left -= bytes;
    }
    return pieces;
  }
}

const memory = arenaAlloc(MEMORY);
const iovecs = arenaAlloc(IOVECS * 16);

/** One directory entry for {@link FakeFs.directory}. */
export interface FakeDirent {
  name: string;
  ino: bigint;
  type: number;
  offset: bigint;
  known: boolean;
}

/** A file system that answers `result` to everything, and keeps the calls as readable lines. */
export class FakeFs implements FileSystem {
  readonly caller: Caller = {
    uid: 0,
    gid: 0,
    pid: 0,
    supplementaryGid: -1,
    securityContexts: 0,
    securityContextCount: 0,
    securityContextBytes: 0,
  };
  readonly entry: Entry = { nodeid: 0x42, generation: 7, attrFlags: 0, volatile: false };
  readonly opened: Opened = { fh: 5, openFlags: 2 };
  readonly attr: number;
  readonly statfsBuffer: number;

  /** The result of every operation. */
  result = 0;
  /** What readlink, getxattr, listxattr and ioctl put out, and what READ finds. */
  data: Buffer = Buffer.alloc(0);
  directory: FakeDirent[] = [];
  /** What was called, e.g. `mkdir(1, "a", 493, 18)`. */
  readonly calls: string[] = [];
  session: SessionOptions | undefined;
  readonly #sinkName = arenaAlloc(256);

  constructor() {
    this.attr = arenaAlloc(256);
    this.statfsBuffer = arenaAlloc(128);
  }

  /** The calls since the last look. */
  taken(): string[] {
    return this.calls.splice(0);
  }

  #call(name: string, ...values: unknown[]): number {
    this.calls.push(`${name}(${values.map((value) => JSON.stringify(value)).join(', ')})`);
    return this.result;
  }

  #text(at: number): string {
    return arena.buffer.toString('latin1', at, arena.buffer.indexOf(0, at));
  }

  #out(result: number, at: number): number {
    if (result < 0) return result;
    this.data.copy(arena.buffer, at);
    return this.data.length;
  }

  init(session: SessionOptions): void {
    this.session = session;
    this.#call('init');
  }
  resume(session: SessionOptions): void {
    this.session = session;
    this.#call('resume');
  }
  destroy(): void {
    this.#call('destroy');
  }
  lookup(parent: number, name: number, length: number): number {
    return this.#call('lookup', parent, arena.buffer.toString('latin1', name, name + length));
  }
  forget(nodeid: number, nlookup: number): void {
    this.#call('forget', nodeid, nlookup);
  }
  getattr(nodeid: number, fh: number, flags: number, mask: number): number {
    return this.#call('getattr', nodeid, fh, flags, mask);
  }
  setattr(nodeid: number, change: SetAttr): number {
    return this.#call('setattr', nodeid, { ...change });
  }
  readlink(nodeid: number, out: number, size: number): number {
    return this.#out(this.#call('readlink', nodeid, size), out);
  }
  symlink(parent: number, name: number, target: number): number {
    return this.#call('symlink', parent, this.#text(name), this.#text(target));
  }
  mknod(parent: number, name: number, mode: number, umask: number, rdev: number): number {
    return this.#call('mknod', parent, this.#text(name), mode, umask, rdev);
  }
  mkdir(parent: number, name: number, mode: number, umask: number): number {
    return this.#call('mkdir', parent, this.#text(name), mode, umask);
  }
  unlink(parent: number, name: number): number {
    return this.#call('unlink', parent, this.#text(name));
  }
  rmdir(parent: number, name: number): number {
    return this.#call('rmdir', parent, this.#text(name));
  }
  rename(parent: number, name: number, newParent: number, newName: number, flags: number): number {
    return this.#call('rename', parent, this.#text(name), newParent, this.#text(newName), flags);
  }
  link(nodeid: number, newParent: number, newName: number): number {
    return this.#call('link', nodeid, newParent, this.#text(newName));
  }
  open(nodeid: number, flags: number, killPriv: boolean): number {
    return this.#call('open', nodeid, flags, killPriv);
  }
  create(parent: number, name: number, flags: number, mode: number, umask: number, killPriv: boolean): number {
    return this.#call('create', parent, this.#text(name), flags, mode, umask, killPriv);
  }
  tmpfile(parent: number, flags: number, mode: number, umask: number): number {
    return this.#call('tmpfile', parent, flags, mode, umask);
  }
  read(nodeid: number, fh: number, offset: number, size: number, iov: number, count: number, skip: number): number {
    const result = this.#call('read', nodeid, fh, offset, size);
    if (result < 0 || result === PENDING) return result;
    const length = Math.min(size, this.data.length);
    this.data.copy(arena.buffer, scratch, 0, length);
    return native.scatter(iov, count, skip, scratch, length);
  }
  write(nodeid: number, fh: number, offset: number, size: number, flags: number, iov: number, count: number, skip: number): number {
    const result = this.#call('write', nodeid, fh, offset, size, flags);
    if (result < 0 || result === PENDING) return result;
    native.gather(iov, count, scratch, skip + size);
    this.data = Buffer.from(arena.buffer.subarray(scratch + skip, scratch + skip + size));
    return size;
  }
  flush(nodeid: number, fh: number): number {
    return this.#call('flush', nodeid, fh);
  }
  release(nodeid: number, fh: number): number {
    return this.#call('release', nodeid, fh);
  }
  fsync(nodeid: number, fh: number, dataOnly: boolean): number {
    return this.#call('fsync', nodeid, fh, dataOnly);
  }
  opendir(nodeid: number, flags: number): number {
    return this.#call('opendir', nodeid, flags);
  }
  readdir(nodeid: number, fh: number, low: number, high: number, size: number, sink: DirectorySink, plus: boolean): number {
    const result = this.#call('readdir', nodeid, fh, low, high, size, plus);
    if (result < 0) return result;
    for (const { name, ino, type, offset, known } of this.directory) {
      const length = arena.buffer.write(name, this.#sinkName);
      const inoLow = Number(ino & 0xffffffffn);
      const inoHigh = Number(ino >> 32n);
      const offsetLow = Number(offset & 0xffffffffn);
      const offsetHigh = Number(offset >> 32n);
      const taken = plus
        ? sink.fits(length) && sink.addPlus(this.#sinkName, length, inoLow, inoHigh, type, offsetLow, offsetHigh, known)
        : sink.add(this.#sinkName, length, inoLow, inoHigh, type, offsetLow, offsetHigh);
      if (!taken) break;
    }
    return 0;
  }
  releasedir(nodeid: number, fh: number): number {
    return this.#call('releasedir', nodeid, fh);
  }
  fsyncdir(nodeid: number, fh: number, dataOnly: boolean): number {
    return this.#call('fsyncdir', nodeid, fh, dataOnly);
  }
  statfs(nodeid: number): number {
    return this.#call('statfs', nodeid);
  }
  access(nodeid: number, mask: number): number {
    return this.#call('access', nodeid, mask);
  }
  getxattr(nodeid: number, name: number, out: number, size: number): number {
    const result = this.#call('getxattr', nodeid, this.#text(name), size);
    return size === 0 && result >= 0 ? this.data.length : this.#out(result, out);
  }
  setxattr(nodeid: number, name: number, value: number, size: number, flags: number, extraFlags: number): number {
    return this.#call('setxattr', nodeid, this.#text(name), arena.buffer.toString('latin1', value, value + size), flags, extraFlags);
  }
  listxattr(nodeid: number, out: number, size: number): number {
    const result = this.#call('listxattr', nodeid, size);
    return size === 0 && result >= 0 ? this.data.length : this.#out(result, out);
  }
  removexattr(nodeid: number, name: number): number {
    return this.#call('removexattr', nodeid, this.#text(name));
  }
  fallocate(nodeid: number, fh: number, offset: number, length: number, mode: number): number {
    return this.#call('fallocate', nodeid, fh, offset, length, mode);
  }
  lseek(nodeid: number, fh: number, offset: number, whence: number): number {
    return this.#call('lseek', nodeid, fh, offset, whence);
  }
  copyFileRange(fhIn: number, offsetIn: number, nodeidOut: number, fhOut: number, offsetOut: number, length: number): number {
    return this.#call('copyFileRange', fhIn, offsetIn, nodeidOut, fhOut, offsetOut, length);
  }
  ioctl(nodeid: number, fh: number, command: number, data: number, inputSize: number, outputSize: number): number {
    const input = arena.buffer.toString('hex', data, data + inputSize);
    return this.#out(this.#call('ioctl', nodeid, fh, command, input, outputSize), data);
  }
  syncfs(nodeid: number): number {
    return this.#call('syncfs', nodeid);
  }
  getlk(nodeid: number, fh: number, lock: Lock): number {
    return this.#call('getlk', nodeid, fh, lock);
  }
  setlk(nodeid: number, fh: number, lock: Lock, wait: boolean): number {
    return this.#call('setlk', nodeid, fh, lock, wait);
  }
  unlockOwner(nodeid: number, ownerLow: number, ownerHigh: number): void {
    this.#call('unlockOwner', nodeid, ownerLow, ownerHigh);
  }
  interrupt(uniqueLow: number, uniqueHigh: number): void {
    this.#call('interrupt', uniqueLow, uniqueHigh);
  }
  cancelWaits(): void {
    this.#call('cancelWaits');
  }
  completed(job: number): void {
    this.#call('completed', job);
  }
}

const scratch = arenaAlloc(2 << 20);
