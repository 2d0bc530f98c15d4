/**
 * The inodes that the guest knows: records of 128 bytes (two cache lines) in the state block, found by nodeid, by (device,
 * inode number, mount) and by file handle. No JavaScript object, string or BigInt belongs to an inode.
 *
 * A nodeid is `generation * 2^24 + slot`: a plain number below 2^53. Generations come from one counter of the store, so a
 * nodeid does not come again before 2^29 other inodes have been met. The root is nodeid 1: slot 1, generation 0.
 */
import { randomBytes } from 'node:crypto';
import { arena } from 'vhost-user-ts/native';
import type { Block } from './block.js';
import { Header, INODE_RECORD, INODE_SLOTS, MOUNT_SLOTS, Part } from './block.js';
import { ChainIndex } from './chainindex.js';
import { ENOENT, ESTALE } from './linux.js';
import { SlotMap } from './slotmap.js';

/** log2 of the words of a record. */
export const SHIFT = 5;

/**
 * Words of a record. The first cache line is what a look-up of a known name touches.
 * `fd` is an i32 (-1: none), `nlookup` an f64 (the guest may hold more than 2^32 references).
 */
export const Inode = {
  inoLow: 0,
  inoHigh: 1,
  /** Index of the (mount, device) pair in mounts.ts. */
  mount: 2,
  /** S_IFMT bits of the mode. */
  type: 3,
  /** Birth time: seconds modulo 2^32 and nanoseconds. An inode number that comes again has another one. */
  btimeSec: 4,
  btimeNsec: 5,
  /** Chain of the index by inode number. */
  nextIno: 6,
  generation: 7,
  nlookup: 8,
  fd: 10,
  /** Place in the ring of cached descriptors while `fd` is one of them. */
  cachePosition: 11,
  flags: 12,
  /** What the guest watches of this inode, for a process after this one. */
  watchMask: 13,
  /** Chain of the index by handle. */
  nextHandle: 16,
  /** `struct file_handle`: length, type, and up to 40 bytes. Length 0: no handle. */
  handleBytes: 17,
  handleType: 18,
  handle: 19,
} as const;

/** Longest handle that a record holds (ext4 8, xfs 12, tmpfs 12, btrfs 20 to 40). */
export const HANDLE_MAX = 40;

/** Bits of `flags`. */
export const Flag = {
  /** `fd` stays open until the inode is forgotten: there is no handle to open it again by. */
  pinned: 1,
  /** `fd` was used since the clock's hand passed. */
  referenced: 2,
  /** In the index by inode number. */
  indexed: 4,
  /** In the index by handle. */
  handleIndexed: 8,
  /** So young when met that the next inode of this number could have the same birth time: compare handles. */
  young: 16,
  /** In the line of forgotten inodes that are kept for export support (`Share.keepForgotten`), though it may be known again. */
  kept: 32,
  /** The record is one: set last when it is made and taken away first when it goes, so that it tells after whatever end of a process. */
  live: 64,
} as const;

export const ROOT_NODEID = 1;
export const ROOT_SLOT = 1;

const GENERATIONS = 1 << 29;

/** Words from Header.inodes on. */
const State = { generation: 0, seed: 1, live: 2, empty: 3, top: 4 } as const;
/** Word of the header, from Header.inodes on, with one more than the highest slot ever used. */
export const TOP = State.top;

/** Empty pages that are kept for the next inodes before the system gets any back: 1 MiB. */
const KEEP_EMPTY = 256;
/** Runs of pages given back by one call at most, so that no FORGET takes long. */
const PUNCH_RUNS = 16;

/** The store. Slots are checked numbers inside: only {@link find} takes what a guest sent. */
export class InodeStore {
  /** All records as words and as doubles: `u32[(slot << SHIFT) + Inode.field]`. */
  readonly u32: Uint32Array;
  readonly i32: Int32Array;
  readonly f64: Float64Array;

