/**
 * One descriptor chain, turned into iovecs of our own memory: first what the device may read, then what it may write
 * (virtio 1.2, 2.7.4.2: readable descriptors come first). The iovecs lie in the arena, ready for preadv2 and pwritev2.
 *
 * A chain is taken apart once, when it is popped; each word of a descriptor is read once, because the guest can change
 * its memory at any time.
 */

import type { GuestMemory } from './memory.js';
import { arena, arenaAlloc, arenaFree, native } from './native.js';

/** Longest chain taken, in descriptors: what QEMU allows (VIRTQUEUE_MAX_SIZE), and what one preadv2 takes (IOV_MAX). */
export const MAX_CHAIN = 1024;
/** Iovecs a chain may need: a buffer that crosses memory regions takes one per region. */
export const MAX_IOVECS = MAX_CHAIN;
const MAX_TABLE_BYTES = MAX_CHAIN * 16;

const F_NEXT = 1;
const F_WRITE = 2;
const F_INDIRECT = 4;

/** Why a chain was refused; the queue cannot go on after it, since the driver no longer keeps to the rules. */
export const ChainError = {
  headOutOfRange: -1,
  nextOutOfRange: -2,
  tooLong: -3,
  badAddress: -4,
  indirectInIndirect: -5,
  indirectWithNext: -6,
  indirectSize: -7,
  indirectWritable: -8,
  readableAfterWritable: -9,
  tooManyBytes: -10,
  tooManySegments: -11,
  indirectNotNegotiated: -12,
  availJump: -13,
} as const;

const MESSAGES: Record<number, string> = {
  [ChainError.headOutOfRange]: 'avail ring names a descriptor beyond the queue size',
  [ChainError.nextOutOfRange]: 'descriptor "next" beyond the table',
  [ChainError.tooLong]: `descriptor chain loops or is longer than ${MAX_CHAIN}`,
  [ChainError.badAddress]: 'descriptor address outside guest memory',
  [ChainError.indirectInIndirect]: 'indirect descriptor inside an indirect table',
  [ChainError.indirectWithNext]: 'indirect descriptor with "next"',
  [ChainError.indirectSize]: 'indirect table size not a multiple of 16, empty or too large',
  [ChainError.indirectWritable]: 'indirect descriptor marked writable',
  [ChainError.readableAfterWritable]: 'readable descriptor after a writable one',
  [ChainError.tooManyBytes]: 'descriptor chain of more than 4 GiB',
  [ChainError.tooManySegments]: 'descriptor chain in too many pieces',
  [ChainError.indirectNotNegotiated]: 'indirect descriptor without VIRTIO_F_INDIRECT_DESC',
  [ChainError.availJump]: 'avail index jumps by more than the queue size',
};

/** A {@link ChainError} in words. */
export function chainErrorText(error: number): string {
  return MESSAGES[error] ?? `chain error ${error}`;
}

/** A popped chain. One object is reused for every pop of every queue of a session. */
export class DescriptorChain {
  /** Index of the head descriptor: what the used ring gets back. */
  head = 0;
  /** Arena offset of the iovecs: readable ones, then writable ones. */
  readonly iov = arenaAlloc(MAX_IOVECS * 16);
  readableCount = 0;
  readableBytes = 0;
  /** Arena offset of the first writable iovec. */
  writableIov = 0;
  writableCount = 0;
  writableBytes = 0;

  /** Guest-physical addresses of the writable iovecs, kept only while dirty logging is on. */
  readonly writableGuest = new Float64Array(MAX_IOVECS);

  readonly #indirect = arenaAlloc(MAX_TABLE_BYTES);

