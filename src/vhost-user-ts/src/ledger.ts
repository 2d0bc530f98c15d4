/**
 * What is in flight, written down where it can outlive the process: a few plain stores for each request, no system call.
 *
 * Requests are numbered in the order in which they are taken, over all queues. A queue's book has one entry for each head (index of a
 * chain's first descriptor): the number while the chain is taken and not given back, else 0; a negative number once the device goes on
 * with it elsewhere ({@link Virtqueue.postpone}). So of all entries at most one is positive: the request that was being served.
 * Beside it stands in one word how far the used ring is written, and the head put there last:
 *
 *  - pop   stores (used index, no head), then the entry
 *  - push  writes the used ring's element, stores (used index + 1, head), then clears the entry
 *
 * Whatever instruction is the last one, the next process can tell: an entry whose head was put there last is done; taken is what is in
 * entries, and the avail ring goes on after as many as were used and are taken (as in vhost-user, "Inflight I/O tracking").
 */

/** Words of {@link Ledger.notes}. The others are the device's own. */
export const Note = {
  /** Number of the request that is being served, or was last. */
  request: 0,
  /** Highest number so far. */
  highest: 1,
  /** First word for the device. */
  device: 2,
} as const;
const NOTES = 64;

/** In place of a head: nothing was pushed since the last pop. */
export const NO_HEAD = 0xffff;

/** Bytes of one queue's book: head words, then an entry for each of the 2^15 heads that a queue can have. */
const BOOK_HEAD = 64;
const BOOK_BYTES = BOOK_HEAD + 8 * 32768;

/** One queue's book. */
export interface QueueBook {
  /** Used index in the low half, the head put there last (or {@link NO_HEAD}) in the high half. */
  readonly used: Uint32Array;
  readonly taken: Float64Array;
}

/** The books of all queues of one device. */
export class Ledger {
  /** Numbers that belong to the request being served; kept with the rest. */
  readonly notes: Float64Array;
  readonly #memory: ArrayBuffer | undefined;

  /** @param memory of {@link Ledger.bytes} bytes, zeroed or from an earlier process; without it nothing outlives this one */
  constructor(memory?: ArrayBuffer) {
    this.#memory = memory;
    this.notes = memory === undefined ? new Float64Array(NOTES) : new Float64Array(memory, 0, NOTES);
  }

  /** Memory for so many queues; pages that no queue uses are never touched. */
  static bytes(queues: number): number {
    return NOTES * 8 + queues * BOOK_BYTES;
  }

  /** The book of a queue with `size` descriptors. */
  book(index: number, size: number): QueueBook {
    if (this.#memory === undefined) return { used: new Uint32Array(1), taken: new Float64Array(size) };
    const at = NOTES * 8 + index * BOOK_BYTES;
    return { used: new Uint32Array(this.#memory, at, 1), taken: new Float64Array(this.#memory, at + BOOK_HEAD, size) };
  }
}
