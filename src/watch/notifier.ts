/**
 * Messages on their way to the guest: a bounded queue, and the hand-over to whatever buffers the guest has given. Nothing here
 * waits; what finds no buffer stays until one comes, and what finds no room is lost by exactly one OVERFLOW record.
 *
 * Order: event records and FUSE_NOTIFY_DELETE keep the host's order. Other invalidations overtake them: each says "what you had is old"
 * of a change that has happened already, so early is as right as in time; and all events of a batch then fit into few messages.
 */
import { arena, arenaAlloc, arenaFree, native } from 'vhost-user-ts/native';
import { FsnotifyRecord } from '../fuse/abi.js';
import { type FileEvent, NOTIFY_BYTES, Notification } from '../fuse/notify.js';
import { Counter, Counters } from './counters.js';
import { hashNodeid, mix } from './table.js';

/** Where buffers of the guest come from: the notification queue, or lent READ_NOTIFY requests. */
export interface BufferSource {
  /** Takes the next buffer that the guest has given. @returns false when there is none; else the fields below describe it. */
  takeBuffer(): boolean;
  /** Arena offset of its writable `struct iovec`, and their count. */
  readonly iov: number;
  readonly count: number;
  /** Bytes at its start that the carrier fills itself (the reply's header of a lent request). */
  readonly skip: number;
  /** Room behind these. */
  readonly bytes: number;
  /** Gives the buffer taken last back to the guest with a message of `length` bytes in it (0: none). */
  complete(length: number): void;
  /** Some buffers were completed: the guest shall look. */
  flush(): void;
}

export interface NotifierOptions {
  /** Bytes of the queue, of which invalidations have a quarter. Default 4 MiB: some 35 000 events. */
  queueBytes?: number;
  /** Without a buffer for so many milliseconds what waits is given up for an OVERFLOW. Default 30 s. */
  starveMs?: number;
}

/** Flags of a queued message. */
const CARRIES_OVERFLOW = 1;
const IS_DELETE = 2;

const u8 = arena.u8;
const u32 = arena.u32;
const f64 = arena.f64;

/** Bytes before a queued message: u32 length, u32 flags, f64 when its first event was read. */
const ENTRY = 16;
/** Instead of a length: the rest up to the end is unused. */
const WRAP = 0xffff_ffff;

/** First in, first out, in the arena. */
class MessageRing {
  count = 0;
  /** Messages ever put in and ever taken out. */
  pushed = 0;
  shifted = 0;
  readonly base: number;
  readonly size: number;
  #head = 0;
  #tail = 0;

  constructor(size: number) {
    this.size = size & ~7;
    this.base = arenaAlloc(this.size);
  }

