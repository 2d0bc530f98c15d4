/** Names: making and removing them, and reading symbolic links. */
import { EMPTY_NAME, native } from 'vhost-user-ts/native';
import { AT_REMOVEDIR, EINVAL, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK, S_ISGID } from '../linux.js';
import { lookupName, unref } from './lookup.js';
import { isLocal } from './open.js';
import { setContexts } from './secctx.js';
import type { Share } from './share.js';

/** No umask applies. */
const NO_UMASK = -1;

/** Takes the caller's ids and umask for a create-type operation in a directory; `credentials.leave` follows it. */
export function enterCaller(share: Share, dir: number, mode: number, umask: number): number {
  const { caller, credentials } = share;
  const uid = share.uids.toHost(caller.uid);
  if (uid < 0) return uid;
  const gid = share.gids.toHost(caller.gid);
  if (gid < 0) return gid;
  const group = caller.supplementaryGid < 0 ? -1 : share.gids.toHost(caller.supplementaryGid);
  if (group < -1) return group;
  if (umask !== NO_UMASK) credentials.setUmask(share.session.dontMask ? umask & 0o777 : 0);
  return credentials.enter(uid, gid, group, !isLocal(share, dir), (mode & S_ISGID) !== 0 && (mode & S_IFMT) !== S_IFDIR);
}

/** READLINK; a target that fills all of `size` was cut off. */
export function readlink(share: Share, nodeid: number, out: number, size: number): number {
  const slot = share.inodes.find(nodeid);
  if (slot < 0) return slot;
  if (share.type(slot) !== S_IFLNK) return -EINVAL;
  const fd = share.fd(slot);
  return fd < 0 ? fd : native.readlinkat(fd, EMPTY_NAME, out, size);
}

/** SYMLINK. */
export function symlink(share: Share, parent: number, name: number, target: number): number {
  const dir = share.directory(parent);
  if (dir < 0) return dir;
  const dirfd = share.fd(dir);
  if (dirfd < 0) return dirfd;
  let error = enterCaller(share, dir, 0, NO_UMASK);
  if (error < 0) return error;
  error = native.symlinkat(target, dirfd, name);
  share.credentials.leave(isLocal(share, dir));
  return error < 0 ? error : made(share, dir, dirfd, name, 0);
}

/** MKNOD: files, FIFOs, sockets and devices; `rdev` has the kernel's encoding on both sides (new_encode_dev()). */
export function mknod(share: Share, parent: number, name: number, mode: number, umask: number, rdev: number): number {
  const type = mode & S_IFMT;
  if (type !== 0 && type !== S_IFREG && type !== S_IFIFO && type !== S_IFSOCK && type !== S_IFCHR && type !== S_IFBLK) return -EINVAL;
  const dir = share.directory(parent);
  if (dir < 0) return dir;
  const dirfd = share.fd(dir);
  if (dirfd < 0) return dirfd;
  let error = enterCaller(share, dir, mode, umask);
  if (error < 0) return error;
  error = native.mknodat(dirfd, name, type | (mode & 0o7777), rdev);
  share.credentials.leave(isLocal(share, dir));
  return error < 0 ? error : made(share, dir, dirfd, name, 0);
}

/** MKDIR. */
export function mkdir(share: Share, parent: number, name: number, mode: number, umask: number): number {
  const dir = share.directory(parent);
  if (dir < 0) return dir;
  const dirfd = share.fd(dir);
  if (dirfd < 0) return dirfd;
  let error = enterCaller(share, dir, S_IFDIR | mode, umask);
  if (error < 0) return error;
  error = native.mkdirat(dirfd, name, mode & 0o7777);
  share.credentials.leave(isLocal(share, dir));
  return error < 0 ? error : made(share, dir, dirfd, name, AT_REMOVEDIR);
}

/** Tells the guest of a new name; takes it away again when its security context cannot be set. */
function made(share: Share, dir: number, dirfd: number, name: number, removeFlags: number): number {
  const slot = lookupName(share, dir, dirfd, name, true);
  if (slot < 0) return slot;
  if (share.caller.securityContextCount === 0) return 0;
  const fd = share.fd(slot);
  const error = fd < 0 ? fd : setContexts(share, fd);
  if (error < 0) {
    native.unlinkat(dirfd, name, removeFlags);
    unref(share, slot, 1);
  }
  return error;
}

/** UNLINK. */
export function unlink(share: Share, parent: number, name: number): number {
  return remove(share, parent, name, 0);
}

/** RMDIR. */
export function rmdir(share: Share, parent: number, name: number): number {
  return remove(share, parent, name, AT_REMOVEDIR);
}

function remove(share: Share, parent: number, name: number, flags: number): number {
  const dir = share.directory(parent);
  if (dir < 0) return dir;
  const dirfd = share.fd(dir);
  return dirfd < 0 ? dirfd : native.unlinkat(dirfd, name, flags);
}

/** RENAME and RENAME2. */
export function rename(share: Share, parent: number, name: number, newParent: number, newName: number, flags: number): number {
  const dir = share.directory(parent);
  if (dir < 0) return dir;
  const newDir = share.directory(newParent);
  if (newDir < 0) return newDir;
  const dirfd = share.fd(dir);
  if (dirfd < 0) return dirfd;
  share.keep = dir;
  const newDirfd = share.fd(newDir);
  return newDirfd < 0 ? newDirfd : native.renameat2(dirfd, name, newDirfd, newName, flags);
}

/** LINK. */
export function link(share: Share, nodeid: number, newParent: number, newName: number): number {
  const slot = share.inodes.find(nodeid);
  if (slot < 0) return slot;
  const dir = share.directory(newParent);
  if (dir < 0) return dir;
  const fd = share.fd(slot);
  if (fd < 0) return fd;
  share.keep = slot;
  const dirfd = share.fd(dir);
  if (dirfd < 0) return dirfd;
  const error = native.linkProc(share.procfd, fd, dirfd, newName);
  if (error < 0) return error;
  const entry = lookupName(share, dir, dirfd, newName, false);
  return Math.min(entry, 0);
}
