/**
 * Reading directories. What getdents64 gives is more than fits one answer, so it stays in a buffer of the arena and the next
 * request goes on there; a request that continues where the last one ended costs no lseek.
 */
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import type { DirectorySink } from '../filesystem.js';
import { Handle, Kind } from '../handles.js';
import { ROOT_SLOT } from '../inodes.js';
import { Dirent64, EINVAL, ENFILE, ENOENT, O_DIRECTORY, O_NOATIME, O_NOFOLLOW, O_RDONLY } from '../linux.js';
import { lookupName, unref } from './lookup.js';
import { cacheFlags } from './open.js';
import type { Share } from './share.js';

const { u8, u16, u32 } = arena;

const BUFFERS = 32;
const BUFFER_BYTES = 32 << 10;
const DOT = 0x2e;

/** Entries read ahead, of the directories that are being read just now; the one not used for longest is given to the next. */
class Buffers {
  readonly start: number;
  /** Handle slot that a buffer belongs to, 0: none. */
  readonly owner = new Uint32Array(BUFFERS);
  /** Arena offset after the last entry, and of the next one to give. */
  readonly end = new Uint32Array(BUFFERS);
  readonly cursor = new Uint32Array(BUFFERS);
  /** Directory position of the buffer's first entry, and of the one at the cursor. */
  readonly firstLow = new Uint32Array(BUFFERS);
  readonly firstHigh = new Uint32Array(BUFFERS);
  readonly atLow = new Uint32Array(BUFFERS);
  readonly atHigh = new Uint32Array(BUFFERS);
  readonly #used = new Float64Array(BUFFERS);
  #clock = 0;

  constructor() {
    this.start = arenaAlloc(BUFFERS * BUFFER_BYTES);
  }

  /** Arena offset of a buffer. */
  memory(buffer: number): number {
    return this.start + buffer * BUFFER_BYTES;
  }

