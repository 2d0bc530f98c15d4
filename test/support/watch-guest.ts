/**
 * A guest for tests of the watcher: it gives buffers, reads messages as a driver must (every length checked), and delivers
 * records to its own watches as the kernel's fsnotify() would.
 */
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import { FS_EVENT_ON_CHILD, FS_ISDIR, FS_MOVE_SELF, maskText } from '../../src/watch/mask.js';
import type { BufferSource } from '../../src/watch/notifier.js';

const ARENA = native.arenaAddress();
const HEADER = 16;

/** One event record. */
export interface GuestRecord {
  flags: number;
  nodeid: number;
  child: number;
  mask: number;
  generation: number;
  childGeneration: number;
  cookie: number;
  name: string;
}

/** One notification. */
export interface GuestMessage {
  code: number;
  length: number;
  /** FSNOTIFY. */
  records: GuestRecord[];
  /** INVAL_INODE: nodeid; INVAL_ENTRY and DELETE: parent. */
  nodeid: number;
  child: number;
  offset: number;
  name: string;
}

export const OVERFLOW = 1;
export const PAIRED = 2;
export const INVAL_INODE = 2;
export const INVAL_ENTRY = 3;
export const DELETE = 6;
export const FSNOTIFY = 128;

/** Buffers in two pieces, so that scattering is tested too. */
export class TestGuest implements BufferSource {
  readonly iov = arenaAlloc(32);
  readonly count = 2;
  readonly skip: number;
  bytes: number;
  /** Buffers that are there to be taken. */
  buffers: number;
  readonly messages: GuestMessage[] = [];
  flushes = 0;
  /** Whether messages are read and kept; false for measurements. */
  keep = true;
  readonly #at = arenaAlloc(4096 + 64);
  #taken = false;

