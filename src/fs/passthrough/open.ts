/** Opening: OPEN, CREATE, TMPFILE and the flags they share; RELEASE and FLUSH. */
import { native } from 'vhost-user-ts/native';
import { HandleFlag, Kind } from '../handles.js';
import {
  CAP_FSETID,
  EACCES,
  EEXIST,
  EISDIR,
  ELOOP,
  ENFILE,
  FOPEN_CACHE_DIR,
  FOPEN_DIRECT_IO,
  FOPEN_KEEP_CACHE,
  O_ACCMODE,
  O_CREAT,
  O_DIRECT,
  O_DSYNC,
  O_EXCL,
  O_NOATIME,
  O_NOCTTY,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDWR,
  O_SYNC,
  O_TMPFILE,
  O_TRUNC,
  O_WRONLY,
  S_IFDIR,
  S_IFLNK,
  S_IFREG,
} from '../linux.js';
import { MountFlag } from '../mounts.js';
import { enterCaller, isOurs } from './link.js';
import { lookupFd, lookupName, unref } from './lookup.js';
import { setContexts } from './secctx.js';
import type { Share } from './share.js';
import { clearCapabilities } from './xattr.js';

/** OPEN of a regular file. Nothing else is ever opened for the guest here: a device, FIFO or socket of the host is not the guest's. */
export function open(share: Share, nodeid: number, flags: number, killPriv: boolean): number {
  const slot = share.inodes.find(nodeid);
  return slot < 0 ? slot : openSlot(share, slot, nodeid, flags, killPriv);
}

function openSlot(share: Share, slot: number, nodeid: number, flags: number, killPriv: boolean): number {
  const type = share.type(slot);
  if (type !== S_IFREG) return type === S_IFDIR ? -EISDIR : type === S_IFLNK ? -ELOOP : -EACCES;
  const hostFlags = openFlags(share, flags);
  const drop = killPriv && share.session.killPrivV2 && (flags & O_TRUNC) !== 0;
  const dropped = drop && native.setCapability(CAP_FSETID, 0) === 1;
  const fd = share.open(slot, hostFlags);
  if (dropped) native.setCapability(CAP_FSETID, 1);
  if (fd < 0) return fd;
  if (flags & O_TRUNC) clearCapabilities(share, fd);
  return addFile(share, fd, nodeid, share.mountOf(slot), hostFlags);
}

/**
 * CREATE: makes a file under the caller's ids, or opens the one that is there.
 * The host gets O_EXCL always, so that nothing is opened that the guest's kernel has not judged.
 */
export function create(share: Share, parent: number, name: number, flags: number, mode: number, umask: number, killPriv: boolean): number {
  const dir = share.directory(parent);
  if (dir < 0) return dir;
  const dirfd = share.fd(dir);
  if (dirfd < 0) return dirfd;
  const hostFlags = openFlags(share, flags) & ~O_TRUNC;
  share.keep = dir;
  if (!share.room()) return -ENFILE;
  let error = enterCaller(share, dir, mode, umask);
  if (error < 0) return error;
  const again = share.journal.begin();
  const fd = native.openat(dirfd, name, hostFlags | O_CREAT | O_EXCL, mode & 0o7777);
  share.credentials.leave(isLocal(share, dir));
  if (fd === -EEXIST && again && isOurs(share, dirfd, name, S_IFREG)) return openMade(share, dir, dirfd, name, flags);
  if (fd === -EEXIST && (flags & O_EXCL) === 0) return openExisting(share, dir, dirfd, name, flags, killPriv);
  if (fd < 0) return fd;
  const slot = lookupFd(share, dir, fd, false, true);
  if (slot < 0) {
    native.close(fd);
    return slot;
  }
  error = setContexts(share, fd);
  if (error < 0) native.unlinkat(dirfd, name, 0);
  return finishCreate(share, slot, fd, hostFlags, error);
}

/** The file that this request has made before the process that served it ended. */
function openMade(share: Share, dir: number, dirfd: number, name: number, flags: number): number {
  let error = openExisting(share, dir, dirfd, name, flags & ~O_TRUNC, false);
  if (error < 0) return error;
  error = setContexts(share, share.handles.fd(share.handles.find(share.opened.fh, 0, Kind.file)));
  return error;
}

function openExisting(share: Share, dir: number, dirfd: number, name: number, flags: number, killPriv: boolean): number {
  const slot = lookupName(share, dir, dirfd, name, false);
  if (slot < 0) return slot;
  const error = openSlot(share, slot, share.entry.nodeid, flags, killPriv);
  if (error < 0) unref(share, slot, 1);
  return error;
}

