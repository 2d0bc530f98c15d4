/**
 * Guest memory: the front end's regions, mapped, and the one place where addresses of a peer become addresses of ours.
 *
 * A guest-physical address is what stands in descriptors; a user address (the front end's own virtual address) is what
 * SET_VRING_ADDR carries. Both are numbers: regions that end above 2^53 are refused, so the arithmetic is exact.
 */
import { closeFd } from './fd.js';
import { native } from './native.js';

const EINVAL = 22;
const EEXIST = 17;
const ENOENT = 2;
const ENOSPC = 28;

/** One memory region as SET_MEM_TABLE and ADD_MEM_REG describe it. */
export interface RegionSpec {
  guestAddress: number;
  size: number;
  userAddress: number;
  /** Where the region starts in the file behind its descriptor. */
  mmapOffset: number;
}

/** The dirty log's place in the file behind `fd` (-1: there is no log). */
export interface LogSpec {
  fd: number;
  offset: number;
  size: number;
}

interface Region extends RegionSpec {
  /** Region id of the add-on. */
  id: number;
  /** Our virtual address of the region's first byte. */
  address: number;
  /** Its bytes as JavaScript sees them, made when they are first looked at. */
  readonly windows: (Uint32Array | undefined)[];
  /** The file, for a process after this one, or -1. */
  fd: number;
}

const LOG_PAGE_SHIFT = 12;
const EXACT = 2 ** 53;
/** Of a descriptor table, the strictest of the three (virtio 1.2, 2.7). */
const RING_ALIGNMENT = 16;
/** An ArrayBuffer ends at 4 GiB, and indexes are fastest within 31 bits. */
const WINDOW_BYTES = 2 ** 31;
const NO_WORDS = new Uint32Array(0);

/** The memory of one guest. */
export class GuestMemory {
  /** Bytes that are contiguous from the address of the last successful {@link translate} or {@link translateUser}. */
  room = 0;
  /** Grows with every change of the table: whoever keeps translated addresses compares it. */
  generation = 0;

  /** What the last successful {@link window} points into. */
  words: Uint32Array = NO_WORDS;
  /** Guest address and length of `words`. */
  #wordsStart = 0;
  #wordsBytes = 0;

  #regions: Region[] = [];
  #last: Region | undefined;
  /** Mappings that left the table while {@link pin}s were held. */
  #retired: number[] = [];
  #pins = 0;
  #log: Uint8Array | undefined;
  #logRegion = -1;
  #logAll = false;
  /** While VHOST_F_LOG_ALL is acked and a log is set: writes must be reported with {@link markDirty}. */
  logging = false;
  #logFile: LogSpec = { fd: -1, offset: 0, size: 0 };

  /** What becomes of descriptors that are not needed any more: whoever keeps this process's state may want them a little longer. */
  dispose: (fd: number) => void = closeFd;

  /** Most regions the table takes (GET_MAX_MEM_SLOTS). */
  readonly maxRegions: number;

  constructor(maxRegions = 509) {
    this.maxRegions = maxRegions;
  }

  get regionCount(): number {
    return this.#regions.length;
  }

  /** The table as it is. */
  get table(): readonly (RegionSpec & { readonly fd: number })[] {
    return this.#regions;
  }

