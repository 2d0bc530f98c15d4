/**
 * Locks that guests and the host share: GETLK, SETLK, SETLKW (`--posix-lock`, `--flock`).
 *
 * Record locks of a guest's process (a lock owner, as FUSE calls it) become open file description locks of the host
 * (fcntl_locking(2)): each owner has a descriptor of its own for each file that it locks, so that the host's kernel sees owners
 * conflict as processes do, with each other, with the host's processes and with other guests. They are records of the handle store
 * (`Kind.lock`), and so outlive this process where handles do. flock(2) is made on the descriptor of the guest's open file itself.
 *
 * Who must wait is tried again: at once when a lock of this guest goes, otherwise by the clock, in the order of arrival. So a
 * wait costs no thread, and there is no limit but that of requests in flight (`Waits`). Owners that wait for each other in a circle
 * are not told so (EDEADLK), as it is with open file description locks.
 */
import { arena, arenaAlloc, arenaFree, arenaString, cString, native } from 'vhost-user-ts/native';
import { type Lock, PENDING } from '../filesystem.js';
import { Handle, HandleFlag, Kind } from '../handles.js';
import { EACCES, EAGAIN, EBADF, EINTR, EINVAL, ENOLCK, O_ACCMODE, O_NOCTTY, O_NONBLOCK, O_RDONLY, O_RDWR } from '../linux.js';
import type { Share } from './share.js';

/** fcntl(2) (asm-generic). */
const F_OFD_GETLK = 36;
const F_OFD_SETLK = 37;
const F_RDLCK = 0;
const F_WRLCK = 1;
const F_UNLCK = 2;
/** flock(2). */
const LOCK_SH = 1;
const LOCK_EX = 2;
const LOCK_NB = 4;
const LOCK_UN = 8;

/** struct flock: i16 type, i16 whence, i64 start, i64 len, i32 pid. */
const Flock = { type: 0, start: 8, len: 16, pid: 24, bytes: 32 } as const;

/** Owners that may hold locks on one file: each request looks through them. */
const OWNERS_PER_FILE = 1024;
/** Milliseconds between tries of those that wait: the first after a change, and the most. */
const FIRST_DELAY = 1;
const LONGEST_DELAY = 50;
const TWO_32 = 4294967296;

/** Numbers of requests that wait for something which no thread does: `Offload` has them. */
export interface Waits {
  /** Of the last {@link reserve} that succeeded. */
  readonly lastJob: number;
  /** @returns PENDING, or -EAGAIN when too many requests wait */
  reserve(): number;
  /** Ends one: its request is answered with `result`. */
  finish(job: number, result: number): void;
}

/** Instead of a job, of what was locked at another daemon: {@link Locks.takeOver}. */
const NO_JOB = -1;

interface Wait {
  readonly job: number;
  readonly nodeid: number;
  /** Slot of the owner's record, or of the open file (flock). */
  readonly handle: number;
  readonly lock: Lock;
}

export class Locks {
  readonly #share: Share;
  readonly #waits: Waits | null;
  /** Records of each file's lock owners: slots of the handle store. */
  readonly #owners = new Map<number, number[]>();
  #ownerCount = 0;
  readonly #waiting: Wait[] = [];
  #delay = FIRST_DELAY;
  #next = 0;
  readonly #flock = arenaAlloc(Flock.bytes);
  readonly #probe = arenaAlloc(Flock.bytes);
  readonly #readonly: boolean;

