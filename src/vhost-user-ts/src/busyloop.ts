/**
 * Looks at the avail rings of some queues for a moment before their thread sleeps (what vhost calls busyloop). Kicks stay off meanwhile.
 *
 * To sleep and to be woken costs both sides 5 to 30 µs, most where an idle processor is left to a hypervisor; a driver that waits for each
 * reply pays it for each request. So a thread that has served something looks on for as long as its wake-up would take, and goes on
 * without one when the next request comes in that time: twice the GETATTRs at depth 1, with a third of the 99th percentile, for no more
 * processor time; twice the LOOKUPs with a FORGET, which come by another queue. Where requests do not come so soon it hardly ever
 * looks. It looks on also while threads do what takes longer: 2.5 times the GETATTRs beside cold READs.
 */
import { arena, arenaAlloc, native } from './native.js';
import type { Virtqueue } from './virtqueue.js';

/** One look in vain counts as much as so many that found something; where they outweigh these there is only one look in so many. */
const VAIN = 4;
const MOST_TRUST = 8;
const TRY_EACH = 64;
/** Of native.busyLoop. */
const ENTRY_BYTES = 16;

/** The queues that one thread serves. */
export class BusyLoop {
  /** Nanoseconds looked since the owner set it to 0. */
  looked = 0;

  /** How long one look takes at most, in ns; 0: there are none. */
  readonly #nanoseconds: number;
  readonly #queues: Virtqueue[] = [];
  readonly #table: number;
  /** Where to begin, so that no queue that is always busy keeps the others waiting. */
  #first = 0;
  #trust = MOST_TRUST;
  #untried = 0;

  /**
   * @param capacity most queues at a time
   * @param nanoseconds how long one look takes at most, 0 to 1e9; 0: nothing is waited for
   */
  constructor(capacity: number, nanoseconds: number) {
    this.#nanoseconds = nanoseconds;
    this.#table = arenaAlloc(8 + capacity * ENTRY_BYTES);
  }

  /** A queue was served: from now on it is looked at. */
  add(queue: Virtqueue): void {
    if (!this.#queues.includes(queue)) this.#queues.push(queue);
  }

  /** A queue is served no more. */
  remove(queue: Virtqueue): void {
    const at = this.#queues.indexOf(queue);
    if (at >= 0) this.#queues.splice(at, 1);
  }

  /**
   * A queue with a chain waiting; undefined: there is none.
   * @param look whether one may take a moment to come
   */
  next(look: boolean): Virtqueue | undefined {
    const queues = this.#queues;
    const count = queues.length;
    for (let i = 0; i < count; i++) {
      const queue = queues[(this.#first + i) % count] as Virtqueue;
      if (!queue.pending) continue;
      this.#first = (this.#first + i + 1) % count;
      return queue;
    }
    if (!look || this.#nanoseconds === 0) return undefined;
    if (this.#trust === 0) {
      if (++this.#untried < TRY_EACH) return undefined;
      this.#untried = 0;
    }
    for (let i = 0; i < count; i++) (queues[i] as Virtqueue).describeAvail(this.#table + 8 + i * ENTRY_BYTES);
    const found = native.busyLoop(this.#table, count, this.#nanoseconds);
    this.looked += arena.u32[this.#table >> 2] as number;
    if (found < 0) {
      this.#trust = Math.max(0, this.#trust - VAIN);
      return undefined;
    }
    this.#trust = Math.min(MOST_TRUST, this.#trust + 1);
    this.#first = (found + 1) % count;
    return queues[found];
  }

  /** Asks the drivers for kicks again. @returns false when a chain came in the meantime: the thread must not sleep */
  enableKicks(): boolean {
    let quiet = true;
    for (const queue of this.#queues) if (queue.kicksDisabled && queue.enableKicks()) quiet = false;
    return quiet;
  }
}
