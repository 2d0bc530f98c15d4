/**
 * Data: READ, WRITE and what else may wait for a disk. Reads of cached pages, and writes as long as the disk does not hold them up,
 * are made in place, everything else by a job on the offload threads; the handle in use stays open until its job has ended.
 */
import { arena, arenaAlloc, EMPTY_NAME, native, OffloadOp } from 'vhost-user-ts/native';
import { PENDING } from '../filesystem.js';
import { ANY_NODE, HandleFlag, Kind } from '../handles.js';
import { ROOT_SLOT } from '../inodes.js';
import {
  AT_EMPTY_PATH,
  EAGAIN,
  EBADF,
  EDQUOT,
  EINVAL,
  EIO,
  ENFILE,
  ENOSPC,
  EOPNOTSUPP,
  FALLOC_FL_COLLAPSE_RANGE,
  FALLOC_FL_INSERT_RANGE,
  FUSE_WRITE_CACHE,
  FUSE_WRITE_KILL_SUIDGID,
  O_APPEND,
  O_DIRECTORY,
  O_NOCTTY,
  O_NONBLOCK,
  O_RDONLY,
  RWF_APPEND,
  RWF_NOWAIT,
  S_IFDIR,
  S_IFREG,
  STATX_BASIC_STATS,
  Statx,
} from '../linux.js';
import { MountFlag } from '../mounts.js';
import type { Share } from './share.js';
import { clearCapabilities } from './xattr.js';

/**
 * A longer write is made by a job while the disk holds writes up; otherwise in place, too: several jobs for one file wait for its lock
 * by spinning (WRITE of 1 MiB at depth 16: 230 instead of 450 µs of processor time, and no more in less time).
 */
const LONG_WRITE = 128 << 10;
/** A write in place that took so long was held up (`balance_dirty_pages()`); the next ones may be for so long. In ns. */
const HELD_UP = 5e6;
const WARY = 1e9;
/** preadv2 takes no more iovecs at once (IOV_MAX). */
const IOV_MAX = 1024;
/** Most that one copy_file_range moves: its result must stay below PENDING. */
const COPY_MAX = 0x3ffff000;
const PAGE = 4096;
/** Room for the largest WRITE with its header, twice. */
const COMPARED_BYTES = 4 << 20;

/** The handles that each job uses; 0: none. */
const jobHandle = new Uint32Array(65536);
const jobHandle2 = new Uint32Array(65536);

/** Hands a call to the offload threads; -EAGAIN when there are none or too much is out: the caller makes it in place. */
function submit(
  share: Share,
  handle: number,
  handle2: number,
  op: number,
  iov: number,
  count: number,
  skip: number,
  length: number,
  offset: number,
  offset2: number,
  flags: number,
): number {
  // A thread that the pool starts now inherits this one's ids; and the call itself may want root's reserved blocks.
  share.credentials.restore();
  const offload = share.offload;
  if (!offload) return -EAGAIN;
  const fd2 = handle2 === 0 ? -1 : share.handles.fd(handle2);
  const result = offload.submit(op, share.handles.fd(handle), iov, count, skip, length, offset, fd2, offset2, flags);
  if (result !== PENDING) return -EAGAIN;
  jobHandle[offload.lastJob] = handle;
  jobHandle2[offload.lastJob] = handle2;
  share.handles.hold(handle);
  if (handle2 !== 0) share.handles.hold(handle2);
  return PENDING;
}

/** A job has ended. */
export function completed(share: Share, job: number): void {
  const handle = jobHandle[job] as number;
  const handle2 = jobHandle2[job] as number;
  jobHandle[job] = 0;
  jobHandle2[job] = 0;
  if (handle !== 0) share.handles.unhold(handle);
  if (handle2 !== 0) share.handles.unhold(handle2);
}

