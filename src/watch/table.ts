/**
 * The guest's watches: one slot per nodeid, in typed arrays that grow. A slot belongs to an *object* of the host, which the
 * watcher numbers (one fanotify mark, one inotify watch); two nodeids are one object when the guest reached an inode through two mounts,
 * and such slots form a chain.
 */

/** Open addressing over slot numbers (0: empty place); who uses it compares the keys. */
export class OpenIndex {
  #places = new Int32Array(64);
  #count = 0;
  readonly #hash: (slot: number) => number;

  /** @param hash the hash of a slot's key, unsigned */
  constructor(hash: (slot: number) => number) {
    this.#hash = hash;
  }

  /** Where the search for a hash begins; go on with {@link after} until {@link at} is 0. */
  start(hash: number): number {
    return hash & (this.#places.length - 1);
  }

  at(place: number): number {
    return this.#places[place] as number;
  }

  after(place: number): number {
    return (place + 1) & (this.#places.length - 1);
  }

  insert(slot: number): void {
    if (++this.#count * 2 > this.#places.length) this.#grow();
    this.#put(slot);
  }

  /** Takes a slot out and moves up what had to go past it, so that no search ends too early. */
  remove(slot: number): void {
    let hole = this.start(this.#hash(slot));
    while (this.#places[hole] !== slot) {
      if (this.#places[hole] === 0) return;
      hole = this.after(hole);
    }
    this.#count--;
    for (let place = this.after(hole); this.#places[place] !== 0; place = this.after(place)) {
      const home = this.start(this.#hash(this.#places[place] as number));
      // Cyclically: the entry may move to the hole when its home is not behind the hole.
      const distance = (place - home) & (this.#places.length - 1);
      if (distance < ((place - hole) & (this.#places.length - 1))) continue;
      this.#places[hole] = this.#places[place] as number;
      hole = place;
    }
    this.#places[hole] = 0;
  }

  clear(): void {
    this.#places = new Int32Array(64);
    this.#count = 0;
  }

  #put(slot: number): void {
    let place = this.start(this.#hash(slot));
    while (this.#places[place] !== 0) place = this.after(place);
    this.#places[place] = slot;
  }

  #grow(): void {
    const old = this.#places;
    this.#places = new Int32Array(old.length * 2);
    for (let i = 0; i < old.length; i++) if (old[i] !== 0) this.#put(old[i] as number);
  }
}

/** A 32-bit mix (constants of Ellis' hash prospector). */
export function mix(h: number): number {
  h = Math.imul(h ^ (h >>> 16), 0x7feb352d);
  h = Math.imul(h ^ (h >>> 15), 0x846ca68b);
  return (h ^ (h >>> 16)) >>> 0;
}

export function hashNodeid(nodeid: number): number {
  const high = Math.floor(nodeid / 4294967296);
  return mix((nodeid - high * 4294967296) ^ Math.imul(high, 0x9e3779b1));
}

/** Numbers from 1 on; those given back come again first. */
export class Numbers {
  /** One more than the highest number ever taken. */
  top = 1;
  readonly #free: number[] = [];

  take(): number {
    return this.#free.pop() ?? this.top++;
  }

  give(n: number): void {
    this.#free.push(n);
  }

  clear(): void {
    this.top = 1;
    this.#free.length = 0;
  }
}

/** The table. Slot 0 is none. */
export class WatchTable {
  /** Per slot. */
  nodeid = new Float64Array(64);
  generation = new Uint32Array(64);
  /** What the guest asked for, in FS_* bits; 0 for a slot that only guards (see {@link guards}). */
  mask = new Uint32Array(64);
  /** The watcher's object, 0: none. */
  object = new Int32Array(64);
  /** Next slot of the same object, 0: last. */
  next = new Int32Array(64);
  directory = new Uint8Array(64);
  /** Watched directories whose own end only this directory, their parent, can tell (see watcher.ts). */
  guards = new Uint32Array(64);
  /** The parent that guards this slot, 0: none. */
  guardedBy = new Int32Array(64);
  /** Slots whose mask is not 0. */
  watches = 0;

  readonly #numbers = new Numbers();
  readonly #index = new OpenIndex((slot) => hashNodeid(this.nodeid[slot] as number));

  /** One more than the highest slot: for walks. Unused slots have nodeid 0. */
  get top(): number {
    return this.#numbers.top;
  }

  /** The slot of a nodeid, or 0. */
  find(nodeid: number): number {
    const index = this.#index;
    for (let place = index.start(hashNodeid(nodeid)); ; place = index.after(place)) {
      const slot = index.at(place);
      if (slot === 0 || this.nodeid[slot] === nodeid) return slot;
    }
  }

  add(nodeid: number, generation: number, directory: boolean): number {
    const slot = this.#numbers.take();
    if (slot >= this.nodeid.length) this.#grow();
    this.nodeid[slot] = nodeid;
    this.generation[slot] = generation;
    this.mask[slot] = 0;
    this.object[slot] = 0;
    this.next[slot] = 0;
    this.directory[slot] = directory ? 1 : 0;
    this.guards[slot] = 0;
    this.guardedBy[slot] = 0;
    this.#index.insert(slot);
    return slot;
  }

  setMask(slot: number, mask: number): void {
    this.watches += (mask === 0 ? 0 : 1) - (this.mask[slot] === 0 ? 0 : 1);
    this.mask[slot] = mask;
  }

  remove(slot: number): void {
    this.setMask(slot, 0);
    this.#index.remove(slot);
    this.nodeid[slot] = 0;
    this.#numbers.give(slot);
  }

  clear(): void {
    this.nodeid.fill(0);
    this.#index.clear();
    this.#numbers.clear();
    this.watches = 0;
  }

  #grow(): void {
    const n = this.nodeid.length * 2;
    this.nodeid = grown(this.nodeid, new Float64Array(n));
    this.generation = grown(this.generation, new Uint32Array(n));
    this.mask = grown(this.mask, new Uint32Array(n));
    this.object = grown(this.object, new Int32Array(n));
    this.next = grown(this.next, new Int32Array(n));
    this.directory = grown(this.directory, new Uint8Array(n));
    this.guards = grown(this.guards, new Uint32Array(n));
    this.guardedBy = grown(this.guardedBy, new Int32Array(n));
  }
}

/** Copies an array to the start of a larger one, which it returns. */
export function grown<T extends { set(from: ArrayLike<number>): void }>(from: ArrayLike<number>, to: T): T {
  to.set(from);
  return to;
}
