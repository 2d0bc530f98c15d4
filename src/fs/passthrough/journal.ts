/**
 * What must be known of the request being served, should the process end within it: operations whose second time is not as the first.
 *
 * Before its system call such an operation says {@link Journal.begin}. The next process serves the request again, under the same number
 * (vhost-user-ts, ledger.ts), and `begin` then answers true: it may have happened already. What follows from that:
 *
 *  1. A name that is to be made and is there (EEXIST): ours, if it is what we would have made, of the same owner, and not much
 *     older than the end of the process. The guest's kernel holds the directory's lock meanwhile, and has found no such name.
 *  2. A name that is to go and is not there (ENOENT): gone by us.
 *  3. A rename whose source is gone and whose target is there: done. An exchange is told by the inode that was to be moved.
 *  4. FORGET counts down: the count that is left is written down first, and set the second time.
 *  5. What goes to the end of a file: the guest's offset says where that was; what stands there is compared (io.ts).
 *  6. OPEN and CREATE leave a handle that nobody was told of: it says who opened it, and is closed (share.ts).
 *  7. RELEASE of a handle that is not there: released.
 *  8. FALLOCATE that inserts or collapses: nobody can tell, and the guest gets EIO. Linux sends none.
 *
 * Everything else can be done twice. A LOOKUP counted twice keeps its inode until the session ends.
 */
import { arena } from 'vhost-user-ts/native';
import { Statx } from '../linux.js';

/** Words: number of the request being served, the highest number so far (both of the ledger), and ours. */
const Word = { request: 0, highest: 1, begun: 2, inoLow: 3, inoHigh: 4, step: 5, left: 6 } as const;
export const JOURNAL_WORDS = 8;

/** How long before the end of its process a request can have made something: longer than any file system takes to say so. */
const REQUEST_MS = 10_000;

/** The journal of one share. */
export class Journal {
  readonly #words: Float64Array;
  /** When the process before this one ended, in milliseconds since the epoch. */
  interrupted = 0;
  /** The request whose counts are under way, and how many there were. */
  #counting = 0;
  #step = 0;

  /** @param words at least {@link JOURNAL_WORDS}, kept from process to process; who serves requests puts their number in the first */
  constructor(words: Float64Array = new Float64Array(JOURNAL_WORDS)) {
    this.#words = words;
  }

  /** Numbers of the requests: the first is that of the one being served. */
  get request(): Float64Array {
    return this.#words;
  }

  /** Before what cannot be done twice. @returns true when it may have been done, by a process that ended within this request */
  begin(): boolean {
    const words = this.#words;
    const number = words[Word.request] as number;
    if (words[Word.begun] === number && number !== 0) return true;
    words[Word.begun] = number;
    return false;
  }

  /** What {@link begin} would answer. */
  get hasBegun(): boolean {
    return this.#words[Word.begun] === this.#words[Word.request] && this.#words[Word.request] !== 0;
  }

  /** Whether what `attr` (arena offset of a struct statx) describes can have been made by a request that the end of its process interrupted. */
  isYoung(attr: number, hasBirthTime: boolean): boolean {
    if (!hasBirthTime) return true;
    const word = (attr + Statx.btime) >> 2;
    const born = (arena.u32[word] as number) * 1000 + (arena.u32[word + 2] as number) / 1e6;
    return born >= this.interrupted - REQUEST_MS;
  }

  /** Whether the request was taken by an earlier process, in whatever state it left it. */
  get isOld(): boolean {
    return (this.#words[Word.request] as number) < (this.#words[Word.highest] as number);
  }

  /**
   * A count is about to become `left`, once per node of a request.
   * @returns what it is to become; NaN when that was done already
   */
  counted(left: number): number {
    const words = this.#words;
    const number = words[Word.request] as number;
    if (number === 0) return left;
    if (this.#counting !== number) {
      this.#counting = number;
      this.#step = 0;
      if (words[Word.begun] !== number) {
        words[Word.step] = 0;
        words[Word.begun] = number;
      }
    }
    const step = ++this.#step;
    const done = words[Word.step] as number;
    if (step < done) return Number.NaN;
    // Two places in turn: one is whole, whenever the process ends.
    const place = Word.left + (step & 1);
    if (step === done) return words[place] as number;
    words[place] = left;
    words[Word.step] = step;
    return left;
  }

  /** The inode that is to be moved; before {@link begin}. */
  set moved(attr: number) {
    const word = (attr + Statx.ino) >> 2;
    this.#words[Word.begun] = 0;
    this.#words[Word.inoLow] = arena.u32[word] as number;
    this.#words[Word.inoHigh] = arena.u32[word + 1] as number;
  }

  /** Whether `attr` is the inode that was to be moved. */
  isMoved(attr: number): boolean {
    const word = (attr + Statx.ino) >> 2;
    return this.#words[Word.inoLow] === arena.u32[word] && this.#words[Word.inoHigh] === arena.u32[word + 1];
  }
}