  /**
   * Maps one region; the descriptor may be closed afterwards.
   * @param keep a descriptor of the same file that belongs to the region from now on, for a process after this one; -1: none is kept
   * @returns 0, -EINVAL (empty, misplaced, overlapping, or the file is shorter than it says), -ENOSPC (table full), or mmap's -errno.
   */
  add(spec: RegionSpec, fd: number, keep = -1): number {
    if (!(spec.size > 0) || spec.guestAddress + spec.size > EXACT || spec.userAddress + spec.size > EXACT) return -EINVAL;
    if (this.#regions.length >= this.maxRegions) return -ENOSPC;
    for (const other of this.#regions) {
      if (spec.guestAddress < other.guestAddress + other.size && other.guestAddress < spec.guestAddress + spec.size) return -EEXIST;
    }
    // mmap(2) wants a page-aligned offset; virtio_uml and some front ends give regions that start within a page.
    const slack = spec.mmapOffset % 4096;
    const id = native.regionMap(fd, spec.mmapOffset - slack, spec.size + slack, 1);
    if (id < 0) return id;
    this.#regions.push({ ...spec, id, address: native.regionAddress(id) + slack, fd: keep, windows: [] });
    this.#regions.sort((a, b) => a.guestAddress - b.guestAddress);
    this.#last = undefined;
    this.#closeWindow();
    this.generation++;
    return 0;
  }

  /** Takes the region with exactly these addresses and this size out of the table. -ENOENT when there is none. */
  remove(spec: Pick<RegionSpec, 'guestAddress' | 'size' | 'userAddress'>): number {
    const at = this.#regions.findIndex(
      (r) => r.guestAddress === spec.guestAddress && r.size === spec.size && r.userAddress === spec.userAddress,
    );
    if (at < 0) return -ENOENT;
    this.#retire(this.#regions.splice(at, 1));
    return 0;
  }

  /** Empties the table. */
  clearRegions(): void {
    this.#retire(this.#regions.splice(0));
  }

  /** Empties the table and stops logging. */
  clear(): void {
    this.clearRegions();
    this.setLog(-1, 0, 0);
    this.setLogging(false);
  }

  #retire(gone: Region[]): void {
    this.#last = undefined;
    this.#closeWindow();
    this.generation++;
    for (const region of gone) {
      this.#retired.push(region.id);
      this.dispose(region.fd);
    }
    if (this.#pins === 0) this.#unmapRetired();
  }

  #unmapRetired(): void {
    for (const id of this.#retired) native.regionUnmap(id);
    this.#retired = [];
  }

  /** Keeps every mapping in place, even of removed regions, until {@link unpin}: for work that goes on in other threads. */
  pin(): void {
    this.#pins++;
  }

  unpin(): void {
    if (--this.#pins === 0 && this.#retired.length > 0) this.#unmapRetired();
  }

  /** True when the file behind a region was truncated under us: its contents are gone, the device should stop. */
  get broken(): boolean {
    for (const region of this.#regions) if (native.regionBroken(region.id) === 1) return true;
    return false;
  }

  /**
   * Our virtual address of a guest-physical address; {@link room} then says how many bytes are contiguous from there
   * (to the end of its region).
   * @returns -1 when no region holds it.
   */
  translate(guestAddress: number): number {
    let region = this.#last;
    if (region === undefined || guestAddress < region.guestAddress || guestAddress >= region.guestAddress + region.size) {
      region = this.#find(guestAddress);
      if (region === undefined) return -1;
      this.#last = region;
    }
    const offset = guestAddress - region.guestAddress;
    this.room = region.size - offset;
    return region.address + offset;
  }

  #find(guestAddress: number): Region | undefined {
    for (const region of this.#regions) {
      if (guestAddress >= region.guestAddress && guestAddress < region.guestAddress + region.size) return region;
    }
    return undefined;
  }

  /**
   * Guest memory without a native call: {@link words} then holds the bytes, and the result is the index of the word at this
   * guest-physical address. For the moment only: the window goes with its region. The guest can write meanwhile, so each word is read
   * once; pages that it has truncated read as zeros (see `regionMap`).
   * @returns -1 when they are not words of one window: not aligned, across a border, not in the table. {@link translate} then.
   */
  window(guestAddress: number, length: number): number {
    const offset = guestAddress - this.#wordsStart;
    if (offset < 0 || offset + length > this.#wordsBytes) return this.#openWindow(guestAddress, length);
    return (offset & 3) === 0 ? offset >>> 2 : -1;
  }

  #openWindow(guestAddress: number, length: number): number {
    const region = this.#find(guestAddress);
    if (region === undefined) return -1;
    // Within its first page a region begins anywhere.
    const slack = region.address - native.regionAddress(region.id);
    if (slack % 4 !== 0) return -1;
    const number = Math.floor((guestAddress - region.guestAddress) / WINDOW_BYTES);
    const start = number * WINDOW_BYTES;
    const whole = Math.min(region.size - start, WINDOW_BYTES);
    const bytes = whole - (whole % 4);
    const at = guestAddress - region.guestAddress - start;
    if (at + length > bytes || at % 4 !== 0) return -1;
    region.windows[number] ??= new Uint32Array(native.regionBuffer(region.id, start + slack, bytes));
    this.words = region.windows[number];
    this.#wordsStart = region.guestAddress + start;
    this.#wordsBytes = bytes;
    return at / 4;
  }

  #closeWindow(): void {
    this.words = NO_WORDS;
    this.#wordsBytes = 0;
  }

