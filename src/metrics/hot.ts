/**
 * Counters on the data path: plain additions in one shared block of memory, so that counting costs a few nanoseconds and another
 * thread can serve the numbers while the device thread sleeps in a native call.
 *
 * One thread writes a block and any thread reads it; device threads that run side by side get a block each, and the reader adds
 * them up. Numbers are doubles: exact up to 2^53, and an aligned 8-byte store is never seen by halves. Plain stores, not Atomics:
 * a reader may see a number a moment late, which a scrape every few seconds does not notice.
 *
 * Layout in 8-byte words: SCALARS.length scalars; per opcode one sum of nanoseconds and BUCKETS counts; per opcode ERRNOS counts.
 */

/** A single number: `counter` only grows, `gauge` is set. The key is its field in {@link Slot}. */
interface Scalar {
  readonly key: string;
  readonly type: 'counter' | 'gauge';
  /** Name in Prometheus, without the prefix. */
  readonly name: string;
  readonly help: string;
}

export const SCALARS = [
  { key: 'readBytes', type: 'counter', name: 'read_bytes_total', help: 'Bytes of file data given to the guest (READ)' },
  { key: 'writtenBytes', type: 'counter', name: 'written_bytes_total', help: 'Bytes of file data taken from the guest (WRITE)' },
  { key: 'kicks', type: 'counter', name: 'kicks_total', help: 'Notifications from the guest that a queue has requests' },
  { key: 'interruptsSent', type: 'counter', name: 'interrupts_sent_total', help: 'Interrupts sent to the guest' },
  {
    key: 'interruptsSaved',
    type: 'counter',
    name: 'interrupts_saved_total',
    help: 'Answered batches that needed no interrupt because the guest had not asked for one',
  },
  {
    key: 'batches',
    type: 'counter',
    name: 'batches_total',
    help: 'Times that a queue was emptied; requests divided by batches is the mean batch',
  },
  { key: 'malformed', type: 'counter', name: 'malformed_requests_total', help: 'Requests that were refused because they were malformed' },
  { key: 'queueFailures', type: 'counter', name: 'queue_failures_total', help: 'Queues that were stopped because their ring was corrupt' },
  {
    key: 'offloadJobs',
    type: 'counter',
    name: 'offload_jobs_total',
    help: 'Requests that went to a thread because they would have blocked the others',
  },
  { key: 'offloadPending', type: 'gauge', name: 'offload_jobs_pending', help: 'Requests that are with a thread now' },
  { key: 'queueDepth', type: 'gauge', name: 'queue_depth', help: 'Requests taken from the queues and not yet answered' },
  { key: 'inodes', type: 'gauge', name: 'inodes', help: 'Inodes that the guest knows' },
  { key: 'openFiles', type: 'gauge', name: 'open_files', help: 'Files and directories that the guest has open' },
  { key: 'fds', type: 'gauge', name: 'file_descriptors', help: 'Descriptors held for the guest (inodes, open files)' },
  { key: 'sessions', type: 'counter', name: 'sessions_total', help: 'File system sessions started (FUSE_INIT)' },
  { key: 'restarts', type: 'counter', name: 'worker_restarts_total', help: 'Times that a worker was followed by another one' },
  { key: 'connections', type: 'counter', name: 'connections_total', help: 'Front ends that connected' },
  { key: 'connected', type: 'gauge', name: 'connected', help: '1 while a front end is connected' },
] as const satisfies readonly Scalar[];

type ScalarKey = (typeof SCALARS)[number]['key'];

/** Index of each scalar in {@link HotMetrics.values}: `hot.values[Slot.kicks] += 1`. */
export const Slot = Object.freeze(Object.fromEntries(SCALARS.map((scalar, index) => [scalar.key, index]))) as Readonly<
  Record<ScalarKey, number>
>;

/** Errno values counted one by one (Linux ends at 133); index 0 takes all others. */
const ERRNOS = 134;

/** Bucket b counts times below 256 ns · 2^b, up to 4.3 s; the last one all longer ones. */
const FIRST_BUCKET_SHIFT = 8;
const BOUNDS = 25;
const BUCKETS = BOUNDS + 1;
const TOO_LONG = 2 ** 32;

/** Upper bounds of the buckets but the last, in seconds. */
export const BUCKET_BOUNDS: readonly number[] = Array.from({ length: BOUNDS }, (_, b) => 2 ** (FIRST_BUCKET_SHIFT + b) / 1e9);

/** The counters of one device thread. */
export class HotMetrics {
  readonly opcodes: number;
  /** What a reader in another thread needs, with the number of opcodes. */
  readonly buffer: SharedArrayBuffer;
  /** The scalars, by {@link Slot}. */
  readonly values: Float64Array;
  /** Per opcode: the sum of nanoseconds, then the buckets. */
  readonly #times: Float64Array;
  /** Per opcode: how often each errno was the answer. */
  readonly #errors: Float64Array;

  /**
   * @param opcodes how many opcode indexes there are
   * @param buffer a block made before for as many opcodes, to read it; else a new one is made
   */
  constructor(opcodes: number, buffer?: SharedArrayBuffer) {
    this.opcodes = opcodes;
    const timeWords = opcodes * (1 + BUCKETS);
    this.buffer = buffer ?? new SharedArrayBuffer(8 * (SCALARS.length + timeWords + opcodes * ERRNOS));
    this.values = new Float64Array(this.buffer, 0, SCALARS.length);
    this.#times = new Float64Array(this.buffer, 8 * SCALARS.length, timeWords);
    this.#errors = new Float64Array(this.buffer, 8 * (SCALARS.length + timeWords), opcodes * ERRNOS);
  }

  /**
   * Counts one answered request.
   * @param errno 0, or the errno of the answer (positive)
   * @param ns nanoseconds from taking the request off its queue to answering it
   */
  record(opcodeIndex: number, errno: number, ns: number): void {
    const bucket = ns < TOO_LONG ? 32 - Math.clz32(ns >>> FIRST_BUCKET_SHIFT) : BUCKETS - 1;
    const at = opcodeIndex * (1 + BUCKETS);
    const times = this.#times;
    times[at] = (times[at] as number) + ns;
    times[at + 1 + bucket] = (times[at + 1 + bucket] as number) + 1;
    if (errno !== 0) this.#countError(opcodeIndex, errno);
  }

  #countError(opcodeIndex: number, errno: number): void {
    const at = opcodeIndex * ERRNOS + (errno > 0 && errno < ERRNOS ? errno : 0);
    this.#errors[at] = (this.#errors[at] as number) + 1;
  }

  /** Adds to a counter or gauge. */
  add(slot: number, amount: number): void {
    this.values[slot] = (this.values[slot] as number) + amount;
  }

  // --- the reader's side ---

  /** Requests of an opcode whose time fell into each bucket (not cumulative). */
  buckets(opcodeIndex: number): Float64Array {
    const at = opcodeIndex * (1 + BUCKETS) + 1;
    return this.#times.subarray(at, at + BUCKETS);
  }

  /** Sum of the times of an opcode, in seconds. */
  seconds(opcodeIndex: number): number {
    return (this.#times[opcodeIndex * (1 + BUCKETS)] as number) / 1e9;
  }

  /** The errors of an opcode: calls `visit` for each errno that occurred (0: one out of range). */
  errors(opcodeIndex: number, visit: (errno: number, count: number) => void): void {
    const row = this.#errors.subarray(opcodeIndex * ERRNOS, (opcodeIndex + 1) * ERRNOS);
    for (let errno = 0; errno < ERRNOS; errno++) {
      const count = row[errno] as number;
      if (count > 0) visit(errno, count);
    }
  }
}
