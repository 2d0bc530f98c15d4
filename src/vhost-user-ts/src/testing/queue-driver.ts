/**
 * The driver's side of one split virtqueue (virtio 1.3, 2.7): descriptors are put in the table, their heads in the avail ring,
 * and what the back end has done is taken from the used ring. Everything that the back end gets wrong is thrown at the test.
 *
 * Beside the well-behaved operations there is raw access (`setDescriptor`, `offer`, `setAvailIndex`...) to build rings that no
 * honest driver would.
 */
import { native } from '../native.js';
import type { MockMemory } from './mock-memory.js';

/** Flags of a descriptor (2.7.5). */
export const DescriptorFlag = { NEXT: 1, WRITE: 2, INDIRECT: 4 } as const;

/** `flags` of the avail ring: no interrupts wanted; of the used ring: no kicks wanted (only without EVENT_IDX). */
const SUPPRESS = 1;

const DESCRIPTOR_SIZE = 16;
const POLLIN = 1;

/** A part of guest memory. */
export interface Segment {
  address: number;
  length: number;
}

/** An element of the used ring: which chain, and how many bytes the back end wrote to it. */
export interface Used {
  head: number;
  length: number;
}

/** A descriptor written as it is: nothing about it needs to make sense. */
export interface RawDescriptor {
  address: number | bigint;
  length: number;
  flags?: number;
  next?: number;
}

export interface QueueOptions {
  /** Guest addresses of the three parts; allocated in region `region` otherwise. */
  descriptors?: number;
  avail?: number;
  used?: number;
  region?: number;
  /** The index that both rings start at: 65530 reaches the wrap soon. */
  base?: number;
  /** Runs the device's turn, where it lives in this thread. */
  turn?: () => void;
}

export class QueueDriver {
  readonly index: number;
  readonly size: number;
  readonly memory: MockMemory;
  /** Guest addresses of the parts. */
  readonly descriptors: number;
  readonly avail: number;
  readonly used: number;
  /** Whether EVENT_IDX is negotiated: set before the queue is started. */
  eventIdx = false;
  /** Eventfds: what we write to kick, what the back end writes to call us and to report an error. */
  readonly kickFd: number;
  callFd: number;
  readonly errorFd: number;
  turn: (() => void) | undefined;
  /** Kicks written and left out since the start. */
  kicks = 0;
  kicksSaved = 0;

  private readonly table: Uint32Array;
  /** flags, idx, ring[size], used_event. */
  private readonly availRing: Uint16Array;
  /** flags, idx; and avail_event behind the ring. */
  private readonly usedHead: Uint16Array;
  private readonly usedRing: Uint32Array;
  private readonly availEventSlot: number;
  /** Our own account of free descriptors and of what is in flight: the one in guest memory is not ours alone. */
  private readonly next: Uint16Array;
  private readonly chainLength: Uint16Array;
  /** Writable bytes of the chain in flight from each head, -1 where none is. */
  private readonly capacity: Float64Array;
  private readonly indirectTables: (Segment | undefined)[] = [];
  private freeHead = 0;
  private free: number;
  /** Ring indexes, running through 65535 to 0. */
  private availIndex: number;
  private publishedIndex: number;
  private usedIndex: number;
  /** avail.idx when it was last decided whether to kick. */
  private kickedIndex: number;