/** READ. */
export function read(
  share: Share,
  nodeid: number,
  fh: number,
  offset: number,
  size: number,
  iov: number,
  count: number,
  skip: number,
): number {
  const handle = share.handles.find(fh, nodeid, Kind.file);
  if (handle < 0) return handle;
  if (offset < 0) return -EINVAL; // -1 would mean the descriptor's own position
  const fd = share.handles.fd(handle);
  if ((share.handles.flags(handle) & (HandleFlag.noNowait | HandleFlag.direct)) === 0) {
    let done = 0;
    for (;;) {
      const n = native.preadv2(fd, iov, count, skip + done, size - done, offset + done, RWF_NOWAIT);
      if (n > 0) {
        done += n;
        // What is not cached begins at a page; only the end of the file is within one.
        if (done >= size || ((offset + done) % PAGE !== 0 && count <= IOV_MAX)) return done;
        continue;
      }
      if (n === 0) return done;
      if (n === -EAGAIN) break;
      if (n !== -EOPNOTSUPP) return done > 0 ? done : n;
      share.handles.setFlag(handle, HandleFlag.noNowait);
      break;
    }
  }
  // The whole of it anew: what was cached is copied once more, and the job's result is the answer.
  if ((share.mounts.flags(share.handles.mount(handle)) & MountFlag.memory) === 0) {
    const job = submit(share, handle, 0, OffloadOp.read, iov, count, skip, size, offset, 0, 0);
    if (job === PENDING) return job;
  }
  let done = 0;
  while (done < size) {
    const n = native.preadv2(fd, iov, count, skip + done, size - done, offset + done, 0);
    if (n < 0) return done > 0 ? done : n;
    if (n === 0) break;
    done += n;
  }
  return done;
}

/** WRITE. */
export function write(
  share: Share,
  nodeid: number,
  fh: number,
  offset: number,
  size: number,
  writeFlags: number,
  iov: number,
  count: number,
  skip: number,
): number {
  const handle = share.handles.find(fh, nodeid, Kind.file);
  if (handle < 0) return handle;
  if (offset < 0) return -EINVAL;
  const fd = share.handles.fd(handle);
  // Pages that the guest writes back have their place; a write of a program goes to the end as it is now on the host.
  const flags = writeFlags & O_APPEND && (writeFlags & FUSE_WRITE_CACHE) === 0 ? RWF_APPEND : 0;
  const kill = (writeFlags & FUSE_WRITE_KILL_SUIDGID) !== 0; // also without HANDLE_KILLPRIV_V2: direct writes of Linux set it always
  clearCapabilities(share, fd);
  let done = 0;
  if (flags !== 0 && (share.journal.begin() || share.journal.isOld)) {
    done = appended(share, fd, offset, size, iov, count, skip);
    if (done === size) return size;
  }
  const began = size > LONG_WRITE ? native.monotonic() : 0;
  const waits = (size > LONG_WRITE && began < share.waryUntil) || (share.handles.flags(handle) & HandleFlag.slowWrite) !== 0;
  if (done === 0 && waits) {
    const job = submit(share, handle, 0, kill ? OffloadOp.writeKillPriv : OffloadOp.write, iov, count, skip, size, offset, 0, flags);
    if (job === PENDING) return job;
  }
  do {
    const n = kill
      ? native.pwritev2KillPriv(fd, iov, count, skip + done, size - done, offset + done, flags)
      : native.pwritev2(fd, iov, count, skip + done, size - done, offset + done, flags);
    if (n < 0) {
      if (done > 0) break;
      // Under a guest user's ids the blocks reserved for root are not to be had.
      if ((n === -ENOSPC || n === -EDQUOT) && share.credentials.switched) {
        share.credentials.restore();
        continue;
      }
      return n;
    }
    if (n === 0) break;
    done += n;
  } while (done < size);
  if (size > LONG_WRITE && native.monotonic() - began > HELD_UP) share.waryUntil = began + WARY;
  return done;
}

const compared = arenaAlloc(COMPARED_BYTES);
const comparedIov = arenaAlloc(16);

/**
 * How many bytes of an append are in the file, written by a process that ended within it. The guest's offset is where it saw the end of the
 * file; others may have appended, too. What is taken for ours has our bytes.
 */
function appended(share: Share, fd: number, offset: number, size: number, iov: number, count: number, skip: number): number {
  if (native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, STATX_BASIC_STATS, share.attr) < 0) return 0;
  const word = (share.attr + Statx.size) >> 2;
  const end = (arena.u32[word] as number) + (arena.u32[word + 1] as number) * 2 ** 32;
  const there = Math.min(end - offset, size);
  if (there <= 0) return 0;
  const readable = native.reopen(share.procfd, fd, O_RDONLY | O_NOCTTY | O_NONBLOCK);
  if (readable < 0) return there;
  let result = 0;
  if (sameBytes(readable, offset, there, iov, count, skip)) result = there;
  else if (end >= size && sameBytes(readable, end - size, size, iov, count, skip)) result = size;
  native.close(readable);
  return result;
}