  /**
   * @param waits without it no request can wait: SETLKW is answered as SETLK
   * @param readonly files are never opened for writing, so that exclusive record locks are not to be had
   */
  constructor(share: Share, waits: Waits | null, readonly: boolean) {
    this.#share = share;
    this.#waits = waits;
    this.#readonly = readonly;
    share.handles.each(Kind.lock, (slot) => this.#enlist(share.handles.nodeid(slot), slot));
  }

  /** Lock owners with a descriptor. */
  get owners(): number {
    return this.#ownerCount;
  }

  /** Requests that wait. */
  get waiting(): number {
    return this.#waiting.length;
  }

  /** GETLK: `lock` becomes the first one that is in the way (with the guest's pid where it is of this guest, else 0), or F_UNLCK. */
  getlk(nodeid: number, fh: number, lock: Lock): number {
    const { handles } = this.#share;
    const file = handles.find(fh, nodeid, Kind.file);
    if (file < 0) return file;
    if (lock.type !== F_RDLCK && lock.type !== F_WRLCK) return -EINVAL;
    const error = fill(this.#flock, lock);
    if (error < 0) return error;
    const own = this.#find(nodeid, lock);
    const result = native.ofdLock(handles.fd(own === 0 ? file : own), F_OFD_GETLK, this.#flock);
    if (result < 0) return result;
    lock.pid = take(this.#flock, lock) ? this.#holder(nodeid, own) : 0;
    return 0;
  }

  /** SETLK, and SETLKW where `wait` is set: PENDING when it waits. */
  setlk(nodeid: number, fh: number, lock: Lock, wait: boolean): number {
    const { handles } = this.#share;
    const file = handles.find(fh, nodeid, Kind.file);
    if (file < 0) return file;
    if (lock.type !== F_RDLCK && lock.type !== F_WRLCK && lock.type !== F_UNLCK) return -EINVAL;
    const error = fill(this.#flock, lock);
    if (error < 0) return error;
    let handle = file;
    if (!lock.flock) {
      handle = this.#find(nodeid, lock);
      if (handle === 0) {
        if (lock.type === F_UNLCK) return 0;
        handle = this.#add(nodeid, file, lock);
        if (handle < 0) return handle;
      }
      handles.set(handle, Handle.through, file);
      if (lock.type !== F_UNLCK) handles.set(handle, Handle.pid, lock.pid);
    }
    this.#giveUp(handle, lock);
    const result = this.#attempt(handle, lock);
    if (result === 0 && lock.type !== F_WRLCK) this.#changed(nodeid);
    return wait && isTaken(result) ? this.#wait(nodeid, handle, lock) : result;
  }

  /** An owner has closed a descriptor of the file: its record locks on it go, through whichever they were set (FLUSH). */
  flush(nodeid: number, ownerLow: number, ownerHigh: number): void {
    const list = this.#owners.get(nodeid);
    if (list === undefined) return;
    for (let at = 0; at < list.length; at++) {
      if (!this.#isOwner(list[at] as number, ownerLow, ownerHigh)) continue;
      this.#drop(nodeid, list, at);
      return;
    }
  }

  /** An open file goes (RELEASE): what was locked through it and is still there belonged to it alone (F_OFD_SETLK in the guest). */
  released(nodeid: number, file: number): void {
    const { handles } = this.#share;
    // The last job of the handle closes it, but the lock goes now.
    if (handles.get(file, Handle.inFlight) > 0 && this.#share.session.flock) native.flock(handles.fd(file), LOCK_UN);
    if (this.#share.session.flock) this.#changed(nodeid);
    const list = this.#owners.get(nodeid);
    if (list === undefined) return;
    for (let at = list.length - 1; at >= 0; at--)
      if (handles.get(list[at] as number, Handle.through) === file) this.#drop(nodeid, list, at);
  }

  /** INTERRUPT of a request that waits: it ends with EINTR. */
  interrupt(uniqueLow: number, uniqueHigh: number): void {
    for (let at = 0; at < this.#waiting.length; at++) {
      const { lock } = this.#waiting[at] as Wait;
      if (lock.uniqueLow !== uniqueLow || lock.uniqueHigh !== uniqueHigh) continue;
      this.#end(at, -EINTR);
      return;
    }
  }

  /** All requests that wait end with this result. */
  cancel(result: number): void {
    for (let at = this.#waiting.length - 1; at >= 0; at--) if (this.#waiting[at]?.job !== NO_JOB) this.#end(at, result);
  }

  // --- live migration ---

  /**
   * Every lock that this guest holds, as the host's kernel lists them (/proc/PID/fdinfo, proc(5)).
   * @param visit gets the open file that it was set through, and the lock, which is the same object each time
   */
  held(visit: (nodeid: number, file: number, lock: Lock) => void): void {
    const { handles, session } = this.#share;
    const lock: Lock = { ...NO_LOCK };
    const list = (slot: number, file: number, flock: boolean) => {
      lock.flock = flock;
      for (const [, kind, type, start, end] of fdinfo(this.#share.procfd, handles.fd(slot)).matchAll(HELD)) {
        if ((kind === 'FLOCK') !== flock) continue;
        lock.type = type === 'WRITE' ? F_WRLCK : F_RDLCK;
        const last = end === 'EOF' ? 2n ** 63n - 1n : BigInt(end as string);
        lock.startLow = Number(BigInt(start as string) & 0xffffffffn);
        lock.startHigh = Number(BigInt(start as string) >> 32n);
        lock.endLow = Number(last & 0xffffffffn);
        lock.endHigh = Number(last >> 32n);
        visit(handles.nodeid(slot), file, lock);
      }
    };
    handles.each(Kind.lock, (slot) => {
      lock.ownerLow = handles.get(slot, Handle.ownerLow);
      lock.ownerHigh = handles.get(slot, Handle.ownerHigh);
      lock.pid = handles.get(slot, Handle.pid);
      list(slot, handles.get(slot, Handle.through), false);
    });
    Object.assign(lock, NO_LOCK);
    if (session.flock) handles.each(Kind.file, (slot) => list(slot, slot, true));
    // What an earlier daemon has not let go of yet is the guest's all the same.
    for (const { job, nodeid, handle, lock: wanted } of this.#waiting) {
      if (job === NO_JOB) visit(nodeid, wanted.flock ? handle : handles.get(handle, Handle.through), wanted);
    }
  }

  /**
   * Sets a lock that the guest holds at another daemon. As long as that daemon has it, or somebody else, it is tried again.
   * @returns 0: it is set; -EAGAIN: it will be; else the error
   */
  takeOver(nodeid: number, fh: number, lock: Lock): number {
    const result = this.setlk(nodeid, fh, lock, false);
    if (!isTaken(result)) return result;
    const { handles } = this.#share;
    const handle = lock.flock ? handles.find(fh, nodeid, Kind.file) : this.#find(nodeid, lock);
    handles.hold(handle);
    this.#waiting.push({ job: NO_JOB, nodeid, handle, lock: { ...lock } });
    this.#delay = FIRST_DELAY;
    this.#next = performance.now() + FIRST_DELAY;
    return -EAGAIN;
  }

  /** The guest asks for something else, or the owner goes: locks of another daemon are tried for no more. `handle` 0: all of them. */
  #giveUp(handle: number, lock?: Lock): void {
    for (let at = this.#waiting.length - 1; at >= 0; at--) {
      const wait = this.#waiting[at] as Wait;
      if (wait.job !== NO_JOB || (handle !== 0 && wait.handle !== handle)) continue;
      if (lock === undefined || lock.flock || overlap(lock, wait.lock)) this.#end(at, 0);
    }
  }

  /** The session has ended, its handles are closed. */
  clear(): void {
    this.#giveUp(0);
    this.#owners.clear();
    this.#ownerCount = 0;
  }

  /** Milliseconds until {@link poll} has something to do; -1: never. */
  timeout(now: number): number {
    return this.#waiting.length === 0 ? -1 : Math.max(0, Math.ceil(this.#next - now));
  }

  /** Tries again for those that wait, when it is time. */
  poll(now: number): void {
    if (this.#waiting.length === 0 || now < this.#next) return;
    this.#retry(0);
    this.#delay = Math.min(this.#delay * 2, LONGEST_DELAY);
    this.#next = now + this.#delay;
  }

  #changed(nodeid: number): void {
    if (this.#waiting.length > 0) this.#retry(nodeid);
  }

  /** One try for each that waits for this file (0: for any), the oldest first. */
  #retry(nodeid: number): void {
    for (let at = 0; at < this.#waiting.length; ) {
      const wait = this.#waiting[at] as Wait;
      if (nodeid !== 0 && wait.nodeid !== nodeid) {
        at++;
        continue;
      }
      fill(this.#flock, wait.lock);
      const gone = (this.#share.handles.flags(wait.handle) & HandleFlag.closing) !== 0;
      const result = gone ? -EBADF : this.#attempt(wait.handle, wait.lock);
      if (isTaken(result)) at++;
      else this.#end(at, result);
    }
  }

  /** Asks the host for the lock that is in `#flock`. */
  #attempt(handle: number, lock: Lock): number {
    const fd = this.#share.handles.fd(handle);
    if (!lock.flock) return native.ofdLock(fd, F_OFD_SETLK, this.#flock);
    return native.flock(fd, lock.type === F_UNLCK ? LOCK_UN : LOCK_NB | (lock.type === F_WRLCK ? LOCK_EX : LOCK_SH));
  }

  #wait(nodeid: number, handle: number, lock: Lock): number {
    if (this.#waits === null) return -EAGAIN;
    if (this.#waits.reserve() !== PENDING) return -ENOLCK;
    this.#share.handles.hold(handle);
    this.#waiting.push({ job: this.#waits.lastJob, nodeid, handle, lock: { ...lock } });
    this.#delay = FIRST_DELAY;
    this.#next = performance.now() + FIRST_DELAY;
    return PENDING;
  }

  #end(at: number, result: number): void {
    const [{ job, handle }] = this.#waiting.splice(at, 1) as [Wait];
    this.#share.handles.unhold(handle);
    if (job !== NO_JOB) (this.#waits as Waits).finish(job, result);
  }

  #isOwner(slot: number, low: number, high: number): boolean {
    const { handles } = this.#share;
    return handles.get(slot, Handle.ownerLow) === low && handles.get(slot, Handle.ownerHigh) === high;
  }

  /** The record of a lock's owner for a file, or 0. */
  #find(nodeid: number, lock: Lock): number {
    const list = this.#owners.get(nodeid);
    if (list === undefined) return 0;
    for (let at = 0; at < list.length; at++) {
      const slot = list[at] as number;
      if (this.#isOwner(slot, lock.ownerLow, lock.ownerHigh)) return slot;
    }
    return 0;
  }

  /** A new owner gets its descriptor; -ENOLCK when there are too many. */
  #add(nodeid: number, file: number, lock: Lock): number {
    const { handles } = this.#share;
    const list = this.#owners.get(nodeid);
    // A quarter of all descriptors: locks must not keep the guest from opening files.
    if ((list !== undefined && list.length >= OWNERS_PER_FILE) || this.#ownerCount * 4 >= this.#share.limit) return -ENOLCK;
    if (!this.#share.room()) return -ENOLCK;
    const flags = O_NOCTTY | O_NONBLOCK;
    const mode = handles.get(file, Handle.openFlags) & O_ACCMODE;
    let fd = -EACCES;
    // A lock may come through any of the owner's open files, for reading or writing.
    if (!this.#readonly) fd = native.reopen(this.#share.procfd, handles.fd(file), flags | O_RDWR);
    if (fd < 0) fd = native.reopen(this.#share.procfd, handles.fd(file), flags | (this.#readonly ? O_RDONLY : mode));
    if (fd < 0) return -ENOLCK;
    const slot = handles.add(fd, nodeid, Kind.lock, handles.mount(file), flags, 0);
    if (slot === 0) {
      native.close(fd);
      return -ENOLCK;
    }
    handles.set(slot, Handle.ownerLow, lock.ownerLow);
    handles.set(slot, Handle.ownerHigh, lock.ownerHigh);
    this.#enlist(nodeid, slot);
    return slot;
  }

  #enlist(nodeid: number, slot: number): void {
    const list = this.#owners.get(nodeid);
    if (list === undefined) this.#owners.set(nodeid, [slot]);
    else list.push(slot);
    this.#ownerCount++;
  }

  /** All locks of the owner at `list[at]` go, and its record unless it waits for another lock. */
  #drop(nodeid: number, list: number[], at: number): void {
    const { handles } = this.#share;
    const slot = list[at] as number;
    this.#giveUp(slot);
    if (handles.get(slot, Handle.inFlight) > 0) {
      const words = arena.u32.subarray(this.#flock >> 2, (this.#flock + Flock.bytes) >> 2).fill(0);
      words[0] = F_UNLCK;
      native.ofdLock(handles.fd(slot), F_OFD_SETLK, this.#flock);
    } else {
      handles.release(slot);
      list.splice(at, 1);
      if (list.length === 0) this.#owners.delete(nodeid);
      this.#ownerCount--;
    }
    this.#changed(nodeid);
  }

  /**
   * The pid of the guest's process that holds the lock in `#flock`; 0: none of this guest's. An owner's own locks are never in its
   * way: who is not told of that lock is the one.
   */
  #holder(nodeid: number, own: number): number {
    const { handles } = this.#share;
    const u32 = arena.u32;
    const from = this.#flock >> 2;
    const to = this.#probe >> 2;
    for (const slot of this.#owners.get(nodeid) ?? []) {
      if (slot === own) continue;
      u32.copyWithin(to, from, from + Flock.bytes / 4);
      u32[to] = F_WRLCK;
      u32[to + Flock.pid / 4] = 0;
      if (native.ofdLock(handles.fd(slot), F_OFD_GETLK, this.#probe) < 0) continue;
      let same = true;
      for (let i = 0; i < Flock.pid / 4; i++) if (i !== 1 && u32[to + i] !== u32[from + i]) same = false;
      if (!same) return handles.get(slot, Handle.pid);
    }
    return 0;
  }
}

/** Locks of a descriptor: `lock:\t1: OFDLCK  ADVISORY  WRITE -1 08:01:2 0 EOF` (lock_get_status() in fs/locks.c). */
const HELD = /^lock:\s+\d+: (OFDLCK|FLOCK)\s+ADVISORY\s+(READ|WRITE)\s+-?\d+ \S+ (\d+) (\d+|EOF)$/gm;

const NO_LOCK: Readonly<Lock> = {
  ownerLow: 0,
  ownerHigh: 0,
  startLow: 0,
  startHigh: 0,
  endLow: 0,
  endHigh: 0,
  type: 0,
  pid: 0,
  flock: false,
  uniqueLow: 0,
  uniqueHigh: 0,
};

/** What the kernel says of a descriptor of this process; empty when it does not. */
function fdinfo(procfd: number, fd: number): string {
  const file = native.openat(procfd, cString(`../fdinfo/${fd}`), O_RDONLY, 0);
  if (file < 0) return '';
  const size = 4096;
  const at = arenaAlloc(size);
  let text = '';
  for (let n = native.read(file, at, size); n > 0; n = native.read(file, at, size)) text += arenaString(at, n);
  arenaFree(at, size);
  native.close(file);
  return text;
}

function overlap(a: Lock, b: Lock): boolean {
  const before = (endLow: number, endHigh: number, startLow: number, startHigh: number) =>
    endHigh < startHigh || (endHigh === startHigh && endLow < startLow);
  return !before(a.endLow, a.endHigh, b.startLow, b.startHigh) && !before(b.endLow, b.endHigh, a.startLow, a.startHigh);
}

function isTaken(result: number): boolean {
  return result === -EAGAIN || result === -EACCES;
}

/** Makes a struct flock of a lock: its length is counted from both ends. -EINVAL for a range that there is not. */
function fill(flock: number, lock: Lock): number {
  const { startLow, startHigh, endLow, endHigh } = lock;
  if (startHigh >= 0x80000000 || endHigh >= 0x80000000) return -EINVAL;
  if (endHigh < startHigh || (endHigh === startHigh && endLow < startLow)) return -EINVAL;
  let low = 0;
  let high = 0;
  // The largest offset means the end of the file, wherever it is.
  if (endHigh !== 0x7fffffff || endLow !== 0xffffffff) {
    low = endLow - startLow + 1;
    high = endHigh - startHigh;
    if (low < 0) {
      low += TWO_32;
      high--;
    } else if (low >= TWO_32) {
      low -= TWO_32;
      high++;
    }
  }
  const word = flock >> 2;
  const u32 = arena.u32;
  u32[word] = lock.type; // and SEEK_SET
  u32[word + 1] = 0;
  u32[word + 2] = startLow;
  u32[word + 3] = startHigh;
  u32[word + 4] = low;
  u32[word + 5] = high;
  u32[word + 6] = 0;
  u32[word + 7] = 0;
  return 0;
}

/** The other way round. @returns whether it is a lock at all */
function take(flock: number, lock: Lock): boolean {
  const word = flock >> 2;
  const u32 = arena.u32;
  lock.type = (u32[word] as number) & 0xffff;
  if (lock.type === F_UNLCK) return false;
  lock.startLow = u32[word + 2] as number;
  lock.startHigh = u32[word + 3] as number;
  const low = u32[word + 4] as number;
  const high = u32[word + 5] as number;
  if (low === 0 && high === 0) {
    lock.endLow = 0xffffffff;
    lock.endHigh = 0x7fffffff;
    return true;
  }
  let endLow = lock.startLow + low - 1;
  let endHigh = lock.startHigh + high;
  if (endLow < 0) {
    endLow += TWO_32;
    endHigh--;
  } else if (endLow >= TWO_32) {
    endLow -= TWO_32;
    endHigh++;
  }
  lock.endLow = endLow;
  lock.endHigh = endHigh;
  return true;
}