  /**
   * A view of `length` bytes at a front-end user address, for a ring: external memory, detached when its region goes.
   * @returns undefined when the bytes do not lie within one region, or a mapping that is shifted against the addresses would
   *   put what is aligned there elsewhere: atomic accesses of the rings fault then on some processors.
   */
  viewUser(userAddress: number, length: number): ArrayBuffer | undefined {
    for (const region of this.#regions) {
      const offset = userAddress - region.userAddress;
      if (offset < 0 || offset + length > region.size) continue;
      if ((region.address - region.userAddress) % RING_ALIGNMENT !== 0) return undefined;
      const slack = region.address - native.regionAddress(region.id);
      return native.regionBuffer(region.id, offset + slack, length);
    }
    return undefined;
  }

  /** Where a front-end user address is in this process, or -1. */
  addressOfUser(userAddress: number): number {
    for (const region of this.#regions) {
      const offset = userAddress - region.userAddress;
      if (offset >= 0 && offset < region.size) return region.address + offset;
    }
    return -1;
  }

  /** Guest-physical address of a front-end user address, or -1. */
  userToGuest(userAddress: number): number {
    for (const region of this.#regions) {
      const offset = userAddress - region.userAddress;
      if (offset >= 0 && offset < region.size) return region.guestAddress + offset;
    }
    return -1;
  }

  // --- dirty logging (vhost-user: "Migration") ---

  /** Where the log is. */
  get log(): Readonly<LogSpec> {
    return this.#logFile;
  }

  /** VHOST_F_LOG_ALL. */
  setLogging(on: boolean): void {
    this.#logAll = on;
    this.logging = on && this.#log !== undefined;
  }

  /** SET_LOG_BASE: maps the dirty bitmap (one bit per 4096-byte page). fd -1 takes it away. `keep` as in {@link add}. Returns 0 or -errno. */
  setLog(fd: number, offset: number, size: number, keep = -1): number {
    let id = -1;
    if (fd >= 0) {
      if (!(size > 0) || size > 0xffff_ffff) return -EINVAL;
      id = native.regionMap(fd, offset, size, 1);
      if (id < 0) return id;
    }
    const old = this.#logRegion;
    this.#log = id < 0 ? undefined : new Uint8Array(native.regionBuffer(id, 0, size));
    this.#logRegion = id;
    if (old >= 0) native.regionUnmap(old);
    this.setLogging(this.#logAll);
    this.dispose(this.#logFile.fd);
    this.#logFile = { fd: keep, offset, size };
    return 0;
  }

  /** Marks the pages of a write to guest memory. The front end reads and clears the bits meanwhile, hence the atomic OR. */
  markDirty(guestAddress: number, length: number): void {
    const log = this.#log;
    if (log === undefined || length <= 0) return;
    const last = Math.floor((guestAddress + length - 1) / 2 ** LOG_PAGE_SHIFT);
    for (let page = Math.floor(guestAddress / 2 ** LOG_PAGE_SHIFT); page <= last; page++) {
      const byte = Math.floor(page / 8);
      if (byte >= log.length) return;
      Atomics.or(log, byte, 1 << (page % 8));
    }
  }
}
