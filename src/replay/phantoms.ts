/**
 * Objects that only exist for the replay: what the host has already removed or moved on when its creation is replayed, and names
 * that the guest is to see go though it never looked them up. They have no content, and the guest is to keep nothing of them.
 *
 * Their nodeids are multiples of 2^24, which the inode store never gives out (slot 0).
 */

import { randomInt } from 'node:crypto';

const STEP = 2 ** 24;
/** Those that are always there. */
export const CONTROL_NODE = STEP;
export const STAGING_NODE = 2 * STEP;
/** The directory of the control file. */
export const CONTROL_DIRECTORY_NODE = 3 * STEP;
const FIRST = 16;
const LAST = 2 ** 29;
/** What an agent that forgets nothing may cost. */
const LIMIT = 65_536;

interface Phantom {
  readonly mode: number;
  nlookup: number;
}

export class Phantoms {
  readonly #known = new Map<number, Phantom>();
  /** Anywhere: the guest may have some of a daemon that was here before. */
  #next = randomInt(FIRST, LAST);

  /** Whether a nodeid is none of the inode store's. */
  static is(nodeid: number): boolean {
    return nodeid % STEP === 0;
  }

  /** A new one, not referenced yet; 0 when there are too many. */
  add(mode: number): number {
    if (this.#known.size >= LIMIT) return 0;
    const nodeid = this.#next * STEP;
    this.#next = this.#next === LAST - 1 ? FIRST : this.#next + 1;
    this.#known.set(nodeid, { mode, nlookup: 0 });
    return nodeid;
  }

  /** Its mode, or 0 for an unknown one. */
  mode(nodeid: number): number {
    return this.#known.get(nodeid)?.mode ?? 0;
  }

  /** The guest is told of it once more. */
  reference(nodeid: number): void {
    const phantom = this.#known.get(nodeid);
    if (phantom !== undefined) phantom.nlookup++;
  }

  forget(nodeid: number, nlookup: number): void {
    const phantom = this.#known.get(nodeid);
    if (phantom === undefined) return;
    phantom.nlookup -= nlookup;
    if (phantom.nlookup <= 0) this.#known.delete(nodeid);
  }

  clear(): void {
    this.#known.clear();
  }
}