  constructor(memory: MockMemory, index: number, size: number, options: QueueOptions = {}) {
    const region = options.region ?? 0;
    const base = options.base ?? 0;
    this.index = index;
    this.size = size;
    this.memory = memory;
    this.descriptors = options.descriptors ?? memory.allocate(size * DESCRIPTOR_SIZE, 4096, region);
    this.avail = options.avail ?? memory.allocate(6 + 2 * size, 64, region);
    this.used = options.used ?? memory.allocate(6 + 8 * size, 64, region);
    this.turn = options.turn;
    this.kickFd = native.eventfd(0);
    this.callFd = native.eventfd(0);
    this.errorFd = native.eventfd(0);

    const table = memory.view(this.descriptors, size * DESCRIPTOR_SIZE);
    this.table = new Uint32Array(table.buffer, table.byteOffset, size * 4);
    const avail = memory.view(this.avail, 6 + 2 * size);
    this.availRing = new Uint16Array(avail.buffer, avail.byteOffset, 3 + size);
    const used = memory.view(this.used, 6 + 8 * size);
    this.usedHead = new Uint16Array(used.buffer, used.byteOffset, 3 + 4 * size);
    this.usedRing = new Uint32Array(used.buffer, used.byteOffset + 4, 2 * size);
    this.availEventSlot = 2 + 4 * size;

    this.next = Uint16Array.from({ length: size }, (_, i) => (i + 1) % size);
    this.chainLength = new Uint16Array(size);
    this.capacity = new Float64Array(size).fill(-1);
    this.free = size;
    this.availIndex = this.publishedIndex = this.usedIndex = this.kickedIndex = base;
    this.availRing[1] = base;
    this.usedHead[1] = base;
    this.availRing[2 + this.size] = base; // used_event: calls are wanted
  }

  /** Closes the eventfds. */
  close(): void {
    native.close(this.kickFd);
    native.close(this.callFd);
    native.close(this.errorFd);
  }

  // --- the driver's work ---

  /** Chains that the back end has not returned yet. */
  get inFlight(): number {
    return (this.publishedIndex - this.usedIndex) & 0xffff;
  }

  /** Descriptors that are free. */
  get freeDescriptors(): number {
    return this.free;
  }

  /**
   * Puts a chain in the avail ring without publishing it: first what the device reads, then what it writes (2.7.4.2).
   * @returns its head, or -1 when too few descriptors are free.
   */
  add(readable: readonly Segment[], writable: readonly Segment[] = [], indirect = false): number {
    const count = readable.length + writable.length;
    if (count === 0) throw new RangeError('a chain has at least one descriptor');
    const needed = indirect ? 1 : count;
    if (needed > this.free) return -1;
    const head = this.freeHead;
    let at = head;
    let capacity = 0;
    let last = head;
    const table = indirect ? this.indirectTable(head, count) : undefined;
    for (let i = 0; i < count; i++) {
      const write = i >= readable.length;
      const segment = (write ? writable[i - readable.length] : readable[i]) as Segment;
      if (write) capacity += segment.length;
      const flags = (write ? DescriptorFlag.WRITE : 0) | (i < count - 1 ? DescriptorFlag.NEXT : 0);
      if (table !== undefined) {
        putDescriptor(table, i, segment.address, segment.length, flags, i + 1);
      } else {
        const next = this.next[at] as number;
        putDescriptor(this.table, at, segment.address, segment.length, flags, i < count - 1 ? next : 0);
        last = at;
        at = next;
      }
    }
    if (table !== undefined) {
      const { address } = this.indirectTables[head] as Segment;
      putDescriptor(this.table, head, address, count * DESCRIPTOR_SIZE, DescriptorFlag.INDIRECT, 0);
    }
    this.freeHead = this.next[last] as number;
    this.free -= needed;
    this.chainLength[head] = needed;
    this.capacity[head] = capacity;
    this.offer(head);
    return head;
  }

  /** Makes everything in the avail ring visible to the device. */
  publish(): void {
    this.publishedIndex = this.availIndex;
    Atomics.store(this.availRing, 1, this.availIndex);
  }

  /** Kicks, unless the device has said that it looks by itself. Returns whether it kicked. */
  kick(): boolean {
    // The load of avail_event or flags must not pass the store of avail.idx (2.7.21.3.1): Atomics are sequentially consistent.
    const before = this.kickedIndex;
    this.kickedIndex = this.publishedIndex;
    const wanted = this.eventIdx
      ? needEvent(Atomics.load(this.usedHead, this.availEventSlot), this.publishedIndex, before)
      : (Atomics.load(this.usedHead, 0) & SUPPRESS) === 0;
    if (wanted) this.forceKick();
    else this.kicksSaved++;
    return wanted;
  }