  /**
   * Takes the chain at `head` apart.
   * @param table the queue's descriptor table, four words each (virtio 1.2, 2.7.5: addr u64, len u32, flags u16, next u16)
   * @param indirectAllowed VIRTIO_F_INDIRECT_DESC was negotiated
   * @returns 0 or a {@link ChainError}
   */
  load(memory: GuestMemory, table: Uint32Array, size: number, head: number, indirectAllowed: boolean): number {
    this.head = head;
    this.readableCount = 0;
    this.readableBytes = 0;
    this.writableCount = 0;
    this.writableBytes = 0;
    this.writableIov = this.iov;
    if (head >= size) return ChainError.headOutOfRange;
    let words = table;
    let base = 0; // word index of the table's first descriptor
    let entries = size;
    let index = head;
    let indirect = false;
    for (let hops = 0; hops < MAX_CHAIN; hops++) {
      const at = base + index * 4;
      const low = words[at] as number;
      const high = words[at + 1] as number;
      const length = words[at + 2] as number;
      const flagsAndNext = words[at + 3] as number;
      const flags = flagsAndNext & 0xffff;
      const next = flagsAndNext >>> 16;
      if ((flags & F_INDIRECT) !== 0) {
        if (!indirectAllowed) return ChainError.indirectNotNegotiated;
        if (indirect) return ChainError.indirectInIndirect;
        if ((flags & F_NEXT) !== 0) return ChainError.indirectWithNext;
        if ((flags & F_WRITE) !== 0) return ChainError.indirectWritable;
        if (length === 0 || length % 16 !== 0 || length > MAX_TABLE_BYTES) return ChainError.indirectSize;
        // Read where it lies, if it can be: a copy took 90 of 1050 ns of a GETATTR.
        base = memory.window(high * 2 ** 32 + low, length);
        if (base >= 0) words = memory.words;
        else {
          if (!this.#copyTable(memory, high * 2 ** 32 + low, length)) return ChainError.badAddress;
          words = arena.u32;
          base = this.#indirect >> 2;
        }
        entries = length / 16;
        index = 0;
        indirect = true;
        hops = -1; // the descriptor that names the table is not one of the chain
        continue;
      }
      const error = this.#append(memory, high * 2 ** 32 + low, length, (flags & F_WRITE) !== 0);
      if (error !== 0) return error;
      if ((flags & F_NEXT) === 0) return 0;
      if (next >= entries) return ChainError.nextOutOfRange;
      index = next;
    }
    return ChainError.tooLong;
  }

  /** Copies an indirect table that cannot be read in place to the arena. */
  #copyTable(memory: GuestMemory, guestAddress: number, length: number): boolean {
    let done = 0;
    while (done < length) {
      const address = memory.translate(guestAddress + done);
      if (address < 0) return false;
      const n = Math.min(length - done, memory.room);
      native.copy(ARENA_ADDRESS + this.#indirect + done, address, n);
      done += n;
    }
    return true;
  }

  #append(memory: GuestMemory, guestAddress: number, length: number, writable: boolean): number {
    if (!writable && this.writableCount > 0) return ChainError.readableAfterWritable;
    let left = length; // an empty descriptor adds nothing, wherever it points
    let from = guestAddress;
    while (left > 0) {
      const address = memory.translate(from);
      if (address < 0) return ChainError.badAddress;
      const n = left < memory.room ? left : memory.room;
      const slot = this.readableCount + this.writableCount;
      if (slot >= MAX_IOVECS) return ChainError.tooManySegments;
      const at = (this.iov >> 2) + slot * 4;
      arena.u32[at] = address >>> 0;
      arena.u32[at + 1] = (address / 2 ** 32) >>> 0;
      arena.u32[at + 2] = n >>> 0;
      arena.u32[at + 3] = 0; // descriptor lengths are 32 bits
      if (writable) {
        if (this.writableCount === 0) this.writableIov = this.iov + slot * 16;
        if (memory.logging) this.writableGuest[this.writableCount] = from;
        this.writableCount++;
        this.writableBytes += n;
      } else {
        this.readableCount++;
        this.readableBytes += n;
      }
      from += n;
      left -= n;
    }
    return this.readableBytes + this.writableBytes > 0xffff_ffff ? ChainError.tooManyBytes : 0;
  }

  /** Gives the chain's memory back. */
  free(): void {
    arenaFree(this.iov, MAX_IOVECS * 16);
    arenaFree(this.#indirect, MAX_TABLE_BYTES);
  }

  /** Reports the first `length` bytes of the writable part as dirty. */
  markDirty(memory: GuestMemory, length: number): void {
    let left = length;
    for (let i = 0; i < this.writableCount && left > 0; i++) {
      const n = Math.min(left, arena.u32[(this.writableIov >> 2) + i * 4 + 2] as number);
      memory.markDirty(this.writableGuest[i] as number, n);
      left -= n;
    }
  }
}

const ARENA_ADDRESS = native.arenaAddress();