  /** The oldest message: its arena offset, length, flags and time. */
  get at(): number {
    return this.base + this.#head + ENTRY;
  }
  get length(): number {
    return u32[(this.base + this.#head) >> 2] as number;
  }
  get flags(): number {
    return u32[(this.base + this.#head + 4) >> 2] as number;
  }
  get since(): number {
    return f64[(this.base + this.#head + 8) >> 3] as number;
  }

  /** Copies a message behind the others; false when there is no room. */
  push(from: number, length: number, flags: number, since: number): boolean {
    const need = ENTRY + ((length + 7) & ~7);
    if (this.count === 0) this.#head = this.#tail = 0;
    let tail = this.#tail;
    if (this.count > 0 && tail <= this.#head) {
      if (need > this.#head - tail) return false;
    } else if (need > this.size - tail) {
      if (need > this.#head) return false;
      if (tail < this.size) u32[(this.base + tail) >> 2] = WRAP;
      tail = 0;
    }
    const at = this.base + tail;
    u32[at >> 2] = length;
    u32[(at + 4) >> 2] = flags;
    f64[(at + 8) >> 3] = since;
    u8.copyWithin(at + ENTRY, from, from + length);
    this.#tail = tail + need;
    this.count++;
    this.pushed++;
    return true;
  }

  shift(): void {
    this.#head += ENTRY + ((this.length + 7) & ~7);
    if (this.#head >= this.size || u32[(this.base + this.#head) >> 2] === WRAP) this.#head = 0;
    this.count--;
    this.shifted++;
  }

  clear(): void {
    this.shifted = this.pushed;
    this.count = 0;
    this.#head = this.#tail = 0;
  }

  free(): void {
    arenaFree(this.base, this.size);
  }
}

/** Places of the tables of invalidations under way. */
const RECENT_INODES = 1024;
const RECENT_ENTRIES = 64;

export class Notifier {
  /** Sees every message that is handed to the guest (arena offset and length); for people who look. */
  observer: ((at: number, length: number) => void) | null = null;
  /** Called before an OVERFLOW record is handed over: marks are set again then, so that what the guest does next misses nothing. */
  onOverflow: () => void = () => undefined;

  readonly #counters: Counters;
  readonly #starve: number;
  readonly #events: MessageRing;
  readonly #invalidations: MessageRing;
  #source: BufferSource | null = null;

  /** The message of records that still grows: the youngest of all. */
  readonly #open = new Notification(arenaAlloc(NOTIFY_BYTES), NOTIFY_BYTES);
  #openFlags = 0;
  #openRecords = 0;
  #openSince = 0;
  /** The place of its last record, if the next one may be the same; 0: none. */
  #last = 0;
  readonly #scratch = new Notification(arenaAlloc(NOTIFY_BYTES), NOTIFY_BYTES);
  readonly #event: FileEvent = newEvent();
  readonly #target: FileEvent = newEvent();

  /** An OVERFLOW record waits: it also stands for everything that gets lost until it is handed over. */
  #overflow = false;
  /** FUSE_NOTIFY_DELETE messages that wait. */
  #deletes = 0;
  #batch = 1;
  #now = 0;
  /** Since when something waits while no buffer came; 0: nothing waits. */
  #waiting = 0;

  // What is invalidated already and not taken by the guest yet, or was in this batch.
  readonly #inodeNode = new Float64Array(RECENT_INODES);
  readonly #inodeData = new Uint8Array(RECENT_INODES);
  readonly #inodeBatch = new Float64Array(RECENT_INODES);
  readonly #inodeSequence = new Float64Array(RECENT_INODES);
  readonly #entryParent = new Float64Array(RECENT_ENTRIES);
  readonly #entryLength = new Uint8Array(RECENT_ENTRIES);
  readonly #entryBatch = new Float64Array(RECENT_ENTRIES);
  readonly #entrySequence = new Float64Array(RECENT_ENTRIES);
  readonly #entryName = new Uint8Array(RECENT_ENTRIES * 256);

  constructor(counters = new Counters(), options: NotifierOptions = {}) {
    const bytes = options.queueBytes ?? 4 << 20;
    this.#counters = counters;
    this.#starve = (options.starveMs ?? 30_000) * 1e6;
    this.#invalidations = new MessageRing(bytes >> 2);
    this.#events = new MessageRing(bytes - (bytes >> 2));
  }

  /** Where buffers come from from now on; null: nowhere. */
  attach(source: BufferSource | null): void {
    this.#source = source;
  }

  /** Whether something waits for a buffer. */
  get pending(): boolean {
    return this.#invalidations.count > 0 || this.#events.count > 0 || this.#open.length > 0;
  }

  /** Bytes that wait are at most these. */
  get queueBytes(): number {
    return this.#events.size + this.#invalidations.size;
  }

  /** A batch of events begins: all of them have happened before now. */
  batch(): void {
    this.#batch++;
    this.#now = native.monotonic();
    if (this.#waiting !== 0 && this.#now - this.#waiting > this.#starve) this.#giveUp();
  }

  /** FUSE_NOTIFY_INVAL_INODE: attributes, and with `data` everything cached of its contents (of a directory: its list). */
  invalInode(nodeid: number, data: boolean): void {
    const place = hashNodeid(nodeid) & (RECENT_INODES - 1);
    const kind = data ? 1 : 0;
    if (
      this.#inodeNode[place] === nodeid &&
      (this.#inodeData[place] as number) >= kind &&
      (this.#inodeBatch[place] === this.#batch || (this.#inodeSequence[place] as number) >= this.#invalidations.shifted)
    ) {
      this.#counters.add(Counter.invalidationsSaved);
      return;
    }
    const length = this.#scratch.invalInode(nodeid, data ? 0 : -1, 0);
    if (!this.#invalidate(length)) return;
    this.#inodeNode[place] = nodeid;
    this.#inodeData[place] = kind;
    this.#inodeBatch[place] = this.#batch;
    this.#inodeSequence[place] = this.#invalidations.pushed - 1;
  }

  /** FUSE_NOTIFY_INVAL_ENTRY. `name`: arena offset. */
  invalEntry(parent: number, name: number, nameLength: number): void {
    let h = hashNodeid(parent);
    for (let i = 0; i < nameLength; i++) h = Math.imul(h ^ (u8[name + i] as number), 0x01000193);
    const place = mix(h) & (RECENT_ENTRIES - 1);
    if (
      this.#entryParent[place] === parent &&
      this.#entryLength[place] === nameLength &&
      (this.#entryBatch[place] === this.#batch || (this.#entrySequence[place] as number) >= this.#invalidations.shifted) &&
      this.#sameEntry(place, name, nameLength)
    ) {
      this.#counters.add(Counter.invalidationsSaved);
      return;
    }
    const length = this.#scratch.invalEntry(parent, name, nameLength, 0);
    if (this.#deletes > 0) {
      // It must not take the name away before the guest has read the DELETE that says whose it was.
      this.#ordered(length, 0);
      return;
    }
    if (!this.#invalidate(length)) return;
    this.#entryParent[place] = parent;
    this.#entryLength[place] = nameLength;
    this.#entryBatch[place] = this.#batch;
    this.#entrySequence[place] = this.#invalidations.pushed - 1;
    for (let i = 0; i < nameLength; i++) this.#entryName[place * 256 + i] = u8[name + i] as number;
  }

  /** FUSE_NOTIFY_DELETE: the guest's watchers of `child` hear DELETE_SELF by it, so it keeps its place among the events. */
  deleteEntry(parent: number, child: number, name: number, nameLength: number): void {
    this.#ordered(this.#scratch.delete(parent, child, name, nameLength), IS_DELETE);
    this.#entryBatch.fill(0); // an INVAL_ENTRY of the same name comes after it
    this.#entrySequence.fill(-1);
  }

  /** One event record. `mask` fits 32 bits; `name`: arena offset, nameLength 0 for the object itself. */
  record(
    mask: number,
    nodeid: number,
    generation: number,
    child: number,
    childGeneration: number,
    cookie: number,
    name: number,
    nameLength: number,
  ): void {
    if (this.#last !== 0 && cookie === 0 && this.#sameAsLast(mask, nodeid, child, name, nameLength)) {
      this.#counters.add(Counter.coalesced);
      return;
    }
    const event = this.#event;
    fill(event, mask, nodeid, generation, child, childGeneration, cookie, name, nameLength);
    this.#begin();
    let at = this.#open.length;
    if (!this.#open.add(event)) {
      this.#close();
      this.#begin();
      at = this.#open.length;
      this.#open.add(event);
    }
    this.#last = cookie === 0 ? this.#open.at + at : 0;
    this.#openRecords++;
    this.#counters.add(Counter.records);
  }

  /** A rename: two records that stay together. */
  rename(
    mask: number,
    nodeid: number,
    generation: number,
    name: number,
    nameLength: number,
    toMask: number,
    toNodeid: number,
    toGeneration: number,
    toName: number,
    toLength: number,
    child: number,
    childGeneration: number,
  ): void {
    fill(this.#event, mask, nodeid, generation, child, childGeneration, 0, name, nameLength);
    fill(this.#target, toMask, toNodeid, toGeneration, child, childGeneration, 0, toName, toLength);
    this.#begin();
    if (!this.#open.addRename(this.#event, this.#target)) {
      this.#close();
      this.#begin();
      this.#open.addRename(this.#event, this.#target);
    }
    this.#last = 0;
    this.#openRecords += 2;
    this.#counters.add(Counter.records, 2);
  }

  /** Events were lost before they came here. */
  overflow(): void {
    if (this.#overflow) return;
    this.#overflow = true;
    this.#begin();
    if (!this.#open.addOverflow()) {
      this.#close();
      this.#begin();
      // A close that found no room has put the record there already.
      if ((this.#openFlags & CARRIES_OVERFLOW) === 0) this.#open.addOverflow();
    }
    this.#openFlags |= CARRIES_OVERFLOW;
    this.#last = 0;
  }

  /** Hands over what waits while there are buffers: after a drain, and when the guest has given buffers. */
  pump(): void {
    const source = this.#source;
    if (source === null || !this.pending) return;
    const counters = this.#counters;
    const now = native.monotonic();
    let completed = 0;
    while (this.pending && source.takeBuffer()) {
      const ring = this.#invalidations.count > 0 ? this.#invalidations : this.#events.count > 0 ? this.#events : null;
      const at = ring === null ? this.#open.at : ring.at;
      const length = ring === null ? this.#open.length : ring.length;
      const flags = ring === null ? this.#openFlags : ring.flags;
      const since = ring === null ? this.#openSince : ring.since;
      completed++;
      if (source.bytes < length) {
        // No guest gives less than notify_buf_size. Its buffer comes back, the message waits for a proper one.
        source.complete(0);
        continue;
      }
      if ((flags & CARRIES_OVERFLOW) !== 0) {
        this.onOverflow();
        this.#overflow = false;
        counters.add(Counter.overflowsSent);
      }
      if ((flags & IS_DELETE) !== 0) this.#deletes--;
      native.scatter(source.iov, source.count, source.skip, at, length);
      if (this.observer !== null) this.observer(at, length);
      source.complete(length);
      if (ring !== null) ring.shift();
      else this.#emptyOpen();
      counters.add(Counter.messages);
      counters.add(Counter.bytes, length);
      counters.observe(now - since);
      this.#waiting = 0;
    }
    if (completed > 0) source.flush();
    if (this.pending) {
      if (this.#waiting === 0) this.#waiting = now;
    } else this.#waiting = 0;
  }

  /** The session ended: nothing of it may reach the next one. */
  reset(): void {
    this.#events.clear();
    this.#invalidations.clear();
    this.#emptyOpen();
    this.#overflow = false;
    this.#deletes = 0;
    this.#waiting = 0;
    this.#batch++;
  }

  /** Gives the queue's memory back. */
  free(): void {
    this.#events.free();
    this.#invalidations.free();
    arenaFree(this.#open.at, NOTIFY_BYTES);
    arenaFree(this.#scratch.at, NOTIFY_BYTES);
  }

  #begin(): void {
    if (this.#open.length > 0) return;
    this.#open.events();
    this.#openSince = this.#now;
  }

  #emptyOpen(): void {
    this.#open.length = 0;
    this.#openFlags = 0;
    this.#openRecords = 0;
    this.#last = 0;
  }

  /** The open message gets no more records: it goes to the queue. */
  #close(): void {
    if (this.#open.length === 0) return;
    if (this.#events.push(this.#open.at, this.#open.length, this.#openFlags, this.#openSince)) {
      this.#emptyOpen();
      return;
    }
    this.#counters.add(Counter.lost, this.#openRecords);
    const had = (this.#openFlags & CARRIES_OVERFLOW) !== 0;
    this.#emptyOpen();
    this.#lose(had);
  }

  /** Something found no room. `had`: the OVERFLOW record went with it. The open message always has room for that one. */
  #lose(had: boolean): void {
    if (!this.#overflow) this.#counters.add(Counter.queueOverflows);
    else if (!had) return;
    this.#overflow = true;
    this.#begin();
    if (!this.#open.addOverflow()) {
      // Full of records that will not be read in time: they go, it stays.
      this.#counters.add(Counter.lost, this.#openRecords);
      this.#emptyOpen();
      this.#begin();
      this.#open.addOverflow();
    }
    this.#openFlags |= CARRIES_OVERFLOW;
    this.#last = 0;
  }

  /** No buffers for too long: what waits is old news. */
  #giveUp(): void {
    this.#counters.add(Counter.lost, this.#openRecords + this.#events.count + this.#invalidations.count);
    const had = this.#overflow;
    this.#events.clear();
    this.#invalidations.clear();
    this.#emptyOpen();
    this.#deletes = 0;
    this.#waiting = this.#now;
    this.#lose(had);
  }

  #invalidate(length: number): boolean {
    if (!this.#invalidations.push(this.#scratch.at, length, 0, this.#now)) {
      this.#counters.add(Counter.lost);
      this.#lose(false);
      return false;
    }
    this.#counters.add(Counter.invalidations);
    return true;
  }

  /** A message that must come after the records so far and before the next ones. */
  #ordered(length: number, flags: number): void {
    this.#close();
    // After a failed close the OVERFLOW record is the younger one, and stands for this message, too.
    if (this.#open.length > 0 || !this.#events.push(this.#scratch.at, length, flags, this.#now)) {
      this.#counters.add(Counter.lost);
      this.#lose(false);
      return;
    }
    if ((flags & IS_DELETE) !== 0) this.#deletes++;
    this.#counters.add(Counter.invalidations);
  }

  #sameAsLast(mask: number, nodeid: number, child: number, name: number, nameLength: number): boolean {
    const event = this.#event;
    if (event.maskLow !== mask || event.nodeid !== nodeid || event.child !== child || event.nameLength !== nameLength) return false;
    const at = this.#last + FsnotifyRecord.name;
    for (let i = 0; i < nameLength; i++) if (u8[at + i] !== u8[name + i]) return false;
    return true;
  }

  #sameEntry(place: number, name: number, nameLength: number): boolean {
    for (let i = 0; i < nameLength; i++) if (this.#entryName[place * 256 + i] !== u8[name + i]) return false;
    return true;
  }
}

function newEvent(): FileEvent {
  return { nodeid: 0, generation: 0, child: 0, childGeneration: 0, maskLow: 0, maskHigh: 0, cookie: 0, name: 0, nameLength: 0 };
}

function fill(
  event: FileEvent,
  mask: number,
  nodeid: number,
  generation: number,
  child: number,
  childGeneration: number,
  cookie: number,
  name: number,
  nameLength: number,
): void {
  event.nodeid = nodeid;
  event.generation = generation;
  event.child = child;
  event.childGeneration = childGeneration;
  event.maskLow = mask;
  event.cookie = cookie;
  event.name = name;
  event.nameLength = nameLength;
}
