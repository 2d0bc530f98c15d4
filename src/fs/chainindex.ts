/**
 * A hash index over records: buckets of chains that run through a link word of each record, grown and shrunk by linear
 * hashing (Litwin 1980): one bucket is split or merged at a time, so that no insertion ever pays for a rehash.
 */

/** At least so many buckets: one page. */
const MINIMUM = 1024;

/** The index; what the keys are only its owner knows. Slot 0 ends a chain. */
export class ChainIndex {
  readonly #heads: Uint32Array;
  readonly #records: Uint32Array;
  readonly #state: Uint32Array;
  readonly #link: number;
  readonly #shift: number;
  readonly #hash: (slot: number) => number;

  /**
   * @param heads memory of the buckets: as many as there can be records
   * @param state two words: number of buckets, number of records
   * @param records the records as words, `1 << shift` words each
   * @param link word of a record that holds the next one of its chain
   * @param hash the hash of a record's key, a signed 32-bit number
   */
  constructor(heads: Uint32Array, state: Uint32Array, records: Uint32Array, shift: number, link: number, hash: (slot: number) => number) {
    this.#heads = heads;
    this.#state = state;
    this.#records = records;
    this.#shift = shift;
    this.#link = link;
    this.#hash = hash;
    if (state[0] === 0) state[0] = MINIMUM;
  }

  /** Takes everything out. */
  clear(): void {
    // Beyond the buckets in use heads are zero; a process that ended within a split or a merge may have left one more.
    this.#heads.fill(0, 0, Math.min(this.buckets + 1, this.#heads.length));
    this.#state[0] = MINIMUM;
    this.#state[1] = 0;
  }

  /** Buckets in use. */
  get buckets(): number {
    return this.#state[0] as number;
  }

  /** First record of the chain that keys of this hash are in, or 0; the others follow by {@link next}. */
  first(hash: number): number {
    return this.#heads[this.#bucket(hash)] as number;
  }

  next(slot: number): number {
    return this.#records[(slot << this.#shift) + this.#link] as number;
  }

  insert(slot: number, hash: number): void {
    const bucket = this.#bucket(hash);
    this.#records[(slot << this.#shift) + this.#link] = this.#heads[bucket] as number;
    this.#heads[bucket] = slot;
    const count = (this.#state[1] as number) + 1;
    this.#state[1] = count;
    if (count > (this.#state[0] as number) && (this.#state[0] as number) < this.#heads.length) this.#split();
  }

  /** Takes a record out; returns whether it was in. */
  remove(slot: number, hash: number): boolean {
    const records = this.#records;
    const bucket = this.#bucket(hash);
    let before = 0;
    for (let at = this.#heads[bucket] as number; at !== 0; at = records[(at << this.#shift) + this.#link] as number) {
      if (at === slot) {
        const next = records[(at << this.#shift) + this.#link] as number;
        if (before === 0) this.#heads[bucket] = next;
        else records[(before << this.#shift) + this.#link] = next;
        const count = (this.#state[1] as number) - 1;
        this.#state[1] = count;
        // Half full only: records that come and go at the border shall not split and merge all the time.
        if (count < (this.#state[0] as number) >>> 1 && (this.#state[0] as number) > MINIMUM) this.#merge();
        return true;
      }
      before = at;
    }
    return false;
  }

  /** With 2^k ≤ buckets < 2^(k+1), k + 1 bits of the hash choose, and k bits where that bucket does not exist yet. */
  #bucket(hash: number): number {
    const buckets = this.#state[0] as number;
    const high = 0x80000000 >>> Math.clz32(buckets);
    const bucket = hash & ((high << 1) - 1);
    return bucket < buckets ? bucket : bucket & (high - 1);
  }

  /** Adds a bucket: what its hash bit selects moves there from its partner. */
  #split(): void {
    const records = this.#records;
    const added = this.#state[0] as number;
    const high = 0x80000000 >>> Math.clz32(added);
    const partner = added - high;
    this.#state[0] = added + 1;
    let stay = 0;
    let move = 0;
    for (let at = this.#heads[partner] as number; at !== 0; ) {
      const link = (at << this.#shift) + this.#link;
      const next = records[link] as number;
      if ((this.#hash(at) & high) !== 0) {
        records[link] = move;
        move = at;
      } else {
        records[link] = stay;
        stay = at;
      }
      at = next;
    }
    this.#heads[partner] = stay;
    this.#heads[added] = move;
  }

  /** Removes the last bucket: its chain goes in front of its partner's. */
  #merge(): void {
    const records = this.#records;
    const last = (this.#state[0] as number) - 1;
    const high = 0x80000000 >>> Math.clz32(last);
    const partner = last - high;
    this.#state[0] = last;
    const chain = this.#heads[last] as number;
    this.#heads[last] = 0;
    if (chain === 0) return;
    let tail = (chain << this.#shift) + this.#link;
    while (records[tail] !== 0) tail = ((records[tail] as number) << this.#shift) + this.#link;
    records[tail] = this.#heads[partner] as number;
    this.#heads[partner] = chain;
  }
}