  /** The buffer of a handle: the one it has, or that of the handle that was not read for longest. */
  of(share: Share, handle: number): number {
    let buffer = share.handles.get(handle, Handle.buffer) - 1;
    if (buffer < 0 || this.owner[buffer] !== handle) {
      buffer = 0;
      for (let i = 1; i < BUFFERS; i++) if ((this.#used[i] as number) < (this.#used[buffer] as number)) buffer = i;
      this.owner[buffer] = handle;
      this.empty(buffer);
      share.handles.set(handle, Handle.buffer, buffer + 1);
    }
    this.#used[buffer] = ++this.#clock;
    return buffer;
  }

  empty(buffer: number): void {
    this.end[buffer] = this.cursor[buffer] = this.memory(buffer);
  }

  /** A handle was closed. */
  drop(share: Share, handle: number): void {
    const buffer = share.handles.get(handle, Handle.buffer) - 1;
    if (buffer < 0 || this.owner[buffer] !== handle) return;
    this.owner[buffer] = 0;
    this.#used[buffer] = 0;
    this.empty(buffer);
  }
}

let buffers: Buffers | null = null;

/** OPENDIR. */
export function opendir(share: Share, nodeid: number, flags: number): number {
  const slot = share.directory(nodeid);
  if (slot < 0) return slot;
  const hostFlags = O_RDONLY | O_DIRECTORY | (share.preserveNoatime ? flags & O_NOATIME : 0);
  const fd = share.open(slot, hostFlags | O_NOFOLLOW);
  if (fd < 0) return fd;
  const handle = share.handles.add(fd, nodeid, Kind.directory, share.mountOf(slot), hostFlags, 0);
  if (handle === 0) {
    native.close(fd);
    return -ENFILE;
  }
  share.opened.fh = share.handles.fh(handle);
  share.opened.openFlags = cacheFlags(share, true);
  return 0;
}

/** RELEASEDIR. */
export function releasedir(share: Share, nodeid: number, fh: number): number {
  const handle = share.handles.find(fh, nodeid, Kind.directory);
  const again = share.journal.begin();
  if (handle < 0) return again ? 0 : handle;
  buffers?.drop(share, handle);
  share.handles.release(handle);
  return 0;
}

/** READDIR and READDIRPLUS; returns the number of entries, 0 at the end. */
export function readdir(share: Share, nodeid: number, fh: number, low: number, high: number, sink: DirectorySink, plus: boolean): number {
  const handle = share.handles.find(fh, nodeid, Kind.directory);
  if (handle < 0) return handle;
  let dir = 0;
  let dirfd = 0;
  if (plus) {
    dir = share.directory(nodeid);
    if (dir < 0) return dir;
    dirfd = share.fd(dir);
    if (dirfd < 0) return dirfd;
    share.keep = dir;
  }
  buffers ??= new Buffers();
  const buffer = buffers.of(share, handle);
  let error = seek(share, buffers, buffer, handle, low, high);
  if (error < 0) return error;
  let taken = 0;
  for (;;) {
    if (buffers.cursor[buffer] === buffers.end[buffer]) {
      // What was gone since it was read was skipped; the end of the directory is only where the host says so.
      if (taken > 0) return taken;
      error = fill(share, buffers, buffer, handle);
      if (error <= 0) return error;
    }
    const at = buffers.cursor[buffer] as number;
    const result = offer(share, at, dir, dirfd, sink, plus);
    if (result === REFUSED) return taken > 0 ? taken : -EINVAL;
    if (result === TAKEN) taken++;
    buffers.atLow[buffer] = u32[(at + Dirent64.off) >> 2] as number;
    buffers.atHigh[buffer] = u32[(at + Dirent64.off + 4) >> 2] as number;
    buffers.cursor[buffer] = at + (u16[(at + Dirent64.reclen) >> 1] as number);
  }
}

/** Puts the cursor at a position: within the buffer when it is there, else the buffer is emptied and the fd moved. */
function seek(share: Share, b: Buffers, buffer: number, handle: number, low: number, high: number): number {
  const filled = b.cursor[buffer] !== b.end[buffer] || b.end[buffer] !== b.memory(buffer);
  const start = low === 0 && high === 0;
  if (filled && b.atLow[buffer] === low && b.atHigh[buffer] === high && !(start && b.cursor[buffer] !== b.memory(buffer))) return 0;
  // From the beginning means anew (rewinddir), not what was read then.
  if (filled && !start && find(b, buffer, low, high)) return 0;
  b.empty(buffer);
  b.atLow[buffer] = low;
  b.atHigh[buffer] = high;
  const handles = share.handles;
  if (handles.get(handle, Handle.positionLow) === low && handles.get(handle, Handle.positionHigh) === high) return 0;
  const error = native.seekDirectory(handles.fd(handle), low, high);
  if (error < 0) return error;
  handles.set(handle, Handle.positionLow, low);
  handles.set(handle, Handle.positionHigh, high);
  return 0;
}

/** Looks for a position among the buffered entries. */
function find(b: Buffers, buffer: number, low: number, high: number): boolean {
  let at = b.memory(buffer);
  const end = b.end[buffer] as number;
  let hereLow = b.firstLow[buffer] as number;
  let hereHigh = b.firstHigh[buffer] as number;
  for (;;) {
    if (hereLow === low && hereHigh === high) {
      b.cursor[buffer] = at;
      b.atLow[buffer] = low;
      b.atHigh[buffer] = high;
      return true;
    }
    if (at >= end) return false;
    hereLow = u32[(at + Dirent64.off) >> 2] as number;
    hereHigh = u32[(at + Dirent64.off + 4) >> 2] as number;
    at += u16[(at + Dirent64.reclen) >> 1] as number;
  }
}

/** Reads the next entries from where the fd stands; returns their bytes. */
function fill(share: Share, b: Buffers, buffer: number, handle: number): number {
  const handles = share.handles;
  const start = b.memory(buffer);
  b.firstLow[buffer] = b.atLow[buffer] = handles.get(handle, Handle.positionLow);
  b.firstHigh[buffer] = b.atHigh[buffer] = handles.get(handle, Handle.positionHigh);
  const bytes = native.getdents64(handles.fd(handle), start, BUFFER_BYTES);
  b.cursor[buffer] = start;
  b.end[buffer] = start + Math.max(bytes, 0);
  if (bytes <= 0) return bytes;
  let last = start;
  for (let at = start; at < start + bytes; at += u16[(at + Dirent64.reclen) >> 1] as number) last = at;
  handles.set(handle, Handle.positionLow, u32[(last + Dirent64.off) >> 2] as number);
  handles.set(handle, Handle.positionHigh, u32[(last + Dirent64.off + 4) >> 2] as number);
  return bytes;
}

const TAKEN = 1;
const SKIPPED = 0;
const REFUSED = -1;

/** Offers one entry to the sink, looked up for READDIRPLUS. */
function offer(share: Share, at: number, dir: number, dirfd: number, sink: DirectorySink, plus: boolean): number {
  const word = at >> 2;
  const name = at + Dirent64.name;
  const length = nameLength(at);
  const type = u8[at + Dirent64.type] as number;
  const offLow = u32[word + 2] as number;
  const offHigh = u32[word + 3] as number;
  if (!plus) return sink.add(name, length, u32[word] as number, u32[word + 1] as number, type, offLow, offHigh) ? TAKEN : REFUSED;
  if (!sink.fits(length)) return REFUSED;
  let slot = 0;
  // The guest's kernel has these two itself.
  if (!(u8[name] === DOT && (length === 1 || (length === 2 && u8[name + 1] === DOT)))) {
    slot = lookupName(share, dir, dirfd, name, false);
    if (slot === -ENOENT) return SKIPPED;
  }
  const known = slot > 0;
  if (!known) share.entry.nodeid = 0;
  if (sink.addPlus(name, length, u32[word] as number, u32[word + 1] as number, type, offLow, offHigh, known)) return TAKEN;
  if (known && slot !== ROOT_SLOT) unref(share, slot, 1);
  return REFUSED;
}

/** Length of an entry's name: its NUL is within the last eight bytes of the record. */
function nameLength(at: number): number {
  const end = at + (u16[(at + Dirent64.reclen) >> 1] as number);
  let nul = Math.max(end - 8, at + Dirent64.name);
  while (nul < end && u8[nul] !== 0) nul++;
  return nul - at - Dirent64.name;
}
