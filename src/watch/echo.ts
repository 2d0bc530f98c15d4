/**
 * What the daemon itself just did, for a watcher that is not told who did it (inotify).
 *
 * The kernel queues a change's events before the system call returns, and changes and drains happen on one thread. So after a
 * change that has ended, the next drain that empties the queue reads every event of it: an expectation lives from the change
 * to the end of that drain, and no clock is asked. What runs on another thread (offloaded writes) is expected from its start until
 * the drain after its end. An event of another process that is equal to an expected one in that time is dropped, too: the
 * guest hears of an equal one, its own, at that very moment.
 */
import { arena } from 'vhost-user-ts/native';
import { hashNodeid, mix } from './table.js';

const u8 = arena.u8;

/** The expectations: keys of 64 bits in open addressing, forgotten all at once. */
export class Echoes {
  #low = new Uint32Array(256);
  #high = new Uint32Array(256);
  #mask = new Uint32Array(256);
  #count = 0;
  /** Changes under way on other threads: key to mask and how many. */
  readonly #open = new Map<number, { mask: number; count: number }>();

  #keyLow = 0;
  #keyHigh = 0;

  /** The daemon changed an object: events with these bits, on it or with its name, are echoes. */
  object(nodeid: number, mask: number): void {
    this.#key(nodeid, 0, 0);
    this.#add(mask);
  }

  /** The daemon changed a name in a directory. `name`: arena offset. */
  entry(directory: number, mask: number, name: number, nameLength: number): void {
    this.#key(directory, name, nameLength);
    this.#add(mask);
  }

  /** A change to an object goes to another thread. */
  begin(nodeid: number, mask: number): void {
    const open = this.#open.get(nodeid);
    if (open === undefined) this.#open.set(nodeid, { mask, count: 1 });
    else {
      open.mask |= mask;
      open.count++;
    }
  }

  /** It has ended. */
  end(nodeid: number): void {
    const open = this.#open.get(nodeid);
    if (open === undefined) return;
    this.object(nodeid, open.mask);
    if (--open.count === 0) this.#open.delete(nodeid);
  }

  /** Whether an event (one bit) on an object is an echo. */
  isObject(nodeid: number, bit: number): boolean {
    if (this.#open.size > 0) {
      const open = this.#open.get(nodeid);
      if (open !== undefined && (open.mask & bit) !== 0) return true;
    }
    if (this.#count === 0) return false;
    this.#key(nodeid, 0, 0);
    return (this.#find() & bit) !== 0;
  }

  isEntry(directory: number, bit: number, name: number, nameLength: number): boolean {
    if (this.#count === 0) return false;
    this.#key(directory, name, nameLength);
    return (this.#find() & bit) !== 0;
  }

  /** The queue was read empty. */
  drained(): void {
    if (this.#count === 0) return;
    this.#mask.fill(0);
    this.#count = 0;
  }

  clear(): void {
    this.drained();
    this.#open.clear();
  }

  /** Two hashes of 32 bits: that another key has both equal is not to be expected in the few that live at a time. */
  #key(nodeid: number, name: number, nameLength: number): void {
    let low = hashNodeid(nodeid);
    let high = mix(low ^ 0x5bd1e995);
    for (let i = 0; i < nameLength; i++) {
      const c = u8[name + i] as number;
      low = Math.imul(low ^ c, 0x01000193);
      high = Math.imul(high + c, 0x85ebca6b) ^ (high >>> 15);
    }
    this.#keyLow = mix(low + nameLength);
    this.#keyHigh = high >>> 0;
  }

  #place(): number {
    const n = this.#mask.length - 1;
    let i = this.#keyLow & n;
    while (this.#mask[i] !== 0 && (this.#low[i] !== this.#keyLow || this.#high[i] !== this.#keyHigh)) i = (i + 1) & n;
    return i;
  }

  #find(): number {
    return this.#mask[this.#place()] as number;
  }

  #add(mask: number): void {
    if (mask === 0) return;
    const i = this.#place();
    if (this.#mask[i] === 0 && ++this.#count * 2 > this.#mask.length) {
      this.#grow();
      this.#add(mask);
      return;
    }
    this.#low[i] = this.#keyLow;
    this.#high[i] = this.#keyHigh;
    this.#mask[i] = (this.#mask[i] as number) | mask;
  }

  #grow(): void {
    const low = this.#low;
    const high = this.#high;
    const mask = this.#mask;
    const [keyLow, keyHigh] = [this.#keyLow, this.#keyHigh];
    this.#low = new Uint32Array(low.length * 2);
    this.#high = new Uint32Array(low.length * 2);
    this.#mask = new Uint32Array(low.length * 2);
    this.#count = 0;
    for (let i = 0; i < mask.length; i++) {
      if (mask[i] === 0) continue;
      this.#keyLow = low[i] as number;
      this.#keyHigh = high[i] as number;
      this.#add(mask[i] as number);
    }
    this.#keyLow = keyLow;
    this.#keyHigh = keyHigh;
  }
}
