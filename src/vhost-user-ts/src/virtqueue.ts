/**
 * The device side of a split virtqueue (virtio 1.2, 2.7), with EVENT_IDX or plain flag suppression.
 *
 * Ring geometry, in elements of the views below:
 *   descriptor table  u32[4 n]          16 bytes each
 *   avail ring        u16: flags, idx, ring[n], used_event
 *   used ring         u16: flags, idx; then { u32 id, u32 len }[n]; then u16 avail_event
 *
 * Ring indexes are read and written with Atomics (sequentially consistent): "publish used, then look at used_event" and
 * "set avail_event, then look at avail idx" both need a store before a load, which plain accesses do not keep in order.
 */
import { ChainError, DescriptorChain } from './chain.js';
import { Ledger, NO_HEAD, Note, type QueueBook } from './ledger.js';
import type { GuestMemory } from './memory.js';
import { arena, native } from './native.js';

const AVAIL_F_NO_INTERRUPT = 1;
const USED_F_NO_NOTIFY = 1;
/** Largest queue of the specification. */
export const MAX_QUEUE_SIZE = 32768;

/** Addresses of a queue's rings as SET_VRING_ADDR gives them (front-end user addresses). */
export interface RingAddresses {
  descriptors: number;
  avail: number;
  used: number;
  /** Guest address of the used ring for dirty logging, when VHOST_VRING_F_LOG is set; else -1. */
  log: number;
}

/** For {@link Virtqueue.markDirty}: made by the first migration. */
let late: DescriptorChain | undefined;

const NONE16 = new Uint16Array(0);
const NONE32 = new Uint32Array(0);
const NONE64 = new Float64Array(0);
const NOTHING_PUSHED = (NO_HEAD << 16) >>> 0;

/** What a driver has agreed to, as far as rings go. */
export interface RingFeatures {
  eventIdx: boolean;
  indirect: boolean;
}

/** One queue. Made once per index; {@link start} and {@link stop} follow the front end. */
export class Virtqueue {
  size = 0;
  eventIdx = false;
  indirect = false;
  /** The rings are mapped and the queue may be served. */
  running = false;
  /** Position in the avail ring: the next entry to take (VRING_BASE). */
  lastAvail = 0;
  /** Eventfd that interrupts the driver (SET_VRING_CALL), or -1. The latest one counts. */
  callFd = -1;
  /** The chain of the last {@link pop}. */
  readonly chain: DescriptorChain;

  // Counters; whoever reads them may set them back to 0.
  interruptsSent = 0;
  interruptsSaved = 0;
  kicks = 0;
  batches = 0;

  /** Chains taken and not yet given back. */
  inFlight = 0;
  /** {@link disableKicks} was called, and {@link enableKicks} not since. */
  kicksDisabled = false;

  #table: Uint32Array = NONE32;
  #avail: Uint16Array = NONE16;
  #used16: Uint16Array = NONE16;
  #used32: Uint32Array = NONE32;
  #buffers: ArrayBuffer[] = [];
  /** Avail index as last seen: saves a look at shared memory per chain of a batch. */
  #seenAvail = 0;
  #usedIdx = 0;
  /** Used index when the driver was last signalled (or when it was first known not to need it). */
  #signalled = 0;
  #availEventAt = 0;
  /** Address of the avail index in this process. */
  #availIndexAddress = 0;
  #logAddress = -1;

  readonly #ledger: Ledger;
  readonly #notes: Float64Array;
  #used: Uint32Array = NONE32;
  #taken: Float64Array = NONE64;
  /** Heads that an earlier process has taken and not given back: taken again before any other. */
  #again: number[] = [];

  readonly index: number;
  readonly memory: GuestMemory;

  /**
   * @param chain where {@link pop} leaves what it took: queues that one thread serves in turn share it
   * @param ledger where is written down what is in flight
   */
  constructor(index: number, memory: GuestMemory, chain: DescriptorChain, ledger: Ledger = new Ledger()) {
    this.index = index;
    this.chain = chain;
    this.memory = memory;
    this.#ledger = ledger;
    this.#notes = ledger.notes;
  }

  /**
   * Maps the rings and begins at avail position `base`. The used index is read from the ring (the front end kept it).
   * @returns undefined, or what is wrong with the addresses.
   */
  start(size: number, addresses: RingAddresses, base: number, features: RingFeatures): string | undefined {
    const problem = this.#begin(size, addresses, features);
    if (problem !== undefined) return problem;
    this.#usedIdx = Atomics.load(this.#used16, 1);
    this.#taken.fill(0);
    this.#used[0] = this.#usedIdx | NOTHING_PUSHED;
    this.#from(base);
    return undefined;
  }

