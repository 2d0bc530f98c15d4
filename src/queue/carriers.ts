/**
 * The ways of notifications to the guest: buffers of the notification queue, buffers lent with FUSE_READ_NOTIFY requests to those
 * that have no such queue (src/watch/PROTOCOL.md, carriers), and READ requests of a replay agent (src/replay/abi.ts). All are a source
 * of buffers for the notifier; a session uses one of them.
 */
import type { Virtqueue } from 'vhost-user-ts';
import { chainErrorText } from 'vhost-user-ts';
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import { KEPT } from '../fs/filesystem.js';
import { Errno, InHeader, OutHeader, READ_NOTIFY_STOP } from '../fuse/abi.js';
import type { Chain, FileEvents } from '../fuse/server.js';
import { LOOK_MAX, NOTIFY_LOOK, READ_WAIT_MS } from '../replay/abi.js';
import type { AgentEvents } from '../replay/replay.js';
import type { EventFeed } from '../watch/feed.js';
import type { Fsnotify } from '../watch/fsnotify.js';
import type { BufferSource } from '../watch/notifier.js';

/** Buffers that a guest may lend at a time; ours lends 4. */
const LENT_MAX = 64;
/** Iovecs of one lent buffer: a page and the reply's header, in whatever pieces. */
const LENT_IOVECS = 8;
const IOVEC_BYTES = 16;
/** A message of `notify_buf_size` must fit: a rename with two longest names has 624 bytes. */
export const NOTIFY_BUFFER_BYTES = 4096;

const { EALREADY, EINVAL, ENOBUFS, ENODEV } = Errno;

/** Buffers of the notification queue (virtio 1.2, 5.11.6.4). One is taken, filled and given back at a time. */
class NotificationQueue implements BufferSource {
  iov = 0;
  count = 0;
  bytes = 0;
  readonly skip = 0;
  queue: Virtqueue | null = null;
  readonly #fail: (queue: Virtqueue, reason: string) => void;

  constructor(fail: (queue: Virtqueue, reason: string) => void) {
    this.#fail = fail;
  }

  takeBuffer(): boolean {
    const queue = this.queue;
    if (queue === null || !queue.running) return false;
    let got = queue.pop();
    // A kick is wanted only when a message waits for a buffer.
    if (got === 0 && queue.enableKicks()) got = queue.pop();
    if (got < 0) {
      this.queue = null;
      this.#fail(queue, chainErrorText(got));
      return false;
    }
    if (got === 0) return false;
    this.iov = queue.chain.writableIov;
    this.count = queue.chain.writableCount;
    this.bytes = queue.chain.writableBytes;
    return true;
  }

  complete(length: number): void {
    const queue = this.queue;
    if (queue === null) return;
    if (queue.memory.logging) queue.chain.markDirty(queue.memory, length);
    queue.push(queue.chain.head, length);
  }

  flush(): void {
    this.queue?.flush();
  }
}

/** One lent buffer. */
interface Lent {
  queue: Virtqueue | null;
  head: number;
  uniqueLow: number;
  uniqueHigh: number;
  count: number;
  bytes: number;
  /** Arena offset of its iovecs. */
  readonly iov: number;
}

/** Buffers lent with FUSE_READ_NOTIFY: first in, first out. A reply has its own header before the notification. */
class LentBuffers implements BufferSource {
  iov = 0;
  count = 0;
  bytes = 0;
  readonly skip = OutHeader.bytes;
  readonly #kept: Lent[] = [];
  readonly #free: Lent[] = [];
  readonly #header = arenaAlloc(OutHeader.bytes);
  readonly #flushed = new Set<Virtqueue>();
  #taken: Lent | undefined;
  /** The request that {@link keep} was called for and whose place in the ring is not known yet. */
  #placing: Lent | undefined;

  get size(): number {
    return this.#kept.length;
  }

  /** Keeps a request's buffer; {@link place} must follow. @returns KEPT or -errno */
  keep(chain: Chain, uniqueLow: number, uniqueHigh: number): number {
    if (chain.writableCount > LENT_IOVECS || chain.writableBytes < OutHeader.bytes + NOTIFY_BUFFER_BYTES) return -EINVAL;
    if (this.#kept.length >= LENT_MAX) return -ENOBUFS;
    const lent = this.#free.pop() ?? {
      queue: null,
      head: 0,
      uniqueLow: 0,
      uniqueHigh: 0,
      count: 0,
      bytes: 0,
      iov: arenaAlloc(LENT_IOVECS * IOVEC_BYTES),
    };
    arena.u8.copyWithin(lent.iov, chain.writableIov, chain.writableIov + chain.writableCount * IOVEC_BYTES);
    lent.count = chain.writableCount;
    lent.bytes = chain.writableBytes;
    lent.uniqueLow = uniqueLow;
    lent.uniqueHigh = uniqueHigh;
    this.#placing = lent;
    return KEPT;
  }