  constructor(buffers = Number.POSITIVE_INFINITY, skip = 0, bytes = 4096) {
    this.buffers = buffers;
    this.skip = skip;
    this.bytes = bytes;
    const i = this.iov >> 2;
    const set = (at: number, address: number, length: number) => {
      arena.u32[at] = address >>> 0;
      arena.u32[at + 1] = Math.floor(address / 2 ** 32);
      arena.u32[at + 2] = length;
      arena.u32[at + 3] = 0;
    };
    set(i, ARENA + this.#at, 21);
    set(i + 4, ARENA + this.#at + 21, 4096 + skip - 21);
  }

  takeBuffer(): boolean {
    if (this.#taken) throw new Error('a second buffer before the first was given back');
    if (this.buffers <= 0) return false;
    this.buffers--;
    this.#taken = true;
    if (this.keep) arena.u8.fill(0xee, this.#at, this.#at + 4096 + this.skip);
    return true;
  }

  complete(length: number): void {
    if (!this.#taken) throw new Error('a buffer given back that was not taken');
    this.#taken = false;
    if (length === 0 || !this.keep) return;
    this.messages.push(parse(Buffer.from(arena.u8.subarray(this.#at + this.skip, this.#at + this.skip + length))));
  }

  flush(): void {
    this.flushes++;
  }

  /** Takes the messages that came. */
  take(): GuestMessage[] {
    return this.messages.splice(0);
  }
}

/** Reads a message, strictly. */
export function parse(bytes: Buffer): GuestMessage {
  const u64 = (at: number) => Number(bytes.readBigUInt64LE(at));
  const message: GuestMessage = { code: bytes.readInt32LE(4), length: bytes.length, records: [], nodeid: 0, child: 0, offset: 0, name: '' };
  if (bytes.readUInt32LE(0) !== bytes.length || bytes.readBigUInt64LE(8) !== 0n) throw new Error('a bad header');
  const named = (at: number, length: number, dot = false) => {
    if (bytes.length !== at + length + 1 || bytes[at + length] !== 0) throw new Error('a name without its NUL');
    const name = bytes.toString('utf8', at, at + length);
    return dot && name === '.' ? name : checked(name);
  };
  switch (message.code) {
    case INVAL_INODE:
      if (bytes.length !== HEADER + 24) throw new Error('a bad length');
      message.nodeid = u64(HEADER);
      message.offset = Number(bytes.readBigInt64LE(HEADER + 8));
      return message;
    case INVAL_ENTRY:
      message.nodeid = u64(HEADER);
      message.name = named(HEADER + 16, bytes.readUInt32LE(HEADER + 8));
      return message;
    case DELETE:
      message.nodeid = u64(HEADER);
      message.child = u64(HEADER + 8);
      // In the root, "." stands for a name that the server does not know.
      message.name = named(HEADER + 24, bytes.readUInt32LE(HEADER + 16), message.nodeid === 1);
      return message;
    case FSNOTIFY:
      break;
    default:
      throw new Error(`code ${message.code}`);
  }
  let at = HEADER;
  if (at === bytes.length) throw new Error('no record');
  while (at < bytes.length) {
    const length = bytes.readUInt32LE(at);
    const nameLength = bytes.readUInt32LE(at + 44);
    if (
      length % 8 !== 0 ||
      length < 48 ||
      at + length > bytes.length ||
      nameLength > 255 ||
      (nameLength > 0 && 48 + nameLength + 1 > length)
    )
      throw new Error('a bad record');
    for (let i = at + 48 + nameLength; i < at + length; i++) if (bytes[i] !== 0) throw new Error('padding is not zero');
    if (bytes.readUInt32LE(at + 28) !== 0) throw new Error('a high mask');
    message.records.push({
      flags: bytes.readUInt32LE(at + 4),
      nodeid: u64(at + 8),
      child: u64(at + 16),
      mask: bytes.readUInt32LE(at + 24),
      generation: bytes.readUInt32LE(at + 32),
      childGeneration: bytes.readUInt32LE(at + 36),
      cookie: bytes.readUInt32LE(at + 40),
      name: checked(bytes.toString('utf8', at + 48, at + 48 + nameLength)),
    });
    at += length;
  }
  for (const [i, record] of message.records.entries()) {
    if ((record.flags & PAIRED) !== 0 && message.records[i + 1] === undefined) throw new Error('half a rename');
  }
  return message;
}

function checked(name: string): string {
  if (name.includes('/') || name.includes('\0') || name === '.' || name === '..') throw new Error(`a bad name: ${JSON.stringify(name)}`);
  return name;
}

/**
 * What inotify in the guest would say: "PATH NAME MASK". `watches`: nodeid to mask; a record reaches the directory and the child.
 * A rename's halves follow each other, with "→" and "←" where a local watcher would see one cookie.
 */
export function deliver(
  messages: readonly GuestMessage[],
  watches: ReadonlyMap<number, number>,
  path: (nodeid: number) => string,
): string[] {
  const lines: string[] = [];
  // inotify_handle_inode_event() takes ISDIR away from MOVE_SELF.
  const bits = (mask: number) => (mask & ~(FS_EVENT_ON_CHILD | ((mask & FS_MOVE_SELF) !== 0 ? FS_ISDIR : 0))) >>> 0;
  for (const message of messages) {
    for (const [i, record] of message.records.entries()) {
      if ((record.flags & OVERFLOW) !== 0) {
        lines.push('OVERFLOW');
        continue;
      }
      const event = bits(record.mask) & ~FS_ISDIR;
      const first = (record.flags & PAIRED) !== 0;
      const second = i > 0 && ((message.records[i - 1]?.flags ?? 0) & PAIRED) !== 0;
      const own = watches.get(record.nodeid) ?? 0;
      if ((own & event) !== 0)
        lines.push(`${path(record.nodeid)} ${record.name} ${maskText(bits(record.mask))}${first ? ' →' : second ? ' ←' : ''}`);
      const child = (record.mask & FS_EVENT_ON_CHILD) === 0 ? 0 : (watches.get(record.child) ?? 0);
      if ((child & event) !== 0) lines.push(`${path(record.child)}  ${maskText(bits(record.mask))}`);
    }
  }
  return lines;
}