  readonly #block: Block;
  readonly #state: Uint32Array;
  readonly #slots: SlotMap;
  readonly #byIno: ChainIndex;
  readonly #byHandle: ChainIndex;
  readonly #seed: number;
  /** How many there are on each mount. */
  readonly #onMount = new Uint32Array(MOUNT_SLOTS);
  /** Called when the last inode of a mount is forgotten. */
  mountUnused: (mount: number) => void = () => {};
  #punchAt = 0;
  #lastUsed = 0;

  constructor(block: Block) {
    this.#block = block;
    const buffer = block.buffer(Part.inodes, INODE_SLOTS * INODE_RECORD);
    this.u32 = new Uint32Array(buffer);
    this.i32 = new Int32Array(buffer);
    this.f64 = new Float64Array(buffer);
    this.#state = block.header.subarray(Header.inodes, Header.inodes + 16);
    this.#slots = new SlotMap(block.u32(Part.inodeMaps, SlotMap.words(INODE_SLOTS)), INODE_SLOTS);
    this.#byIno = new ChainIndex(
      block.u32(Part.inodeIndex, INODE_SLOTS),
      block.header.subarray(Header.inodeIndex, Header.inodeIndex + 2),
      this.u32,
      SHIFT,
      Inode.nextIno,
      (slot) => this.#inoHash(slot),
    );
    this.#byHandle = new ChainIndex(
      block.u32(Part.handleIndex, INODE_SLOTS),
      block.header.subarray(Header.handleIndex, Header.handleIndex + 2),
      this.u32,
      SHIFT,
      Inode.nextHandle,
      (slot) => hashWords(this.u32, (slot << SHIFT) + Inode.handleBytes, this.#seed),
    );
    // Chains that a guest could make long by the order in which it creates files are not to be had without the seed.
    if (!block.inherited) this.#state[State.seed] = randomBytes(4).readUInt32LE();
    this.#seed = (this.#state[State.seed] as number) | 0;
    if (block.inherited) this.#recover();
    this.#slots.claim(0); // "no slot" in chains and results
  }

  /**
   * The process before this one can have ended within any change: what follows from the records is made anew. Records that the guest was
   * never told of are dropped, and so are cached descriptors: nobody keeps them.
   */
  #recover(): void {
    // A slot can have been taken before the bound was raised.
    this.#slots.clear(this.top + 1);
    this.#byIno.clear();
    this.#byHandle.clear();
    let live = 0;
    for (let slot = 1; slot < this.top; slot++) {
      const at = slot << SHIFT;
      const flags = this.u32[at + Inode.flags] as number;
      if ((flags & Flag.live) === 0) continue;
      if (this.f64[(at + Inode.nlookup) >> 1] === 0 && (flags & Flag.kept) === 0 && slot !== ROOT_SLOT) {
        this.u32[at + Inode.flags] = 0;
        continue;
      }
      live++;
      this.#count(this.u32[at + Inode.mount] as number, 1);
      this.#slots.claim(slot);
      if ((flags & Flag.pinned) === 0) this.i32[at + Inode.fd] = -1;
      this.#index(slot);
    }
    this.#state[State.live] = live;
    this.#state[State.empty] = 0;
  }

  /** Whether an inode of this mount is known. */
  usesMount(mount: number): boolean {
    return this.#onMount[mount] !== 0;
  }

  #count(mount: number, by: 1 | -1): void {
    this.#onMount[mount] = (this.#onMount[mount] as number) + by;
  }

  /** Inodes known, the root among them. */
  get size(): number {
    return this.#state[State.live] as number;
  }

  /** Highest slot ever used and one more: the bound for walks over all records. */
  get top(): number {
    return this.#state[State.top] as number;
  }

  /**
   * The slot of a nodeid that the guest sent.
   * @returns the slot; -ENOENT when no such nodeid was given out or it was forgotten; -ESTALE when the slot has another inode now.
   */
  find(nodeid: number): number {
    const generation = Math.floor(nodeid / INODE_SLOTS);
    const slot = nodeid - generation * INODE_SLOTS;
    if (slot === 0 || !this.#slots.taken(slot)) return -ENOENT;
    return this.u32[(slot << SHIFT) + Inode.generation] === generation ? slot : -ESTALE;
  }

  /** Whether a slot is in use. */
  live(slot: number): boolean {
    return slot !== 0 && this.#slots.taken(slot);
  }

  /** Calls `visit` with the slot of every inode. */
  each(visit: (slot: number) => void): void {
    this.#slots.each(this.top, (slot) => {
      if (slot !== 0) visit(slot);
    });
  }

  nodeid(slot: number): number {
    return (this.u32[(slot << SHIFT) + Inode.generation] as number) * INODE_SLOTS + slot;
  }

  /** The inode with this number, or 0. */
  byIno(inoLow: number, inoHigh: number, mount: number): number {
    const u32 = this.u32;
    for (let slot = this.#byIno.first(hashIno(inoLow, inoHigh, mount, this.#seed)); slot !== 0; slot = this.#byIno.next(slot)) {
      const at = slot << SHIFT;
      if (u32[at] === inoLow && u32[at + Inode.inoHigh] === inoHigh && u32[at + Inode.mount] === mount) return slot;
    }
    return 0;
  }

  /**
   * The first inode whose handle equals the `struct file_handle` at arena offset `handle`, or 0. One inode seen through two
   * mounts is two inodes here: {@link nextByHandle} gives the others.
   */
  byHandle(handle: number): number {
    const words = arena.u32;
    return this.#equalHandle(this.#byHandle.first(hashWords(words, handle >> 2, this.#seed)), words, handle >> 2);
  }

  nextByHandle(slot: number): number {
    return this.#equalHandle(this.#byHandle.next(slot), this.u32, (slot << SHIFT) + Inode.handleBytes);
  }

  #equalHandle(slot: number, words: Uint32Array, at: number): number {
    while (slot !== 0 && !equalWords(this.u32, (slot << SHIFT) + Inode.handleBytes, words, at)) slot = this.#byHandle.next(slot);
    return slot;
  }

  /**
   * Takes a slot for an inode with this number; it is in the index, has no handle, no fd, and nlookup 0.
   * @returns the slot, or 0 when all 2^24 are taken.
   */
  insert(inoLow: number, inoHigh: number, mount: number, type: number): number {
    const slot = this.#slots.take();
    if (slot < 0) return 0;
    let generation = 0;
    if (slot !== ROOT_SLOT) {
      generation = ((this.#state[State.generation] as number) + 1) % GENERATIONS;
      if (generation === 0) generation = 1;
      this.#state[State.generation] = generation;
    }
    this.#fill(slot, generation, inoLow, inoHigh, mount, type);
    return slot;
  }

  /**
   * As {@link insert}, for an inode that the guest knows already by a nodeid that another daemon gave it.
   * @returns the slot, or 0 when that is no nodeid of a store like this, or its slot is taken
   */
  insertAs(nodeid: number, inoLow: number, inoHigh: number, mount: number, type: number): number {
    const generation = Math.floor(nodeid / INODE_SLOTS);
    const slot = nodeid - generation * INODE_SLOTS;
    if (!Number.isSafeInteger(nodeid) || slot <= ROOT_SLOT || generation < 1 || generation >= GENERATIONS) return 0;
    if (this.#slots.taken(slot)) return 0;
    this.#slots.claim(slot);
    this.#fill(slot, generation, inoLow, inoHigh, mount, type);
    return slot;
  }

  /** The generation of the youngest nodeid: the next ones follow it. */
  get generation(): number {
    return this.#state[State.generation] as number;
  }

  set generation(youngest: number) {
    this.#state[State.generation] = youngest % GENERATIONS;
  }

  #fill(slot: number, generation: number, inoLow: number, inoHigh: number, mount: number, type: number): void {
    const at = slot << SHIFT;
    const u32 = this.u32;
    // The page had no inode before: it is one of the empty ones no more.
    const group = this.#slots.group(slot);
    if ((group & (group - 1)) === 0 && (this.#state[State.empty] as number) > 0)
      this.#state[State.empty] = (this.#state[State.empty] as number) - 1;
    u32[at] = inoLow;
    u32[at + Inode.inoHigh] = inoHigh;
    u32[at + Inode.mount] = mount;
    this.#count(mount, 1);
    u32[at + Inode.type] = type;
    u32[at + Inode.btimeSec] = 0;
    u32[at + Inode.btimeNsec] = 0;
    u32[at + Inode.generation] = generation;
    this.f64[(at + Inode.nlookup) >> 1] = 0;
    this.i32[at + Inode.fd] = -1;
    u32[at + Inode.cachePosition] = 0;
    u32[at + Inode.watchMask] = 0;
    u32[at + Inode.handleBytes] = 0;
    this.#state[State.live] = (this.#state[State.live] as number) + 1;
    if (slot >= (this.#state[State.top] as number)) this.#state[State.top] = slot + 1;
    u32[at + Inode.flags] = Flag.indexed | Flag.live;
    this.#byIno.insert(slot, hashIno(inoLow, inoHigh, mount, this.#seed));
  }

  /** Copies the `struct file_handle` at arena offset `handle` (at most {@link HANDLE_MAX} bytes) into the record and its index. */
  setHandle(slot: number, handle: number): void {
    const at = (slot << SHIFT) + Inode.handleBytes;
    this.dropHandle(slot);
    copyHandle(arena.u32, handle >> 2, this.u32, at);
    this.u32[(slot << SHIFT) + Inode.flags] = (this.u32[(slot << SHIFT) + Inode.flags] as number) | Flag.handleIndexed;
    this.#byHandle.insert(slot, hashWords(this.u32, at, this.#seed));
  }

  /** Takes the handle out of its index; the bytes stay. */
  dropHandle(slot: number): void {
    const at = slot << SHIFT;
    const flags = this.u32[at + Inode.flags] as number;
    if ((flags & Flag.handleIndexed) === 0) return;
    this.u32[at + Inode.flags] = flags & ~Flag.handleIndexed;
    this.#byHandle.remove(slot, hashWords(this.u32, at + Inode.handleBytes, this.#seed));
  }

  /** Copies a record's handle to arena offset `out`, for open_by_handle_at. */
  copyHandle(slot: number, out: number): void {
    copyHandle(this.u32, (slot << SHIFT) + Inode.handleBytes, arena.u32, out >> 2);
  }

  /** Whether a record's handle equals the one at arena offset `handle`. */
  sameHandle(slot: number, handle: number): boolean {
    return equalWords(this.u32, (slot << SHIFT) + Inode.handleBytes, arena.u32, handle >> 2);
  }

  /** Takes an inode out of the indexes: its number belongs to another one now. The nodeid stays until it is forgotten. */
  retire(slot: number): void {
    const at = slot << SHIFT;
    const flags = this.u32[at + Inode.flags] as number;
    if ((flags & Flag.indexed) !== 0) {
      this.u32[at + Inode.flags] = flags & ~Flag.indexed;
      this.#byIno.remove(slot, this.#inoHash(slot));
    }
    this.dropHandle(slot);
  }

  /** Ends a slot; its fd must be closed already. */
  remove(slot: number): void {
    const flagsAt = (slot << SHIFT) + Inode.flags;
    this.u32[flagsAt] = (this.u32[flagsAt] as number) & ~Flag.live;
    this.retire(slot);
    this.#state[State.live] = (this.#state[State.live] as number) - 1;
    const mount = this.u32[(slot << SHIFT) + Inode.mount] as number;
    this.#count(mount, -1);
    const lastOfPage = this.#slots.free(slot);
    if (!this.usesMount(mount)) this.mountUnused(mount);
    if (!lastOfPage) return;
    const empty = (this.#state[State.empty] as number) + 1;
    this.#state[State.empty] = empty;
    if (empty > KEEP_EMPTY && empty * 64 > this.size) this.#giveBack();
  }

  /** Ends all slots but the root's, at once; their fds must be closed already. */
  clear(): void {
    const { top } = this;
    this.#byIno.clear();
    this.#byHandle.clear();
    // Zeros are no records.
    const pages = Math.ceil(top / 32);
    this.u32.fill(0, (ROOT_SLOT + 1) << SHIFT, 32 << SHIFT);
    if (pages > 1) this.#block.punch(Part.inodes + 4096, (pages - 1) * 4096);
    this.#slots.clear(top);
    this.#slots.claim(0);
    this.#slots.claim(ROOT_SLOT);
    this.#index(ROOT_SLOT);
    punchBuckets(this.#block, Part.inodeIndex, this.#byIno.buckets);
    punchBuckets(this.#block, Part.handleIndex, this.#byHandle.buckets);
    this.#state[State.live] = 1;
    this.#state[State.empty] = 0;
    this.#state[State.top] = ROOT_SLOT + 1;
    this.#punchAt = 0;
  }

  /** Puts a record into the indexes that it says it is in. */
  #index(slot: number): void {
    const at = slot << SHIFT;
    const flags = this.u32[at + Inode.flags] as number;
    if ((flags & Flag.indexed) !== 0) this.#byIno.insert(slot, this.#inoHash(slot));
    if ((flags & Flag.handleIndexed) !== 0) this.#byHandle.insert(slot, hashWords(this.u32, at + Inode.handleBytes, this.#seed));
  }

  /** Gives empty pages of records, and buckets beyond those in use, back to the system; goes on where it stopped last time. */
  #giveBack(): void {
    const pages = Math.ceil(this.top / 32);
    let runs = 0;
    let page = this.#punchAt;
    if (page === 0) this.#lastUsed = 0;
    while (page < pages && runs < PUNCH_RUNS) {
      if (this.#slots.group(page * 32) !== 0) {
        this.#lastUsed = page++;
        continue;
      }
      const first = page;
      while (page < pages && this.#slots.group(page * 32) === 0) page++;
      this.#block.punch(Part.inodes + first * 4096, (page - first) * 4096);
      runs++;
    }
    this.#punchAt = page;
    if (page < pages) return;
    this.#punchAt = 0;
    this.#state[State.empty] = 0;
    this.#state[State.top] = (this.#lastUsed + 1) * 32;
    punchBuckets(this.#block, Part.inodeIndex, this.#byIno.buckets);
    punchBuckets(this.#block, Part.handleIndex, this.#byHandle.buckets);
  }

  #inoHash(slot: number): number {
    const at = slot << SHIFT;
    return hashIno(this.u32[at] as number, this.u32[at + Inode.inoHigh] as number, this.u32[at + Inode.mount] as number, this.#seed);
  }
}

function punchBuckets(block: Block, part: number, buckets: number): void {
  const used = Math.ceil((buckets * 4) / 4096) * 4096;
  block.punch(part + used, INODE_SLOTS * 4 - used);
}

/**
 * A 32-bit mix in which each input bit moves each output bit (constants of Ellis' hash prospector). Signed, as all hashes here: V8 keeps
 * a number above 2^31 as an object.
 */
function mix(h: number): number {
  h = Math.imul(h ^ (h >>> 16), 0x7feb352d);
  h = Math.imul(h ^ (h >>> 15), 0x846ca68b);
  return h ^ (h >>> 16);
}

function hashIno(low: number, high: number, mount: number, seed: number): number {
  return mix(mix(low ^ seed) + Math.imul(high, 0x9e3779b1) + Math.imul(mount, 0x85ebca6b));
}

/** Hash of a struct file_handle whose first word is words[at]. */
function hashWords(words: Uint32Array, at: number, seed: number): number {
  const n = handleWords(words[at] as number);
  let h = seed;
  for (let i = 0; i < n; i++) h = (mix(h ^ (words[at + i] as number)) + 0x9e3779b9) | 0;
  return h;
}

/** Words of a struct file_handle with so many bytes; the last word is zero-padded. */
function handleWords(bytes: number): number {
  return 2 + ((bytes + 3) >>> 2);
}

function equalWords(a: Uint32Array, atA: number, b: Uint32Array, atB: number): boolean {
  const n = handleWords(a[atA] as number);
  for (let i = 0; i < n; i++) if (a[atA + i] !== b[atB + i]) return false;
  return true;
}

function copyHandle(from: Uint32Array, fromAt: number, to: Uint32Array, toAt: number): void {
  const n = handleWords(from[fromAt] as number);
  for (let i = 0; i < n; i++) to[toAt + i] = from[fromAt + i] as number;
}
