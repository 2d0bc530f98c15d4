/**
 * The state of a session as a stream, from one daemon to another (VHOST_USER_SET_DEVICE_STATE_FD): records, each with a type and a
 * length, in little-endian words. Every record begins at a multiple of 8 bytes.
 *
 * ```
 *   u32 type, u32 bytes of the body, body, zeros up to a multiple of 8
 * ```
 *
 * In their order: START; nothing but END when the guest has no session; SESSION; MOUNTs, each before the first INODE that needs it,
 * and INODEs; HANDLEs; LOCKs; WATCHes; END, with the counts. What is not understood ends the transfer: a version is one number, and there
 * is no guessing. The bodies are described where they are written (save.ts); load.ts believes nothing of them.
 */
import { arena, arenaAlloc, arenaFree } from 'vhost-user-ts/native';

const { u32, u8 } = arena;

/** "vfs-mig1", and the version of everything behind it. */
export const MAGIC_LOW = 0x2d736676;
export const MAGIC_HIGH = 0x3167696d;
export const VERSION = 1;

export const RecordType = { start: 1, session: 2, mount: 3, inode: 4, handle: 5, lock: 6, watch: 7, end: 8 } as const;

/** How an INODE is to be found at the destination. */
export const Found = {
  /** Below the shared directory by its path. */
  path: 0,
  /** By the file handle, on the mount of the record. */
  handle: 1,
  /** Not at all, and nobody will miss it: it was deleted and is not open. */
  gone: 2,
  /** Not at all, though the guest uses it. The path says why, in words. */
  lost: 3,
} as const;

/** Body of an INODE: f64 nodeid, f64 nlookup, then these words, the handle, and the path. Both end at a multiple of 8. */
export const InodeRecord = { type: 16, found: 20, mount: 24, handleBytes: 28, handleType: 32, pathBytes: 36, handle: 40 } as const;

/** Body of a HANDLE: f64 fh, f64 nodeid, and these words. `lost`: it was lost in an earlier migration already. */
export const HandleRecord = { kind: 16, openFlags: 20, lost: 24, bytes: 32 } as const;

/** Body of a LOCK: f64 nodeid, f64 fh of the file it was set through, and these words. */
export const LockRecord = {
  ownerLow: 16,
  ownerHigh: 20,
  startLow: 24,
  startHigh: 28,
  endLow: 32,
  endHigh: 36,
  type: 40,
  pid: 44,
  flock: 48,
  bytes: 56,
} as const;

/** Most bytes of a body: a path and what is around it. */
export const BODY_MAX = 32 << 10;
/** Longest path. The system's own limit is for a single call; a deeper tree is walked down. */
export const PATH_BYTES = BODY_MAX - 1024;

const HEADER = 8;
const BUFFER = 256 << 10;

export function padded(bytes: number): number {
  return (bytes + 7) & ~7;
}

/** Records on their way out: they are put together in the arena. */
export class StateWriter {
  /** Arena offset of the body of the record under way. */
  body = 0;
  readonly start = arenaAlloc(BUFFER);
  #end = 0;

  /** Bytes that wait to be written, from {@link start}. */
  get length(): number {
    return this.#end;
  }

  /** Whether no further record is sure to fit. */
  get full(): boolean {
    return this.#end > BUFFER - HEADER - BODY_MAX;
  }

  /** Begins a record: the caller fills {@link body}, of at most {@link BODY_MAX} bytes. */
  begin(type: number): void {
    const at = this.start + this.#end;
    u32[at >> 2] = type;
    this.body = at + HEADER;
  }

  /** Ends it; `bytes` of the body were filled. */
  end(bytes: number): void {
    const at = this.start + this.#end;
    u32[(at >> 2) + 1] = bytes;
    u8.fill(0, at + HEADER + bytes, at + HEADER + padded(bytes));
    this.#end += HEADER + padded(bytes);
  }

  /** The first `bytes` have gone out. */
  shift(bytes: number): void {
    u8.copyWithin(this.start, this.start + bytes, this.start + this.#end);
    this.#end -= bytes;
  }

  free(): void {
    arenaFree(this.start, BUFFER);
  }
}

/** Records as they come in. */
export class StateReader {
  readonly #start = arenaAlloc(BUFFER);
  #filled = 0;
  #at = 0;
  /** The record of the last {@link next}: arena offset and length of its body. */
  type = 0;
  body = 0;
  bytes = 0;

  /** Where the next bytes go, and how many of them have room. */
  get room(): { at: number; bytes: number } {
    if (this.#at > 0) {
      u8.copyWithin(this.#start, this.#start + this.#at, this.#start + this.#filled);
      this.#filled -= this.#at;
      this.#at = 0;
    }
    return { at: this.#start + this.#filled, bytes: BUFFER - this.#filled };
  }

  /** So many bytes came. */
  filled(bytes: number): void {
    this.#filled += bytes;
  }

  /** Whether a part of a record is left. */
  get rest(): boolean {
    return this.#filled > this.#at;
  }

  /** Goes to the next record: 1; 0 when it is not there as a whole; -1 when no record can be so long. */
  next(): number {
    if (this.#filled - this.#at < HEADER) return 0;
    const at = this.#start + this.#at;
    const bytes = u32[(at >> 2) + 1] as number;
    if (bytes > BODY_MAX) return -1;
    if (this.#filled - this.#at < HEADER + padded(bytes)) return 0;
    this.type = u32[at >> 2] as number;
    this.body = at + HEADER;
    this.bytes = bytes;
    this.#at += HEADER + padded(bytes);
    return 1;
  }

  free(): void {
    arenaFree(this.#start, BUFFER);
  }
}