/** TMPFILE: a file without a name in a directory. */
export function tmpfile(share: Share, parent: number, flags: number, mode: number, umask: number): number {
  const dir = share.directory(parent);
  if (dir < 0) return dir;
  const dirfd = share.fd(dir);
  if (dirfd < 0) return dirfd;
  const hostFlags = openFlags(share, flags) & ~O_TRUNC;
  share.keep = dir;
  if (!share.room()) return -ENFILE;
  let error = enterCaller(share, dir, mode, umask);
  if (error < 0) return error;
  // O_EXCL means here that the file never gets a name: the guest's kernel keeps to that itself.
  const fd = native.openat(dirfd, share.dot, hostFlags | O_TMPFILE, mode & 0o7777);
  share.credentials.leave(isLocal(share, dir));
  if (fd < 0) return fd;
  const slot = lookupFd(share, dir, fd, false, true);
  if (slot < 0) {
    native.close(fd);
    return slot;
  }
  error = setContexts(share, fd);
  return finishCreate(share, slot, fd, hostFlags, error);
}

function finishCreate(share: Share, slot: number, fd: number, hostFlags: number, error: number): number {
  if (error === 0) error = addFile(share, fd, share.entry.nodeid, share.mountOf(slot), hostFlags);
  else native.close(fd);
  if (error < 0) unref(share, slot, 1);
  return error;
}

/** Makes a handle of an open fd (closed when there is none left). */
function addFile(share: Share, fd: number, nodeid: number, mount: number, hostFlags: number): number {
  let flags = 0;
  if (hostFlags & O_DIRECT) flags |= HandleFlag.direct | HandleFlag.slowWrite;
  if (hostFlags & O_DSYNC) flags |= HandleFlag.slowWrite; // O_SYNC has this bit too
  // A file system that asks a server (FUSE, NFS) waits for its answer, perhaps for ever.
  if ((share.mounts.flags(mount) & MountFlag.local) === 0) flags |= HandleFlag.slowWrite;
  const handle = share.handles.add(fd, nodeid, Kind.file, mount, hostFlags, flags);
  if (handle === 0) {
    native.close(fd);
    return -ENFILE;
  }
  share.opened.fh = share.handles.fh(handle);
  share.opened.openFlags = cacheFlags(share, false);
  return 0;
}

/** FOPEN_* as virtiofsd answers for each cache policy. */
export function cacheFlags(share: Share, directory: boolean): number {
  switch (share.cache) {
    case 'never':
      return directory ? 0 : FOPEN_DIRECT_IO;
    case 'metadata':
      return directory ? FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE : FOPEN_DIRECT_IO;
    case 'always':
      return directory ? FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE : FOPEN_KEEP_CACHE;
    default:
      return 0;
  }
}

/**
 * The guest's open flags for the host. O_APPEND never: where a write goes is said with each write. With the writeback cache
 * the guest reads pages of files that it writes only parts of.
 */
export function openFlags(share: Share, flags: number): number {
  let host = flags & (O_ACCMODE | O_TRUNC | O_NONBLOCK | O_SYNC);
  if (share.session.writebackCache && (host & O_ACCMODE) === O_WRONLY) host = (host & ~O_ACCMODE) | O_RDWR;
  if (share.allowDirectIo) host |= flags & O_DIRECT;
  if (share.preserveNoatime) host |= flags & O_NOATIME;
  return host | O_NOFOLLOW | O_NOCTTY;
}

/** Whether the thread may keep a guest user's ids after creating something on this file system. */
export function isLocal(share: Share, dir: number): boolean {
  return (share.mounts.flags(share.mountOf(dir)) & MountFlag.local) !== 0;
}

/** FLUSH: what close(2) would tell. On file systems where it tells nothing no call is made. */
export function flush(share: Share, nodeid: number, fh: number): number {
  const handle = share.anyHandle(fh, nodeid);
  if (handle < 0) return handle;
  if (share.mounts.flags(share.handles.mount(handle)) & MountFlag.noFlush) return 0;
  const copy = native.dup(share.handles.fd(handle));
  return copy < 0 ? copy : native.close(copy);
}

/** RELEASE. */
export function release(share: Share, nodeid: number, fh: number): number {
  const handle = share.handles.find(fh, nodeid, Kind.file);
  const again = share.journal.begin();
  if (handle < 0) return again ? 0 : handle;
  if (share.session.posixLock || share.session.flock) {
    share.handles.release(handle);
    share.locks.released(nodeid, handle);
    return 0;
  }
  share.handles.release(handle);
  return 0;
}
