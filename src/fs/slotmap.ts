/**
 * Which slots of a store are taken: a bitmap, and above it bitmaps of "all 32 below are taken", so that the lowest free slot
 * is found in one step per level. Low slots first keeps what is in use together in few pages.
 */

/** Bitmaps in shared words; zeros mean free. */
export class SlotMap {
  readonly slots: number;
  readonly #levels: Uint32Array[] = [];

  /**
   * @param words memory of the bitmaps, see {@link SlotMap.words}
   * @param slots how many slots there are: a multiple of 32
   */
  constructor(words: Uint32Array, slots: number) {
    this.slots = slots;
    let at = 0;
    for (let n = Math.ceil(slots / 32); ; n = Math.ceil(n / 32)) {
      this.#levels.push(words.subarray(at, at + n));
      at += n;
      if (n === 1) break;
    }
  }

  /** How many words the bitmaps for `slots` slots take. */
  static words(slots: number): number {
    let total = 0;
    for (let n = Math.ceil(slots / 32); ; n = Math.ceil(n / 32)) {
      total += n;
      if (n === 1) return total;
    }
  }

  /** Frees all slots below `top`. */
  clear(top: number): void {
    let n = top;
    for (const words of this.#levels) {
      n = Math.min(Math.ceil(n / 32), words.length);
      words.fill(0, 0, n);
    }
  }

  /** Takes the lowest free slot; -1 when all are taken. */
  take(): number {
    const levels = this.#levels;
    let index = 0;
    for (let level = levels.length - 1; level >= 0; level--) {
      const free = ~((levels[level] as Uint32Array)[index] as number);
      if (free === 0) return -1;
      index = index * 32 + (31 - Math.clz32(free & -free));
      if (level > 0 && index >= (levels[level - 1] as Uint32Array).length) return -1;
    }
    if (index >= this.slots) return -1;
    this.claim(index);
    return index;
  }

  /** Takes this slot. */
  claim(slot: number): void {
    let index = slot;
    for (const words of this.#levels) {
      const word = index >>> 5;
      const now = (words[word] as number) | (1 << (index & 31));
      words[word] = now;
      if (now !== -1) return;
      index = word;
    }
  }

  /** Frees a slot; returns whether none of its group of 32 is taken any more. */
  free(slot: number): boolean {
    let index = slot;
    for (const words of this.#levels) {
      const word = index >>> 5;
      const was = words[word] as number;
      words[word] = was & ~(1 << (index & 31));
      if (was !== 0xffffffff) break;
      index = word;
    }
    return this.group(slot) === 0;
  }

  taken(slot: number): boolean {
    return (this.group(slot) & (1 << (slot & 31))) !== 0;
  }

  /** Calls `visit` for every slot below `top` that is taken. */
  each(top: number, visit: (slot: number) => void): void {
    const words = this.#levels[0] as Uint32Array;
    for (let word = 0; word * 32 < top; word++)
      for (let bits = words[word] as number; bits !== 0; bits &= bits - 1) visit(word * 32 + (31 - Math.clz32(bits & -bits)));
  }

  /** The bits of a slot's group of 32. */
  group(slot: number): number {
    return (this.#levels[0] as Uint32Array)[slot >>> 5] as number;
  }
}
