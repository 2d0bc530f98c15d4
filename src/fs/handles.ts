/**
 * Open files and directories of the guest: records of 64 bytes in the state block. A file handle is
 * `generation * 2^20 + slot`, checked against the nodeid and the kind that the guest names with it.
 */
import { native } from 'vhost-user-ts/native';
import type { Block } from './block.js';
import { HANDLE_RECORD, HANDLE_SLOTS, Header, Part } from './block.js';
import { EBADF } from './linux.js';
import { SlotMap } from './slotmap.js';

const SHIFT = 4;

/** Words of a record. */
export const Handle = {
  fd: 0,
  generation: 1,
  nodeid: 2,
  kind: 4,
  flags: 5,
  /** Jobs that use the fd. */
  inFlight: 6,
  /** Index in mounts.ts. */
  mount: 7,
  /** Directories: position of the fd in two halves, and 1 + number of the buffer that holds what was read ahead (dir.ts). */
  positionLow: 8,
  positionHigh: 9,
  buffer: 10,
  /** O_* flags it was opened with on the host. */
  openFlags: 11,
  /** Lock owners (passthrough/lock.ts): FUSE's number of the owner in two halves, its pid, and the slot of the file it locked through last. */
  ownerLow: 8,
  ownerHigh: 9,
  pid: 14,
  through: 15,
  /** Number of the request that opened it, an f64 (passthrough/journal.ts). */
  opener: 12,
} as const;

/** `kind`: what may be done with it. The guest can name files and directories; a lock is the descriptor of a lock owner. */
export const Kind = { none: 0, file: 1, directory: 2, lock: 3 } as const;

/** Bits of `flags`. */
export const HandleFlag = {
  /** Released by the guest while a job used it: closed when the job ends, found by nobody until then. */
  closing: 1,
  /** The file system refuses RWF_NOWAIT: reads go to the offload threads at once. */
  noNowait: 2,
  /** Each write waits for the disk (O_SYNC, O_DSYNC, O_DIRECT) or for a server: never inline. */
  slowWrite: 4,
  /** O_DIRECT: reads never come from the cache. */
  direct: 8,
} as const;

const GENERATIONS = 0xffffffff;
const State = { generation: 0, open: 1, top: 2 } as const;
/** Word of the header, from Header.handles on, with one more than the highest slot in use. */
export const TOP = State.top;

/** For {@link HandleStore.find}: the handle may be of any inode. No number that a guest can send. */
export const ANY_NODE = -1;

/** The store. */
export class HandleStore {
  readonly u32: Uint32Array;
  readonly i32: Int32Array;
  readonly f64: Float64Array;
  readonly #state: Uint32Array;
  readonly #slots: SlotMap;

  readonly #request: Float64Array;

  /** @param request its first number is that of the request being served */
  constructor(block: Block, request: Float64Array = new Float64Array(1)) {
    this.#request = request;
    const buffer = block.buffer(Part.handles, HANDLE_SLOTS * HANDLE_RECORD);
    this.u32 = new Uint32Array(buffer);
    this.i32 = new Int32Array(buffer);
    this.f64 = new Float64Array(buffer);
    this.#state = block.header.subarray(Header.handles, Header.handles + 16);
    this.#slots = new SlotMap(block.u32(Part.handleMaps, SlotMap.words(HANDLE_SLOTS)), HANDLE_SLOTS);
    if (block.inherited) this.#recover();
    this.#slots.claim(0);
  }

  /** After the end of another process: handles that wait for a job of it end, and where directories stand is not known. */
  #recover(): void {
    this.#slots.clear((this.#state[State.top] as number) + 1);
    let open = 0;
    for (let slot = 1; slot < (this.#state[State.top] as number); slot++) {
      const at = slot << SHIFT;
      const kind = this.u32[at + Handle.kind] as number;
      if (kind === Kind.none) continue;
      if ((this.u32[at + Handle.flags] as number) & HandleFlag.closing) {
        this.u32[at + Handle.kind] = Kind.none;
        continue;
      }
      open++;
      this.#slots.claim(slot);
      this.u32[at + Handle.inFlight] = 0;
      this.u32[at + Handle.buffer] = 0;
      if (kind === Kind.directory) this.u32[at + Handle.positionLow] = this.u32[at + Handle.positionHigh] = 0xffff_ffff;
    }
    this.#state[State.open] = open;
  }