  /** Where the chain of the last {@link keep} goes back to. */
  place(queue: Virtqueue, head: number): void {
    const lent = this.#placing;
    if (lent === undefined) return;
    this.#placing = undefined;
    lent.queue = queue;
    lent.head = head;
    queue.memory.pin();
    this.#kept.push(lent);
  }

  takeBuffer(): boolean {
    const lent = this.#kept.shift();
    if (lent === undefined) return false;
    this.#taken = lent;
    this.iov = lent.iov;
    this.count = lent.count;
    this.bytes = lent.bytes - OutHeader.bytes;
    return true;
  }

  complete(length: number): void {
    if (this.#taken !== undefined) this.#reply(this.#taken, 0, length);
    this.#taken = undefined;
  }

  flush(): void {
    for (const queue of this.#flushed) queue.flush();
    this.#flushed.clear();
  }

  /**
   * Gives buffers back unused.
   * @param errno 0: the guest may lend it again (its queue stops for a while); ENODEV: there will be no more messages
   * @param of only those of this queue
   */
  giveBack(errno: number, of?: Virtqueue): void {
    for (let i = this.#kept.length; i > 0; i--) {
      const lent = this.#kept.shift() as Lent;
      if (of === undefined || lent.queue === of) this.#reply(lent, errno, 0);
      else this.#kept.push(lent);
    }
    this.flush();
  }

  #reply(lent: Lent, errno: number, length: number): void {
    const queue = lent.queue as Virtqueue;
    const total = OutHeader.bytes + length;
    if (queue.running) {
      const at = this.#header >> 2;
      arena.u32[at + (OutHeader.len >> 2)] = total;
      arena.i32[at + (OutHeader.error >> 2)] = -errno;
      arena.u32[at + (OutHeader.unique >> 2)] = lent.uniqueLow;
      arena.u32[at + (OutHeader.unique >> 2) + 1] = lent.uniqueHigh;
      native.scatter(lent.iov, lent.count, 0, this.#header, OutHeader.bytes);
      if (queue.memory.logging) queue.markDirty(lent.head, total);
      queue.push(lent.head, total);
      this.#flushed.add(queue);
    }
    queue.memory.unpin();
    lent.queue = null;
    this.#free.push(lent);
  }
}

/** Remote fsnotify of one device: what the FUSE server and the queues need of it. */
export class EventCarriers implements FileEvents, AgentEvents {
  readonly supportedLow: number;
  readonly supportedHigh: number;
  readonly fsnotify: Fsnotify;
  /** Called once a session when its guest has given the first buffer: from then on it can be told of changes. */
  onCarrier: () => void = () => undefined;

  /** Called when {@link told} has become true. */
  onTold: () => void = () => undefined;

  /** Shows people what goes on; undefined when nobody can look. */
  feed: EventFeed | undefined;

  readonly #begin: (fsnotify: Fsnotify, agent: boolean) => void;
  readonly #queue: NotificationQueue;
  readonly #lent = new LentBuffers();
  /** READs of the control file; a reply is the same as that of a lent buffer. */
  readonly #reads = new LentBuffers();
  readonly #request = arenaAlloc(InHeader.bytes);
  readonly #look = arenaAlloc(OutHeader.bytes + 4 * LOOK_MAX);
  #session = false;
  #agent = false;
  /** How long the READ waits whose chain is about to be placed, in milliseconds; -1: there is none. */
  #reading = -1;
  /** When the kept READ is answered empty, by the monotonic clock; 0: there is none. */
  #patience = 0;
  #told = false;

  /**
   * @param begin starts a session of `fsnotify` with what its guest caches; `agent`: events are replayed
   * @param fail stops a queue whose driver broke the rules
   */
  constructor(fsnotify: Fsnotify, begin: (fsnotify: Fsnotify, agent: boolean) => void, fail: (queue: Virtqueue, reason: string) => void) {
    this.fsnotify = fsnotify;
    this.supportedLow = fsnotify.supportedLow;
    this.supportedHigh = fsnotify.supportedHigh;
    this.#begin = begin;
    this.#queue = new NotificationQueue(fail);
  }

  // --- for the FUSE server ---

  begin(): void {
    this.#session = true;
    this.#told = false;
    this.#begin(this.fsnotify, false);
    this.#attach();
  }

  /**
   * Goes on with the session of the process before.
   * @param told the guest could be told of changes
   * @param coherent and what it caches by that holds: {@link onCarrier} is called again
   */
  resume(told: boolean, coherent: boolean): void {
    this.#session = true;
    this.#told = told;
    if (told && coherent) this.onCarrier();
    this.#attach();
  }

  /** Whether the guest can be told of changes. */
  get told(): boolean {
    return this.#told;
  }

  end(): void {
    this.#session = false;
    this.#lent.giveBack(ENODEV);
    this.fsnotify.attach(null);
    this.fsnotify.end();
  }

  watch(nodeid: number, generation: number, maskLow: number, maskHigh: number, flags: number): number {
    const result = this.fsnotify.watch(nodeid, generation, maskLow, maskHigh, flags);
    this.feed?.watched(nodeid, maskLow, -result);
    return result;
  }

  lend(chain: Chain, uniqueLow: number, uniqueHigh: number, _size: number, flags: number): number {
    if ((flags & READ_NOTIFY_STOP) !== 0) {
      this.#lent.giveBack(ENODEV);
      return 0;
    }
    // With a notification queue there is nothing to lend.
    if (this.#queue.queue !== null) return -ENODEV;
    return this.#lent.keep(chain, uniqueLow, uniqueHigh);
  }

  // --- for the replay agent ---

  /** The agent has begun to wait for a notification. */
  onRead: () => void = () => undefined;

  beginAgent(): number {
    if (this.#session) return -EALREADY;
    this.#agent = true;
    this.#begin(this.fsnotify, true);
    this.#attach();
    return 0;
  }

  endAgent(): void {
    this.#agent = false;
    this.#reads.giveBack(ENODEV);
    this.fsnotify.attach(null);
    this.fsnotify.end();
  }

  lendRead(size: number, waitMs: number): number {
    if (size < NOTIFY_BUFFER_BYTES) return -EINVAL;
    // One thread reads.
    if (this.#reads.size > 0) return -ENOBUFS;
    this.#reading = Math.min(waitMs, READ_WAIT_MS);
    return KEPT;
  }

  look(at: number, count: number): boolean {
    const reads = this.#reads;
    if (this.fsnotify.notifier.pending || !reads.takeBuffer()) return false;
    const bytes = OutHeader.bytes + 4 * count;
    const word = this.#look >> 2;
    arena.u32[word] = bytes;
    arena.i32[word + (OutHeader.error >> 2)] = NOTIFY_LOOK;
    arena.u32[word + (OutHeader.unique >> 2)] = 0;
    arena.u32[word + (OutHeader.unique >> 2) + 1] = 0;
    arena.u8.copyWithin(this.#look + OutHeader.bytes, at, at + 4 * count);
    native.scatter(reads.iov, reads.count, reads.skip, this.#look, bytes);
    reads.complete(bytes);
    reads.flush();
    return true;
  }

  // --- for the device ---

  /** The chain of the last {@link lend} stays: where it goes back to. */
  placed(queue: Virtqueue, head: number): void {
    if (this.#reading >= 0) {
      this.#placeRead(queue, head);
      return;
    }
    this.#lent.place(queue, head);
    this.#arrived();
  }

  #placeRead(queue: Virtqueue, head: number): void {
    const wait = this.#reading;
    this.#reading = -1;
    const { chain } = queue;
    native.gather(chain.iov, chain.readableCount, this.#request, InHeader.bytes);
    const unique = (this.#request + InHeader.unique) >> 2;
    // It fits: lendRead() and the decoder have seen its sizes.
    this.#reads.keep(chain, arena.u32[unique] as number, arena.u32[unique + 1] as number);
    this.#reads.place(queue, head);
    this.fsnotify.buffersArrived();
    if (this.#reads.size > 0) this.onRead();
    if (this.#reads.size === 0) return;
    if (wait > 0) this.#patience = native.monotonic() + wait * 1e6;
    else this.#reads.giveBack(0);
  }

  /** Milliseconds until {@link expire} has something to do, -1: it has nothing to do. */
  get timeout(): number {
    if (this.#patience === 0) return -1;
    if (this.#reads.size > 0) return Math.max(0, Math.ceil((this.#patience - native.monotonic()) / 1e6));
    this.#patience = 0;
    return -1;
  }

  /** Answers a READ that has waited for long enough. */
  expire(): void {
    if (this.timeout !== 0) return;
    this.#patience = 0;
    this.#reads.giveBack(0);
  }

  /** The notification queue was started, or kicked. */
  kicked(queue: Virtqueue): void {
    if (this.#queue.queue !== queue) {
      this.#queue.queue = queue;
      this.#attach();
    }
    if (queue.pending) this.#arrived();
  }

  /** A queue is about to stop: what it lent goes back, to be lent again when it goes on. */
  stopping(queue: Virtqueue): void {
    if (this.#queue.queue === queue) {
      this.#queue.queue = null;
      this.#attach();
    } else {
      this.#lent.giveBack(0, queue);
      this.#reads.giveBack(0, queue);
    }
  }

  #attach(): void {
    this.fsnotify.attach(this.#agent ? this.#reads : this.#session ? (this.#queue.queue !== null ? this.#queue : this.#lent) : null);
    if (this.#session && this.#queue.queue?.pending === true) this.#arrived();
  }

  #arrived(): void {
    if (!this.#session) return;
    if (!this.#told) {
      this.#told = true;
      this.onCarrier();
      this.onTold();
    }
    this.fsnotify.buffersArrived();
  }
}