  /**
   * As {@link start}, for a ring that an earlier process has served with the same ledger: what it had answered is published, and what it
   * had taken comes again before anything else: the request that was being served, then the others in their order.
   */
  resume(size: number, addresses: RingAddresses, features: RingFeatures): string | undefined {
    const problem = this.#begin(size, addresses, features);
    if (problem !== undefined) return problem;
    const word = this.#used[0] as number;
    const last = word >>> 16;
    if (last < size) this.#taken[last] = 0;
    this.#usedIdx = word & 0xffff;
    const again: number[] = [];
    for (let head = 0; head < size; head++) if (this.#taken[head] !== 0) again.push(head);
    // First the one that was being served: what is known of it must not be mixed up with another's.
    const place = (head: number) => ((this.#taken[head] as number) > 0 ? 0 : -(this.#taken[head] as number));
    again.sort((a, b) => place(a) - place(b));
    this.#from((this.#usedIdx + again.length) & 0xffff);
    this.#again = again;
    if (Atomics.load(this.#used16, 1) !== this.#usedIdx) Atomics.store(this.#used16, 1, this.#usedIdx);
    return undefined;
  }

  /** Numbers of the requests that {@link resume} found in flight and that were not taken again; the one that was being served is positive. */
  get interrupted(): number[] {
    return this.#again.map((head) => this.#taken[head] as number);
  }

  #begin(size: number, addresses: RingAddresses, features: RingFeatures): string | undefined {
    this.stop();
    const problem = this.#map(size, addresses);
    if (problem !== undefined) return problem;
    this.eventIdx = features.eventIdx;
    this.indirect = features.indirect;
    const book: QueueBook = this.#ledger.book(this.index, size);
    this.#used = book.used;
    this.#taken = book.taken;
    return undefined;
  }

  #from(base: number): void {
    this.lastAvail = base;
    this.#seenAvail = base;
    this.#signalled = this.#usedIdx;
    this.#again = [];
    this.inFlight = 0;
    this.kicksDisabled = false;
    this.running = true;
  }

  /** Maps the rings of a running queue again after the memory table changed; positions stay. With a problem the queue has stopped. */
  remap(addresses: RingAddresses): string | undefined {
    const problem = this.#map(this.size, addresses);
    if (problem !== undefined) this.running = false;
    return problem;
  }

  #map(size: number, addresses: RingAddresses): string | undefined {
    this.#unmap();
    if (size < 1 || size > MAX_QUEUE_SIZE || (size & (size - 1)) !== 0)
      return `queue size ${size} is not a power of two up to ${MAX_QUEUE_SIZE}`;
    if (addresses.descriptors % 16 !== 0 || addresses.avail % 2 !== 0 || addresses.used % 4 !== 0) return 'ring addresses not aligned';
    const table = this.memory.viewUser(addresses.descriptors, 16 * size);
    if (table !== undefined) this.#buffers.push(table);
    const avail = this.memory.viewUser(addresses.avail, 6 + 2 * size);
    if (avail !== undefined) this.#buffers.push(avail);
    const used = this.memory.viewUser(addresses.used, 6 + 8 * size);
    if (used !== undefined) this.#buffers.push(used);
    if (table === undefined || avail === undefined || used === undefined) {
      this.#unmap();
      return 'ring addresses outside the memory table';
    }
    this.size = size;
    this.#table = new Uint32Array(table);
    this.#avail = new Uint16Array(avail);
    this.#used16 = new Uint16Array(used);
    this.#used32 = new Uint32Array(used, 0, 1 + 2 * size);
    this.#availEventAt = 2 + 4 * size;
    this.#availIndexAddress = this.memory.addressOfUser(addresses.avail) + 2;
    this.#logAddress = addresses.log;
    return undefined;
  }

  #unmap(): void {
    for (const buffer of this.#buffers) native.regionDetach(buffer);
    this.#buffers = [];
    this.#seenAvail = this.lastAvail; // what was seen is not there any more
    this.#table = NONE32;
    this.#avail = NONE16;
    this.#used16 = NONE16;
    this.#used32 = NONE32;
  }

  /** Lets go of the rings. What was pushed is published first. */
  stop(): void {
    if (this.running) this.publish();
    this.running = false;
    this.#again = [];
    this.#unmap();
  }

  /** A running queue has no rings while the memory they lie in is gone. */
  get #mapped(): boolean {
    return this.running && this.#avail.length > 0;
  }

  /** Whether chains wait, without taking one. */
  get pending(): boolean {
    return this.#mapped && (this.#again.length > 0 || Atomics.load(this.#avail, 1) !== this.lastAvail);
  }

  /**
   * Takes the next available chain apart into {@link chain}.
   * @returns 1, 0 when none waits, or a {@link ChainError}: the driver broke the rules and the queue cannot go on.
   */
  pop(): number {
    if (this.#seenAvail === this.lastAvail) {
      if (!this.#mapped) return 0;
      if (this.#again.length > 0) return this.#popAgain();
      const seen = Atomics.load(this.#avail, 1);
      if (seen === this.lastAvail) return 0;
      if (((seen - this.lastAvail) & 0xffff) > this.size) return ChainError.availJump;
      this.#seenAvail = seen;
    }
    const head = this.#avail[2 + (this.lastAvail & (this.size - 1))] as number;
    const error = this.chain.load(this.memory, this.#table, this.size, head, this.indirect);
    if (error !== 0) return error;
    this.lastAvail = (this.lastAvail + 1) & 0xffff;
    this.inFlight++;
    const notes = this.#notes;
    const number = (notes[Note.highest] as number) + 1;
    notes[Note.highest] = number;
    notes[Note.request] = number;
    this.#used[0] = this.#usedIdx | NOTHING_PUSHED;
    this.#taken[head] = number;
    return 1;
  }

  /** Chains known to wait since the avail index was last looked at. */
  get backlog(): number {
    return (this.#seenAvail - this.lastAvail) & 0xffff;
  }

  /** Takes a chain that an earlier process had taken, under its number. */
  #popAgain(): number {
    const head = this.#again[0] as number;
    const error = this.chain.load(this.memory, this.#table, this.size, head, this.indirect);
    if (error !== 0) return error;
    this.#again.shift();
    this.inFlight++;
    const number = Math.abs(this.#taken[head] as number);
    this.#notes[Note.request] = number;
    this.#used[0] = this.#usedIdx | NOTHING_PUSHED;
    this.#taken[head] = number;
    return 1;
  }

  /** Number of the chain that was taken last, of whatever queue. */
  get number(): number {
    return this.#notes[Note.request] as number;
  }

  /** The chain that was just taken is given back later: something else is served meanwhile. */
  postpone(head: number): void {
    this.#taken[head] = -(this.#taken[head] as number);
  }

  /** Puts a chain into the used ring; the driver sees it at the next {@link publish}. `length`: bytes written to its writable part. */
  push(head: number, length: number): void {
    const slot = this.#usedIdx & (this.size - 1);
    this.#used32[1 + 2 * slot] = head;
    this.#used32[2 + 2 * slot] = length;
    this.#usedIdx = (this.#usedIdx + 1) & 0xffff;
    this.inFlight--;
    this.#used[0] = this.#usedIdx | (head << 16);
    this.#taken[head] = 0;
    if (this.memory.logging) this.#logUsed(4 + 8 * slot, 8);
  }

  /**
   * Reports the first `length` bytes written to a chain that was taken earlier as dirty, before it is pushed. Where they lie is
   * looked up anew: until then its descriptors are the device's, and logging may have begun after it was taken.
   */
  markDirty(head: number, length: number): void {
    late ??= new DescriptorChain();
    if (late.load(this.memory, this.#table, this.size, head, this.indirect) === 0) late.markDirty(this.memory, length);
  }

  /** Reports `length` bytes of the used ring, from its start plus `offset`, as dirty. */
  #logUsed(offset: number, length: number): void {
    if (this.#logAddress >= 0) this.memory.markDirty(this.#logAddress + offset, length);
  }

  /**
   * Shows the driver everything pushed so far.
   * @returns whether it wants an interrupt (virtio 1.2, 2.7.7.2).
   */
  publish(): boolean {
    const used = this.#usedIdx;
    const before = this.#signalled;
    if (used === before || this.#used16.length === 0) return false;
    Atomics.store(this.#used16, 1, used);
    if (this.memory.logging) this.#logUsed(0, 4);
    this.#signalled = used;
    let wanted: boolean;
    if (this.eventIdx) {
      const event = Atomics.load(this.#avail, 2 + this.size);
      wanted = ((used - event - 1) & 0xffff) < ((used - before) & 0xffff);
    } else {
      wanted = (Atomics.load(this.#avail, 0) & AVAIL_F_NO_INTERRUPT) === 0;
    }
    if (wanted) this.interruptsSent++;
    else this.interruptsSaved++;
    return wanted;
  }

  /** Interrupts the driver, whatever it asked for. */
  signal(): void {
    if (this.callFd >= 0) native.eventfdWrite(this.callFd);
  }

  /** {@link publish}, and the interrupt if the driver wants one: once per batch. */
  flush(): void {
    if (this.publish()) this.signal();
  }

  /** Asks the driver not to kick while we look at the ring anyway. With EVENT_IDX a stale avail_event does that by itself. */
  disableKicks(): void {
    this.kicksDisabled = true;
    if (this.eventIdx || this.#used16.length === 0) return;
    Atomics.store(this.#used16, 0, USED_F_NO_NOTIFY);
    if (this.memory.logging) this.#logUsed(0, 4);
  }

  /** For native.busyLoop: where the avail index is, and which value means that nothing waits. */
  describeAvail(at: number): void {
    arena.f64[at >> 3] = this.#mapped ? this.#availIndexAddress : 0;
    arena.u32[(at + 8) >> 2] = this.lastAvail;
  }

  /** Asks for a kick with the next chain. @returns true when one came in the meantime: look again instead of sleeping. */
  enableKicks(): boolean {
    this.kicksDisabled = false;
    if (!this.#mapped) return false;
    if (this.eventIdx) Atomics.store(this.#used16, this.#availEventAt, this.lastAvail);
    else Atomics.store(this.#used16, 0, 0);
    if (this.memory.logging) this.#logUsed(this.eventIdx ? 4 + 8 * this.size : 0, 4);
    return this.#again.length > 0 || Atomics.load(this.#avail, 1) !== this.lastAvail;
  }
}
