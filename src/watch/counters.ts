/** What the watcher and the notifier count: plain numbers in one typed array, turned into metrics when somebody asks. */

/** Indexes of {@link Counters.values}. */
export const Counter = {
  /** Events read from the host. */
  events: 0,
  /** Of these, our own process's. */
  echoes: 1,
  /** Event records queued for the guest. */
  records: 2,
  /** Records left out because the one before them was the same. */
  coalesced: 3,
  /** Invalidations queued for the guest. */
  invalidations: 4,
  /** Invalidations left out because the same one was under way. */
  invalidationsSaved: 5,
  /** Times that the host's queue overflowed. */
  hostOverflows: 6,
  /** Times that our queue overflowed, or the guest gave no buffers for too long. */
  queueOverflows: 7,
  /** OVERFLOW records handed to the guest. */
  overflowsSent: 8,
  /** Records and invalidations lost in our queue's overflows. */
  lost: 9,
  /** Messages handed to the guest. */
  messages: 10,
  /** Bytes of these. */
  bytes: 11,
  /** Now watched objects of the guest (a gauge). */
  watches: 12,
  /** Watch requests refused. */
  refused: 13,
} as const;

/** Places for the numbers above. */
const SCALARS = 16;

/** Upper bounds of the latency buckets are powers of two of microseconds: below 1, 2, 4, … and the rest. */
export const LATENCY_BUCKETS = 24;

/** One daemon's numbers. */
export class Counters {
  /** Shared, so that another thread can serve the numbers. */
  readonly buffer: SharedArrayBuffer;
  readonly values: Float64Array;
  /** Messages by their latency, from the drain that read the first event in them to the guest's buffer. */
  readonly latency: Float64Array;
  readonly #latencySum: Float64Array;

  /** @param buffer the block of a daemon's counters, to read them; else a new one is made */
  constructor(buffer = new SharedArrayBuffer(8 * (SCALARS + LATENCY_BUCKETS + 1))) {
    this.buffer = buffer;
    this.values = new Float64Array(buffer, 0, SCALARS);
    this.latency = new Float64Array(buffer, 8 * SCALARS, LATENCY_BUCKETS);
    this.#latencySum = new Float64Array(buffer, 8 * (SCALARS + LATENCY_BUCKETS), 1);
  }

  /** Sum of the latencies in nanoseconds. */
  get latencySum(): number {
    return this.#latencySum[0] as number;
  }

  add(counter: number, n = 1): void {
    this.values[counter] = (this.values[counter] as number) + n;
  }

  get(counter: number): number {
    return this.values[counter] as number;
  }

  observe(nanoseconds: number): void {
    this.#latencySum[0] = this.latencySum + nanoseconds;
    const microseconds = nanoseconds < 2 ** 40 ? (nanoseconds / 1000) | 0 : 2 ** 30;
    const bucket = Math.min(32 - Math.clz32(microseconds), LATENCY_BUCKETS - 1);
    this.latency[bucket] = (this.latency[bucket] as number) + 1;
  }
}