  /** Every open handle. */
  *slots(): Generator<number> {
    for (let slot = 1; slot < (this.#state[State.top] as number); slot++)
      if (this.#slots.taken(slot) && this.u32[(slot << SHIFT) + Handle.kind] !== Kind.none) yield slot;
  }

  /** Number of the request that opened a handle. */
  opener(slot: number): number {
    return this.f64[((slot << SHIFT) + Handle.opener) >> 1] as number;
  }

  /** Handles whose fd is open, those that wait for a job among them. */
  get open(): number {
    return this.#state[State.open] as number;
  }

  /** Takes a slot for an open fd; 0 when there is none left (the fd stays the caller's). */
  add(fd: number, nodeid: number, kind: number, mount: number, openFlags: number, flags: number): number {
    const slot = this.#slots.take();
    if (slot < 0) return 0;
    const generation = ((this.#state[State.generation] as number) % GENERATIONS) + 1;
    this.#state[State.generation] = generation;
    this.#fill(slot, generation, fd, nodeid, kind, mount, openFlags, flags);
    return slot;
  }

  /**
   * As {@link add}, for what the guest knows already by an fh that another daemon gave it. `fd` may be -1: every use then fails
   * with EBADF.
   * @returns the slot, or 0 when that is no fh of a store like this, or its slot is taken
   */
  addAs(fh: number, fd: number, nodeid: number, kind: number, mount: number, openFlags: number, flags: number): number {
    const generation = Math.floor(fh / HANDLE_SLOTS);
    const slot = fh - generation * HANDLE_SLOTS;
    if (!Number.isSafeInteger(fh) || slot < 1 || generation < 1 || generation > GENERATIONS || this.#slots.taken(slot)) return 0;
    this.#slots.claim(slot);
    this.#fill(slot, generation, fd, nodeid, kind, mount, openFlags, flags);
    return slot;
  }

  /** The generation of the youngest fh: the next ones follow it. */
  get generation(): number {
    return this.#state[State.generation] as number;
  }

  set generation(youngest: number) {
    this.#state[State.generation] = youngest;
  }

  /** One more than the highest slot in use: the bound for walks. */
  get top(): number {
    return this.#state[State.top] as number;
  }

  /** Whether a slot has a handle that the guest can use. */
  live(slot: number): boolean {
    return slot !== 0 && this.#slots.taken(slot) && (this.flags(slot) & HandleFlag.closing) === 0;
  }

  kind(slot: number): number {
    return this.u32[(slot << SHIFT) + Handle.kind] as number;
  }

  openFlags(slot: number): number {
    return this.u32[(slot << SHIFT) + Handle.openFlags] as number;
  }

  #fill(slot: number, generation: number, fd: number, nodeid: number, kind: number, mount: number, openFlags: number, flags: number): void {
    const at = slot << SHIFT;
    const u32 = this.u32;
    this.i32[at] = fd;
    u32[at + Handle.generation] = generation;
    this.f64[(at + Handle.nodeid) >> 1] = nodeid;
    u32[at + Handle.flags] = flags;
    u32[at + Handle.inFlight] = 0;
    u32[at + Handle.mount] = mount;
    u32[at + Handle.positionLow] = 0;
    u32[at + Handle.positionHigh] = 0;
    u32[at + Handle.buffer] = 0;
    u32[at + Handle.openFlags] = openFlags;
    this.f64[(at + Handle.opener) >> 1] = this.#request[0] as number;
    this.#state[State.open] = (this.#state[State.open] as number) + 1;
    if (slot >= (this.#state[State.top] as number)) this.#state[State.top] = slot + 1;
    u32[at + Handle.kind] = kind; // last: now it is one, whenever the process ends
  }

  /** What the guest calls it. */
  fh(slot: number): number {
    return (this.u32[(slot << SHIFT) + Handle.generation] as number) * HANDLE_SLOTS + slot;
  }

  /** The slot of a handle that the guest named, or -EBADF: unknown, released, of another inode ({@link ANY_NODE}: any) or another kind. */
  find(fh: number, nodeid: number, kind: number): number {
    const generation = Math.floor(fh / HANDLE_SLOTS);
    const slot = fh - generation * HANDLE_SLOTS;
    // NO_FH gives slot 2^20 - 1 and generation -1, which no record has.
    if (slot === 0 || !this.#slots.taken(slot)) return -EBADF;
    const at = slot << SHIFT;
    const u32 = this.u32;
    if (u32[at + Handle.generation] !== generation || u32[at + Handle.kind] !== kind) return -EBADF;
    if ((u32[at + Handle.flags] as number) & HandleFlag.closing) return -EBADF;
    if (nodeid !== ANY_NODE && this.f64[(at + Handle.nodeid) >> 1] !== nodeid) return -EBADF;
    return slot;
  }

  fd(slot: number): number {
    return this.i32[slot << SHIFT] as number;
  }

  nodeid(slot: number): number {
    return this.f64[((slot << SHIFT) + Handle.nodeid) >> 1] as number;
  }

  /** Calls `visit` for every open record of a kind. */
  each(kind: number, visit: (slot: number) => void): void {
    for (let slot = 1; slot < (this.#state[State.top] as number); slot++)
      if (this.#slots.taken(slot) && this.get(slot, Handle.kind) === kind) visit(slot);
  }

  /** Index in mounts.ts of what is open. */
  mount(slot: number): number {
    return this.u32[(slot << SHIFT) + Handle.mount] as number;
  }

  flags(slot: number): number {
    return this.u32[(slot << SHIFT) + Handle.flags] as number;
  }

  setFlag(slot: number, flag: number): void {
    const at = (slot << SHIFT) + Handle.flags;
    this.u32[at] = (this.u32[at] as number) | flag;
  }

  /** A word of a record. */
  get(slot: number, word: number): number {
    return this.u32[(slot << SHIFT) + word] as number;
  }

  set(slot: number, word: number, value: number): void {
    this.u32[(slot << SHIFT) + word] = value;
  }

  /** A job uses the fd from now on. */
  hold(slot: number): void {
    const at = (slot << SHIFT) + Handle.inFlight;
    this.u32[at] = (this.u32[at] as number) + 1;
  }

  /** A job has ended; the last one of a released handle closes it. Returns whether that happened. */
  unhold(slot: number): boolean {
    const at = (slot << SHIFT) + Handle.inFlight;
    const left = (this.u32[at] as number) - 1;
    this.u32[at] = left;
    if (left > 0 || (this.flags(slot) & HandleFlag.closing) === 0) return false;
    this.#end(slot);
    return true;
  }

  /** RELEASE: closes the fd, or leaves that to the last job. Returns whether it is closed. */
  release(slot: number): boolean {
    if (this.get(slot, Handle.inFlight) > 0) {
      this.setFlag(slot, HandleFlag.closing);
      return false;
    }
    this.#end(slot);
    return true;
  }

  /** Releases every handle. Returns how many fds were closed. */
  releaseAll(): number {
    let closed = 0;
    for (let slot = 1; slot < (this.#state[State.top] as number); slot++) {
      if (this.#slots.taken(slot) && (this.flags(slot) & HandleFlag.closing) === 0 && this.release(slot)) closed++;
    }
    this.#state[State.top] = this.open > 0 ? (this.#state[State.top] as number) : 0;
    return closed;
  }

  #end(slot: number): void {
    const at = slot << SHIFT;
    const fd = this.i32[at] as number;
    // First: the number can be another descriptor's as soon as it is closed.
    this.u32[at + Handle.kind] = Kind.none;
    this.i32[at] = -1;
    // close(2) of what was written to another host can tell an error, but frees the fd all the same.
    if (fd >= 0) native.close(fd);
    this.#slots.free(slot);
    this.#state[State.open] = (this.#state[State.open] as number) - 1;
  }
}
