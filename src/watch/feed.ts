/**
 * What is watched and what is sent, as lines of JSON for people who look (`virtiofsd-ts events`): written by the device thread
 * into shared memory only while somebody reads, passed on by the metrics server's thread.
 */
import { arena, arenaAlloc, arenaString, cString, native } from 'vhost-user-ts/native';
import { FsnotifyRecord, FsnotifyRecordFlag, NotifyCode, OutHeader } from '../fuse/abi.js';
import { maskText } from './mask.js';

/** Words of the block: how many readers there are, bytes ever written (modulo 2^32), whether a list of the watches is wanted. */
export const FeedWord = { readers: 0, written: 1, wanted: 2, count: 4 } as const;
/** Bytes of the ring of lines behind the words. */
export const FEED_BYTES = 1 << 20;

const PATH_MAX = 4096;

/** What the device knows of a node. */
export interface FeedSource {
  /** An O_PATH descriptor of a node, or -errno. */
  fd(nodeid: number): number;
  /** A descriptor of /proc/self/fd. */
  readonly procfd: number;
  /** Every watch: nodeid and mask in words. */
  list(): Iterable<{ nodeid: number; mask: string }>;
}

/** The device thread's end. */
export class EventFeed {
  readonly buffer = new SharedArrayBuffer(4 * FeedWord.count + FEED_BYTES);
  readonly #words = new Int32Array(this.buffer, 0, FeedWord.count);
  readonly #ring = new Uint8Array(this.buffer, 4 * FeedWord.count);
  readonly #root: string;
  readonly #prefix: string;
  readonly #link = arenaAlloc(PATH_MAX);
  readonly #source: FeedSource;

  /** @param root the shared directory: paths are told relative to it */
  constructor(root: string, source: FeedSource) {
    this.#root = root;
    this.#prefix = root.endsWith('/') ? root : `${root}/`;
    this.#source = source;
  }

  /** Whether anybody reads: nothing is put together otherwise. */
  get active(): boolean {
    return Atomics.load(this.#words, FeedWord.readers) > 0;
  }

  /** A reader came: it gets a line for every watch that there is. */
  listIfWanted(): void {
    if (Atomics.exchange(this.#words, FeedWord.wanted, 0) === 0) return;
    for (const { nodeid, mask } of this.#source.list()) this.#line({ watch: this.#path(nodeid), mask });
  }

  /** FUSE_FSNOTIFY was answered: `mask` in words, empty when the watch ended. */
  watched(nodeid: number, mask: number, errno: number): void {
    if (this.active) this.#line({ watch: this.#path(nodeid), mask: maskText(mask), ...(errno === 0 ? {} : { errno }) });
  }

  /** A message of `length` bytes at arena offset `at` was given to the guest. */
  sent(at: number, length: number): void {
    if (!this.active) return;
    const { u32, i32 } = arena;
    const code = i32[(at + OutHeader.error) >> 2] as number;
    if (code !== NotifyCode.FSNOTIFY) {
      this.#line({ sent: NOTIFICATIONS[code] ?? `notification ${code}` });
      return;
    }
    for (let r = at + OutHeader.bytes; r < at + length; r += u32[(r + FsnotifyRecord.reclen) >> 2] as number) {
      if (((u32[(r + FsnotifyRecord.flags) >> 2] as number) & FsnotifyRecordFlag.OVERFLOW) !== 0) {
        this.#line({ event: 'OVERFLOW' });
        continue;
      }
      const nodeid = (u32[(r + FsnotifyRecord.nodeid) >> 2] as number) + (u32[(r + FsnotifyRecord.nodeid + 4) >> 2] as number) * 2 ** 32;
      const nameLength = u32[(r + FsnotifyRecord.namelen) >> 2] as number;
      const name = arena.buffer.toString('utf8', r + FsnotifyRecord.name, r + FsnotifyRecord.name + nameLength);
      const directory = this.#path(nodeid);
      this.#line({
        event: maskText(u32[(r + FsnotifyRecord.mask) >> 2] as number),
        path: nameLength === 0 ? directory : directory === '.' ? name : `${directory}/${name}`,
      });
    }
  }

  #path(nodeid: number): string {
    const fd = this.#source.fd(nodeid);
    const length = fd < 0 ? fd : native.readlinkat(this.#source.procfd, cString(String(fd)), this.#link, PATH_MAX);
    if (length < 0) return `nodeid ${nodeid}`;
    const path = arenaString(this.#link, length);
    if (path === this.#root) return '.';
    return path.startsWith(this.#prefix) ? path.slice(this.#prefix.length) : path;
  }

  #line(fields: Record<string, unknown>): void {
    const bytes = Buffer.from(`${JSON.stringify({ time: new Date().toISOString(), ...fields })}\n`);
    const written = Atomics.load(this.#words, FeedWord.written) >>> 0;
    for (let i = 0; i < bytes.length; i++) this.#ring[(written + i) % FEED_BYTES] = bytes[i] as number;
    Atomics.store(this.#words, FeedWord.written, (written + bytes.length) | 0);
    Atomics.notify(this.#words, FeedWord.written);
  }
}

const NOTIFICATIONS: Readonly<Record<number, string>> = {
  [NotifyCode.INVAL_INODE]: 'INVAL_INODE',
  [NotifyCode.INVAL_ENTRY]: 'INVAL_ENTRY',
  [NotifyCode.DELETE]: 'DELETE',
};

/** The metrics thread's end: hands complete lines to one reader, in order. */
export class FeedReader {
  readonly #words: Int32Array;
  readonly #ring: Uint8Array;
  #position: number;
  #open = true;

  constructor(buffer: SharedArrayBuffer) {
    this.#words = new Int32Array(buffer, 0, FeedWord.count);
    this.#ring = new Uint8Array(buffer, 4 * FeedWord.count);
    this.#position = Atomics.load(this.#words, FeedWord.written) >>> 0;
    Atomics.add(this.#words, FeedWord.readers, 1);
    Atomics.store(this.#words, FeedWord.wanted, 1);
  }

  /** Waits for more and returns it; undefined once {@link close} was called. */
  async next(): Promise<Buffer | undefined> {
    while (this.#open) {
      const written = Atomics.load(this.#words, FeedWord.written);
      const length = ((written >>> 0) - this.#position) >>> 0;
      if (length > FEED_BYTES / 2) {
        // Too slow: what was overwritten is gone, and a whole line must come next.
        this.#position = written >>> 0;
        return Buffer.from(`${JSON.stringify({ lost: `${length} bytes of lines were lost: this reader is too slow` })}\n`);
      }
      if (length > 0) {
        const bytes = Buffer.allocUnsafe(length);
        for (let i = 0; i < length; i++) bytes[i] = this.#ring[(this.#position + i) % FEED_BYTES] as number;
        this.#position = written >>> 0;
        return bytes;
      }
      const wait = Atomics.waitAsync(this.#words, FeedWord.written, written, 1000);
      if (wait.async) await wait.value;
    }
    return undefined;
  }

  close(): void {
    if (!this.#open) return;
    this.#open = false;
    Atomics.sub(this.#words, FeedWord.readers, 1);
  }
}