  /** Kicks whatever the device has said. */
  forceKick(): void {
    this.kicks++;
    native.eventfdWrite(this.kickFd);
  }

  /** Adds a chain, publishes it and kicks. Returns its head, or -1 when too few descriptors are free. */
  send(readable: readonly Segment[], writable: readonly Segment[] = [], indirect = false): number {
    const head = this.add(readable, writable, indirect);
    if (head >= 0) {
      this.publish();
      this.kick();
    }
    return head;
  }

  /** Whether the back end has returned chains that were not collected yet. */
  get ready(): boolean {
    return Atomics.load(this.usedHead, 1) !== this.usedIndex;
  }

  /** Takes what the back end has returned, at most `max` chains. */
  collect(max = Number.POSITIVE_INFINITY): Used[] {
    const result: Used[] = [];
    while (result.length < max && this.ready) {
      const { head, length } = this.usedElement(this.usedIndex);
      const capacity = this.capacity[head];
      if (capacity === undefined || capacity < 0)
        throw new Error(`queue ${this.index}: the device returned head ${head}, which it does not have`);
      if (length > capacity)
        throw new Error(`queue ${this.index}: the device says it wrote ${length} bytes to a chain with room for ${capacity}`);
      this.release(head);
      this.usedIndex = (this.usedIndex + 1) & 0xffff;
      result.push({ head, length });
    }
    if (this.eventIdx && result.length > 0) Atomics.store(this.availRing, 2 + this.size, this.usedIndex);
    return result;
  }

  /** Waits until the back end has returned something. Returns whether it has, within `timeout` milliseconds. */
  wait(timeout = 5000): boolean {
    const end = performance.now() + timeout;
    for (let round = 0; ; round++) {
      if (this.ready) return true;
      this.turn?.();
      if (this.ready) return true;
      const left = Math.max(0, Math.ceil(end - performance.now()));
      if (left === 0) return false;
      if (native.poll(this.callFd, POLLIN, this.turn === undefined ? left : Math.min(left, round < 4 ? 0 : 1)) > 0)
        native.eventfdRead(this.callFd);
    }
  }

  /** Waits for `count` chains to come back. */
  collectAll(count: number, timeout = 5000): Used[] {
    const result: Used[] = [];
    while (result.length < count) {
      if (!this.wait(timeout)) throw new Error(`queue ${this.index}: ${result.length} of ${count} chains came back within ${timeout} ms`);
      result.push(...this.collect(count - result.length));
    }
    return result;
  }

  /** Asks for a call with the next chain that is returned (on = true), or for none. */
  wantCalls(on: boolean): void {
    if (this.eventIdx) Atomics.store(this.availRing, 2 + this.size, on ? this.usedIndex : (this.usedIndex + 0x8000) & 0xffff);
    else Atomics.store(this.availRing, 0, on ? 0 : SUPPRESS);
  }

  /** How many calls came since the last time, clearing them. */
  takeCalls(): number {
    return native.eventfdRead(this.callFd);
  }

  /** How many errors the back end has reported since the last time, clearing them. */
  takeErrors(): number {
    return native.eventfdRead(this.errorFd);
  }

  // --- raw access ---

  /** Writes descriptor `index` of the table. */
  setDescriptor(index: number, { address, length, flags = 0, next = 0 }: RawDescriptor): void {
    putDescriptor(this.table, index, address, length, flags, next);
  }

  /** Writes a table of descriptors anywhere in guest memory: for indirect descriptors. */
  writeTable(address: number, descriptors: readonly RawDescriptor[]): void {
    const view = this.memory.view(address, descriptors.length * DESCRIPTOR_SIZE);
    const table = new DataView(view.buffer, view.byteOffset, view.length);
    for (const [i, { address: target, length, flags = 0, next = 0 }] of descriptors.entries()) {
      table.setBigUint64(i * DESCRIPTOR_SIZE, BigInt(target), true);
      table.setUint32(i * DESCRIPTOR_SIZE + 8, length, true);
      table.setUint16(i * DESCRIPTOR_SIZE + 12, flags, true);
      table.setUint16(i * DESCRIPTOR_SIZE + 14, next, true);
    }
  }