/** Whether `length` bytes of a file from `offset` on are those of the iovecs behind their first `skip` bytes. */
function sameBytes(fd: number, offset: number, length: number, iov: number, count: number, skip: number): boolean {
  const half = COMPARED_BYTES >> 1;
  if (skip + length > half || native.gather(iov, count, compared, skip + length) !== skip + length) return false;
  const to = compared + half;
  const address = native.arenaAddress() + to;
  const at = comparedIov >> 2;
  arena.u32[at] = address >>> 0;
  arena.u32[at + 1] = Math.floor(address / 2 ** 32);
  arena.u32[at + 2] = length;
  arena.u32[at + 3] = 0;
  if (native.preadv2(fd, comparedIov, 1, 0, length, offset, 0) !== length) return false;
  return arena.buffer.compare(arena.buffer, to, to + length, compared + skip, compared + skip + length) === 0;
}

/** FSYNC and FSYNCDIR. */
export function fsync(share: Share, nodeid: number, fh: number, dataOnly: boolean, kind: number): number {
  const handle = share.handles.find(fh, nodeid, kind);
  if (handle < 0) return handle;
  const job = submit(share, handle, 0, OffloadOp.fsync, 0, 0, 0, 0, 0, 0, dataOnly ? 1 : 0);
  return job === PENDING ? job : native.fsync(share.handles.fd(handle), dataOnly ? 1 : 0);
}

/** FALLOCATE. */
export function fallocate(share: Share, nodeid: number, fh: number, offset: number, length: number, mode: number): number {
  const handle = share.handles.find(fh, nodeid, Kind.file);
  if (handle < 0) return handle;
  const moves = (mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE)) !== 0;
  if (moves && share.journal.begin()) return -EIO;
  // In place, so that what is known of it is known of it alone.
  if (moves) return native.fallocate(share.handles.fd(handle), mode, offset, length);
  const job = submit(share, handle, 0, OffloadOp.fallocate, 0, 0, 0, length, offset, 0, mode);
  return job === PENDING ? job : native.fallocate(share.handles.fd(handle), mode, offset, length);
}

/** LSEEK: the answer is a position; only a file's can be moved, a directory's belongs to READDIR. */
export function lseek(share: Share, nodeid: number, fh: number, offset: number, whence: number): number {
  const handle = share.handles.find(fh, nodeid, Kind.file);
  return handle < 0 ? handle : native.lseek(share.handles.fd(handle), offset, whence);
}

/** COPY_FILE_RANGE. */
export function copyFileRange(
  share: Share,
  fhIn: number,
  offsetIn: number,
  nodeidOut: number,
  fhOut: number,
  offsetOut: number,
  length: number,
): number {
  const from = share.handles.find(fhIn, ANY_NODE, Kind.file);
  const to = share.handles.find(fhOut, nodeidOut, Kind.file);
  if (from < 0 || to < 0) return -EBADF;
  const bytes = Math.min(length, COPY_MAX);
  const job = submit(share, from, to, OffloadOp.copyFileRange, 0, 0, 0, bytes, offsetIn, offsetOut, 0);
  return job === PENDING ? job : native.copyFileRange(share.handles.fd(from), offsetIn, share.handles.fd(to), offsetOut, bytes);
}

/** SYNCFS of the file system that an inode is on; of the share's where the inode is nothing that can be opened. */
export function syncfs(share: Share, nodeid: number): number {
  let slot = share.inodes.find(nodeid);
  if (slot < 0) return slot;
  const type = share.type(slot);
  if (type !== S_IFDIR && type !== S_IFREG) slot = ROOT_SLOT;
  const fd = share.open(slot, O_RDONLY | O_NONBLOCK | O_NOCTTY | (share.type(slot) === S_IFDIR ? O_DIRECTORY : 0));
  if (fd < 0) return fd;
  // A handle that nobody can name: it is closed when the job ends.
  const handle = share.handles.add(fd, 0, Kind.none, share.mountOf(slot), O_RDONLY, 0);
  if (handle === 0) {
    native.close(fd);
    return -ENFILE;
  }
  const job = submit(share, handle, 0, OffloadOp.syncfs, 0, 0, 0, 0, 0, 0, 0);
  const result = job === PENDING ? job : native.syncfs(fd);
  share.handles.release(handle);
  return result;
}
