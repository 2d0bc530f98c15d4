/** Names: making and removing them, and reading symbolic links. */
import { arena, arenaAlloc, EMPTY_NAME, native } from 'vhost-user-ts/native';
import { ROOT_SLOT } from '../inodes.js';
import {
  AT_NO_AUTOMOUNT,
  AT_REMOVEDIR,
  AT_SYMLINK_NOFOLLOW,
  EEXIST,
  EINVAL,
  ENOENT,
  RENAME_EXCHANGE,
  RENAME_WHITEOUT,
  S_IFBLK,
  S_IFCHR,
  S_IFDIR,
  S_IFIFO,
  S_IFLNK,
  S_IFMT,
  S_IFREG,
  S_IFSOCK,
  S_ISGID,
  STATX_BTIME,
  Statx,
} from '../linux.js';
import { lookupName, unref } from './lookup.js';
import { isLocal } from './open.js';
import { setContexts } from './secctx.js';
import { LOOKUP_MASK, type Share } from './share.js';

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
  const setGid = (mode & S_ISGID) !== 0 && (mode & S_IFMT) !== S_IFDIR && !share.session.stripsSetgid;
  return credentials.enter(uid, gid, group, !isLocal(share, dir), setGid);
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
  const again = share.journal.begin();
  error = native.symlinkat(target, dirfd, name);
  share.credentials.leave(isLocal(share, dir));
  if (again && error === -EEXIST && isOurs(share, dirfd, name, S_IFLNK) && leadsTo(dirfd, name, target)) error = 0;
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
  const again = share.journal.begin();
  error = native.mknodat(dirfd, name, type | (mode & 0o7777), rdev);
  share.credentials.leave(isLocal(share, dir));
  if (again && error === -EEXIST && isOurs(share, dirfd, name, type === 0 ? S_IFREG : type)) error = 0;
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
  const again = share.journal.begin();
  error = native.mkdirat(dirfd, name, mode & 0o7777);
  share.credentials.leave(isLocal(share, dir));
  if (again && error === -EEXIST && isOurs(share, dirfd, name, S_IFDIR)) error = 0;
  return error < 0 ? error : made(share, dir, dirfd, name, AT_REMOVEDIR);
}

/** Whether what is there by this name can have been made by this request, before the process that served it ended. */
export function isOurs(share: Share, dirfd: number, name: number, type: number): boolean {
  const { attr, caller } = share;
  if (native.statx(dirfd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, LOOKUP_MASK, attr) < 0) return false;
  const uid = share.uids.toHost(caller.uid);
  return (
    ((arena.u16[(attr + Statx.mode) >> 1] as number) & S_IFMT) === type &&
    arena.u32[(attr + Statx.uid) >> 2] === share.credentials.effective(uid) &&
    share.journal.isYoung(attr, ((arena.u32[attr >> 2] as number) & STATX_BTIME) !== 0)
  );
}

/** Whether a symbolic link has this target. */
function leadsTo(dirfd: number, name: number, target: number): boolean {
  const length = arena.u8.indexOf(0, target) - target;
  const n = native.readlinkat(dirfd, name, linkBuffer, PATH_MAX);
  return n === length && arena.buffer.compare(arena.buffer, target, target + n, linkBuffer, linkBuffer + n) === 0;
}

const PATH_MAX = 4096;
const linkBuffer = arenaAlloc(PATH_MAX);

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
  if (dirfd < 0) return dirfd;
  if (flags === AT_REMOVEDIR || share.session.writebackCache) keepVictim(share, dir, dirfd, name);
  const again = share.journal.begin();
  const error = native.unlinkat(dirfd, name, flags);
  return error === -ENOENT && again ? 0 : error;
}

/**
 * Before a name goes: the inode that goes with it keeps a descriptor until the guest forgets it, because its handle dies now.
 * The guest may need it without having it open: a directory is somebody's working directory, and with the writeback cache
 * times of a file are written after its last name went (`fuse_update_ctime()`).
 */
function keepVictim(share: Share, dir: number, dirfd: number, name: number): void {
  if (native.statx(dirfd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, LOOKUP_MASK, share.attr) < 0) return;
  const word = share.attr >> 2;
  const directory = ((arena.u16[(share.attr + Statx.mode) >> 1] as number) & S_IFMT) === S_IFDIR;
  if (!directory && (arena.u32[word + (Statx.nlink >> 2)] as number) > 1) return;
  const mount = share.mountOfAttr(dir, dirfd, name);
  if (mount < 0) return;
  const slot = share.inodes.byIno(arena.u32[word + (Statx.ino >> 2)] as number, arena.u32[word + (Statx.ino >> 2) + 1] as number, mount);
  if (slot <= ROOT_SLOT) return;
  share.keep = dir;
  if (share.fd(slot) >= 0) share.pinCached(slot);
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
  if (newDirfd < 0) return newDirfd;
  if (share.session.writebackCache && flags === 0) {
    // Both descriptors are needed: one that is cached could be closed to make room for the victim's.
    const kept = native.dup(newDirfd);
    if (kept < 0) return kept;
    keepVictim(share, newDir, kept, newName);
    const again = share.fd(dir);
    const error = again < 0 ? again : move(share, again, name, kept, newName, flags);
    native.close(kept);
    return error;
  }
  return move(share, dirfd, name, newDirfd, newName, flags);
}

function move(share: Share, dirfd: number, name: number, newDirfd: number, newName: number, flags: number): number {
  const { journal, attr } = share;
  const target = () => native.statx(newDirfd, newName, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, LOOKUP_MASK, attr);
  // These leave something by the old name: which inode is where tells whether it was done.
  const leaves = (flags & (RENAME_EXCHANGE | RENAME_WHITEOUT)) !== 0;
  const again = journal.hasBegun;
  if (leaves && again && target() === 0 && journal.isMoved(attr)) return 0;
  if (leaves && !again && native.statx(dirfd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, LOOKUP_MASK, attr) === 0) journal.moved = attr;
  journal.begin();
  const error = native.renameat2(dirfd, name, newDirfd, newName, flags);
  return error === -ENOENT && again && target() === 0 ? 0 : error;
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
  const again = share.journal.begin();
  const error = native.linkProc(share.procfd, fd, dirfd, newName);
  if (error < 0 && !(again && error === -EEXIST)) return error;
  const entry = lookupName(share, dir, dirfd, newName, false);
  if (error < 0 && entry > 0 && entry !== slot) {
    unref(share, entry, 1);
    return error;
  }
  return Math.min(entry, 0);
}
