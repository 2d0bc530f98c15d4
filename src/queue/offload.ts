/**
 * Blocking work off the device thread: one native job per request that would sleep (cold reads, fsync, large copies).
 * The thread pool is in `native/offload.cc`; here are the job numbers and what each job holds.
 */
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import { PENDING } from '../fs/filesystem.js';

const EAGAIN = 11;
const REAP_MAX = 64;

/** A pool of native threads and the numbers of the jobs that are out. */
export class Offload {
  /** Eventfd that becomes readable when jobs end; -1 until the first job was submitted. */
  readonly eventfd: number;
  /** Number of the job that the last successful {@link submit} started. */
  lastJob = -1;
  /** How many requests may wait at a time for something that no thread does ({@link reserve}). */
  mostWaits = 1024;
  /** How many do. */
  waits = 0;
  /** Jobs that were submitted and not yet reaped. */
  pending = 0;
  /** All jobs so far. */
  submitted = 0;

  /** How many jobs can be out at once. */
  readonly capacity: number;
  readonly #free: Uint16Array;
  #freeTop: number;
  /** Jobs that were reserved and have ended, each with its result. */
  readonly #finished: number[] = [];
  readonly #reap = arenaAlloc(REAP_MAX * 16);

  /**
   * @param threads how many native threads at most (they start when the first job needs them); 0: none, every job is refused
   * @param capacity how many jobs can be out at once (1..65535); one more is answered with -EAGAIN
   */
  constructor(threads: number, capacity = 4096) {
    this.capacity = capacity;
    this.eventfd = native.offloadStart(threads);
    this.#free = new Uint16Array(capacity);
    for (let i = 0; i < capacity; i++) this.#free[i] = capacity - 1 - i;
    this.#freeTop = capacity;
  }

  /**
   * Starts a job; arguments as in `Native.offloadSubmit`.
   * @returns PENDING (the number is in {@link lastJob}), or -EAGAIN when too many are out, or there is no thread: the caller does the work itself.
   */
  submit(
    op: number,
    fd: number,
    iov: number,
    count: number,
    skip: number,
    length: number,
    offset: number,
    fd2: number,
    offset2: number,
    flags: number,
  ): number {
    if (this.#freeTop === 0) return -EAGAIN;
    const job = this.#free[this.#freeTop - 1] as number;
    const result = native.offloadSubmit(job, op, fd, iov, count, skip, length, offset, fd2, offset2, flags);
    if (result < 0) return result;
    this.#freeTop--;
    this.pending++;
    this.submitted++;
    this.lastJob = job;
    return PENDING;
  }

  /**
   * Takes the number of a job that no thread does.
   * @returns PENDING (the number is in {@link lastJob}), or -EAGAIN when too many requests wait
   */
  reserve(): number {
    if (this.#freeTop === 0 || this.waits >= this.mostWaits) return -EAGAIN;
    this.lastJob = this.#free[--this.#freeTop] as number;
    this.waits++;
    return PENDING;
  }

  /** Ends a job that was reserved: {@link reap} hands it out, and the eventfd becomes readable. */
  finish(job: number, result: number): void {
    this.#finished.push(job, result);
    native.eventfdWrite(this.eventfd);
  }

  /** Ends a job that a thread does or would do, as far as its system call can be interrupted: {@link reap} then hands it out. */
  cancel(job: number): void {
    native.offloadCancel(job);
  }

  /** Hands every job that has ended to `done(job, result)`; returns how many. The number is free again afterwards. */
  reap(done: (job: number, result: number) => void): number {
    let total = 0;
    while (this.#finished.length > 0) {
      const [job, result] = this.#finished.splice(0, 2) as [number, number];
      this.waits--;
      done(job, result);
      this.#free[this.#freeTop++] = job;
      total++;
    }
    for (;;) {
      const n = native.offloadReap(this.#reap, REAP_MAX);
      for (let i = 0; i < n; i++) {
        const at = this.#reap + 16 * i;
        const job = arena.i32[at >> 2] as number;
        done(job, arena.f64[(at + 8) >> 3] as number);
        this.#free[this.#freeTop++] = job;
        this.pending--;
      }
      total += n;
      if (n < REAP_MAX) return total;
    }
  }

  /** Waits for the jobs under way and ends the threads. */
  stop(): void {
    native.offloadStop();
  }
}