  /** Puts any number in the avail ring, as if it were a head. Not published. */
  offer(head: number): void {
    this.availRing[2 + (this.availIndex % this.size)] = head;
    this.availIndex = (this.availIndex + 1) & 0xffff;
  }

  /** Offers, publishes and kicks unconditionally. */
  sendRaw(head: number): void {
    this.offer(head);
    this.publish();
    this.forceKick();
  }

  /** Sets avail.idx to anything. */
  setAvailIndex(index: number): void {
    this.availIndex = this.publishedIndex = index & 0xffff;
    Atomics.store(this.availRing, 1, index);
  }

  /** used.idx as the back end has it. */
  get deviceUsedIndex(): number {
    return Atomics.load(this.usedHead, 1);
  }

  /** Whether the device says by `flags` that it wants no kicks. */
  get kicksSuppressed(): boolean {
    return (Atomics.load(this.usedHead, 0) & SUPPRESS) !== 0;
  }

  /** avail_event as the back end has it. */
  get availEvent(): number {
    return Atomics.load(this.usedHead, this.availEventSlot);
  }

  /** The element of the used ring for running index `index`. */
  usedElement(index: number): Used {
    const slot = (index % this.size) * 2;
    return { head: this.usedRing[slot] as number, length: this.usedRing[slot + 1] as number };
  }

  /** Takes what the back end has returned without any check of it. */
  collectRaw(): Used[] {
    const result: Used[] = [];
    while (this.ready) {
      result.push(this.usedElement(this.usedIndex));
      this.usedIndex = (this.usedIndex + 1) & 0xffff;
    }
    return result;
  }

  /** Forgets everything in flight and starts from index `base` with fresh rings: what a driver does after a reset. */
  reset(base = 0): void {
    this.table.fill(0);
    this.availRing.fill(0);
    this.usedHead.fill(0);
    for (let i = 0; i < this.size; i++) this.next[i] = (i + 1) % this.size;
    this.capacity.fill(-1);
    this.freeHead = 0;
    this.free = this.size;
    this.availIndex = this.publishedIndex = this.usedIndex = this.kickedIndex = base;
    this.availRing[1] = base;
    this.usedHead[1] = base;
    this.availRing[2 + this.size] = base; // used_event: calls are wanted
    native.eventfdRead(this.kickFd);
    native.eventfdRead(this.callFd);
    native.eventfdRead(this.errorFd);
  }

  private release(head: number): void {
    const count = this.chainLength[head] as number;
    let last = head;
    for (let i = 1; i < count; i++) last = this.next[last] as number;
    this.next[last] = this.freeHead;
    this.freeHead = head;
    this.free += count;
    this.capacity[head] = -1;
  }

  /** The indirect table of a head, grown as needed. */
  private indirectTable(head: number, count: number): Uint32Array {
    let table = this.indirectTables[head];
    if (table === undefined || table.length < count * DESCRIPTOR_SIZE) {
      const length = Math.max(8, count) * DESCRIPTOR_SIZE;
      table = { address: this.memory.allocate(length), length };
      this.indirectTables[head] = table;
    }
    const view = this.memory.view(table.address, table.length);
    return new Uint32Array(view.buffer, view.byteOffset, table.length / 4);
  }
}

/** vring_need_event (2.7.10): whether moving from `before` to `now` passed `event`. */
export function needEvent(event: number, now: number, before: number): boolean {
  return ((now - event - 1) & 0xffff) < ((now - before) & 0xffff);
}

function putDescriptor(table: Uint32Array, index: number, address: number | bigint, length: number, flags: number, next: number): void {
  const at = index * 4;
  if (typeof address === 'bigint') {
    table[at] = Number(address & 0xffff_ffffn);
    table[at + 1] = Number(address >> 32n);
  } else {
    table[at] = address;
    table[at + 1] = address / 2 ** 32;
  }
  table[at + 2] = length;
  table[at + 3] = flags | (next << 16);
}
