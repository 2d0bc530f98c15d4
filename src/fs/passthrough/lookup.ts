/**
 * From names to inodes: LOOKUP, and the same for what an operation has just made.
 *
 * An inode that the guest knows is recognised by one statx: same device, number and mount, and the same birth time, which tells
 * a number that the file system has given to another file since. Only for an unknown one more is asked: its handle, by which
 * it can be opened later, or a descriptor that is kept.
 */
import { arena, EMPTY_NAME, native } from 'vhost-user-ts/native';
import { Flag, HANDLE_MAX, Inode, ROOT_NODEID, ROOT_SLOT, SHIFT } from '../inodes.js';
import {
  AT_EMPTY_PATH,
  AT_NO_AUTOMOUNT,
  AT_SYMLINK_NOFOLLOW,
  EAGAIN,
  EEXIST,
  ENFILE,
  ENOENT,
  EOPNOTSUPP,
  EOVERFLOW,
  ESTALE,
  FUSE_ATTR_SUBMOUNT,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_PATH,
  S_IFDIR,
  S_IFMT,
  Statx,
} from '../linux.js';
import { MountFlag } from '../mounts.js';
import { LOOKUP_MASK, type Share } from './share.js';

const { u8, u16, u32 } = arena;

/** Tries when the name means something else each time we look (a host process that replaces it in a loop). */
const ATTEMPTS = 16;
/** Time in which two files can get the same birth time: the kernel's clock for it ticks every 1 to 10 ms. */
const YOUNG_MS = 50;
/** No tree is deeper than a path is long. */
const DEPTH = 2048;
const DOT = 0x2e;

/** Where {@link known} says that the handles must be compared to tell. */
const UNSURE = -1;

/** LOOKUP. */
export function lookup(share: Share, parent: number, name: number, nameLength: number): number {
  if (nameLength === 1 && u8[name] === DOT) return Math.min(lookupSelf(share, parent), 0);
  const dir = share.directory(parent);
  if (dir < 0) return dir === -ENOENT ? -ESTALE : dir; // see lookupSelf
  const dirfd = share.fd(dir);
  if (dirfd < 0) return dirfd;
  share.keep = dir;
  const up = nameLength === 2 && u8[name] === DOT && u8[name + 1] === DOT;
  const slot = up ? lookupParent(share, dir, dirfd) : lookupName(share, dir, dirfd, name, false);
  return Math.min(slot, 0);
}

/** FORGET; a count beyond what the guest holds forgets the inode. */
export function forget(share: Share, nodeid: number, nlookup: number): void {
  const slot = share.inodes.find(nodeid);
  const held = slot > ROOT_SLOT ? (share.inodes.f64[((slot << SHIFT) + Inode.nlookup) >> 1] as number) : 0;
  // Also for a nodeid that is not known: it may be unknown because this was done already.
  const left = share.journal.counted(held - nlookup);
  if (slot > ROOT_SLOT && !Number.isNaN(left)) unref(share, slot, held - left);
}

/** Takes references from an inode, the last ones with the inode. */
export function unref(share: Share, slot: number, nlookup: number): void {
  const at = ((slot << SHIFT) + Inode.nlookup) >> 1;
  const held = share.inodes.f64[at] as number;
  if (held === 0) return; // forgotten already, and kept
  const left = held - nlookup;
  if (left > 0) {
    share.inodes.f64[at] = left;
    return;
  }
  if (share.watcher !== null) share.watcher.forgotten(share.inodes.nodeid(slot));
  if (share.keepForgotten(slot)) return;
  share.closeFd(slot);
  share.inodes.remove(slot);
}

/**
 * Looks up `name` in a directory and counts one reference for the guest; `entry` and `attr` are filled.
 * @param dir slot of the directory, open as `dirfd`
 * @param made the name was just made here: an inode of its number that we know without holding it open must be an older one
 * @returns the inode's slot, or -errno
 */
export function lookupName(share: Share, dir: number, dirfd: number, name: number, made: boolean): number {
  const inodes = share.inodes;
  share.keep = dir;
  for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
    let error = native.statx(dirfd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, LOOKUP_MASK, share.attr);
    if (error < 0) return error;
    const mount = share.mountOfAttr(dir, dirfd, name);
    if (mount === -EAGAIN) continue;
    if (mount < 0) return mount;
    const word = (share.attr + Statx.ino) >> 2;
    const inoLow = u32[word] as number;
    const inoHigh = u32[word + 1] as number;
    let slot = inodes.byIno(inoLow, inoHigh, mount);
    if (slot !== 0) {
      const verdict = known(share, slot, mount, made);
      if (verdict > 0) return found(share, slot, dir);
      if (verdict === 0) {
        inodes.retire(slot);
        slot = 0;
      }
    }
    if (share.handlesOn(mount) && share.mounts.flags(mount) & MountFlag.inoInHandle) {
      error = share.nameToHandle(dirfd, name, 0, mount);
      if (error === 0) {
        if (!handleNames(share.handle, inoLow, inoHigh)) continue;
        if (slot !== 0 && inodes.sameHandle(slot, share.handle)) return found(share, slot, dir);
        if (slot !== 0) inodes.retire(slot);
        if ((u32[share.handle >> 2] as number) <= HANDLE_MAX) {
          slot = enter(share, mount, true);
          return slot < 0 ? slot : found(share, slot, dir);
        }
      } else if (error === -EAGAIN) {
        continue;
      } else if (error !== -EOPNOTSUPP && error !== -EOVERFLOW) {
        return error;
      }
    }
    // No handle to be had, or none that tells whose it is: all is asked of one descriptor.
    if (!share.room()) return -ENFILE;
    const fd = native.openat(dirfd, name, O_PATH | O_NOFOLLOW, 0);
    return fd < 0 ? fd : lookupFd(share, dir, fd, true, made);
  }
  return -ESTALE;
}

/**
 * As {@link lookupName}, for an object that is open as `fd`: nothing can come between.
 * @param path `fd` is an O_PATH descriptor and goes to the inode (or is closed); otherwise it stays the caller's
 */
export function lookupFd(share: Share, dir: number, fd: number, path: boolean, made: boolean): number {
  const slot = enterFd(share, dir, fd, path, made);
  if (path && share.inodes.i32[(Math.max(slot, 0) << SHIFT) + Inode.fd] !== fd) native.close(fd);
  return slot;
}

function enterFd(share: Share, dir: number, fd: number, path: boolean, made: boolean): number {
  const inodes = share.inodes;
  let error = native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, share.attr);
  if (error < 0) return error;
  const mount = share.mountOfFd(fd);
  if (mount < 0) return mount;
  const word = (share.attr + Statx.ino) >> 2;
  let slot = inodes.byIno(u32[word] as number, u32[word + 1] as number, mount);
  if (slot !== 0) {
    const verdict = known(share, slot, mount, made);
    if (verdict > 0) return found(share, slot, dir);
    if (verdict === 0) {
      inodes.retire(slot);
      slot = 0;
    }
  }
  if (share.handlesOn(mount)) {
    error = share.nameToHandle(fd, EMPTY_NAME, AT_EMPTY_PATH, mount);
    if (error === 0) {
      if (slot !== 0 && inodes.sameHandle(slot, share.handle)) return found(share, slot, dir);
      if (slot !== 0) inodes.retire(slot);
      if ((u32[share.handle >> 2] as number) <= HANDLE_MAX) {
        slot = enter(share, mount, true);
        if (slot < 0) return slot;
        if (path) share.cacheFd(slot, fd);
        return found(share, slot, dir);
      }
    } else if (error !== -EOPNOTSUPP && error !== -EOVERFLOW) {
      return error;
    }
  }
  if (slot !== 0) inodes.retire(slot);
  if (share.mandatoryHandles) return -EOPNOTSUPP;
  if (!share.room()) return -ENFILE;
  const kept = path ? fd : native.reopen(share.procfd, fd, O_PATH);
  if (kept < 0) return kept;
  slot = enter(share, mount, false);
  if (slot < 0) {
    if (!path) native.close(kept);
    return slot;
  }
  share.pin(slot, kept);
  return found(share, slot, dir);
}

/**
 * Makes an inode known under the nodeid that the guest has for it from another daemon (live migration).
 * @param fd an O_PATH descriptor of it, which goes to the inode (or is closed) when all is well
 * @returns the slot; 0 when that is no nodeid or it is taken; -EEXIST when the inode is known under another; or -errno
 */
export function restoreFd(share: Share, nodeid: number, nlookup: number, fd: number): number {
  const inodes = share.inodes;
  const error = native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, share.attr);
  if (error < 0) return error;
  const mount = share.mountOfFd(fd);
  if (mount < 0) return mount;
  const word = share.attr >> 2;
  const inoLow = u32[word + (Statx.ino >> 2)] as number;
  const inoHigh = u32[word + (Statx.ino >> 2) + 1] as number;
  if (inodes.byIno(inoLow, inoHigh, mount) !== 0) return -EEXIST;
  const handle =
    share.handlesOn(mount) &&
    share.nameToHandle(fd, EMPTY_NAME, AT_EMPTY_PATH, mount) === 0 &&
    (u32[share.handle >> 2] as number) <= HANDLE_MAX;
  if (!handle && share.mandatoryHandles) return -EOPNOTSUPP;
  if (!handle && !share.room()) return -ENFILE;
  const slot = inodes.insertAs(nodeid, inoLow, inoHigh, mount, (u16[(share.attr + Statx.mode) >> 1] as number) & S_IFMT);
  if (slot === 0) return 0;
  describeBirth(share, slot, handle);
  inodes.f64[((slot << SHIFT) + Inode.nlookup) >> 1] = nlookup;
  if (handle) native.close(fd);
  else share.pin(slot, fd);
  if (nlookup === 0 && !share.keepForgotten(slot)) {
    share.closeFd(slot);
    inodes.remove(slot);
  }
  return slot;
}

/** As {@link restoreFd}, for an inode that is not to be had: whatever the guest asks of it ends with ESTALE. False for no nodeid. */
export function restoreLost(share: Share, nodeid: number, nlookup: number, type: number): boolean {
  const slot = share.inodes.insertAs(nodeid, 0, 0, share.mountOf(ROOT_SLOT), type);
  if (slot === 0) return false;
  share.inodes.retire(slot);
  share.inodes.f64[((slot << SHIFT) + Inode.nlookup) >> 1] = nlookup;
  return true;
}

/**
 * Whether the inode that we know by this number is the one in `attr`.
 * @returns 1 yes, 0 no, {@link UNSURE} when only its handle tells
 */
function known(share: Share, slot: number, mount: number, made: boolean): number {
  const inodes = share.inodes;
  const at = slot << SHIFT;
  const flags = inodes.u32[at + Inode.flags] as number;
  // A descriptor holds the inode: its number cannot have gone to another one.
  if (flags & Flag.pinned) return 1;
  if (inodes.u32[at + Inode.type] !== ((u16[(share.attr + Statx.mode) >> 1] as number) & S_IFMT)) return 0;
  if (inodes.u32[at + Inode.handleBytes] === 0) return 0;
  if ((share.mounts.flags(mount) & MountFlag.birthTime) === 0) return UNSURE;
  const birth = (share.attr + Statx.btime) >> 2;
  if (inodes.u32[at + Inode.btimeSec] !== u32[birth] || inodes.u32[at + Inode.btimeNsec] !== u32[birth + 2]) return 0;
  if (made) return UNSURE;
  if ((flags & Flag.young) === 0) return 1;
  // Its handle is compared this time; when it is found the same, it has outlived the tick it was born in.
  if (!isYoung(birth)) inodes.u32[at + Inode.flags] = flags & ~Flag.young;
  return UNSURE;
}

function isYoung(birth: number): boolean {
  return Date.now() - ((u32[birth] as number) * 1000 + (u32[birth + 2] as number) / 1e6) < YOUNG_MS;
}

/** Makes a record of what is in `attr`, with the handle that is in `share.handle` or none. Returns its slot, or -ENFILE. */
function enter(share: Share, mount: number, handle: boolean): number {
  const inodes = share.inodes;
  const word = share.attr >> 2;
  const type = (u16[(share.attr + Statx.mode) >> 1] as number) & S_IFMT;
  const slot = inodes.insert(u32[word + (Statx.ino >> 2)] as number, u32[word + (Statx.ino >> 2) + 1] as number, mount, type);
  if (slot === 0) return -ENFILE;
  describeBirth(share, slot, handle);
  return slot;
}

/** Notes by what an inode is told from the next one of its number: its birth time, in `attr`, and its handle, if it has one. */
function describeBirth(share: Share, slot: number, handle: boolean): void {
  const inodes = share.inodes;
  const birth = (share.attr + Statx.btime) >> 2;
  const at = slot << SHIFT;
  inodes.u32[at + Inode.btimeSec] = u32[birth] as number;
  inodes.u32[at + Inode.btimeNsec] = u32[birth + 2] as number;
  if (!handle) return;
  inodes.setHandle(slot, share.handle);
  if (isYoung(birth)) inodes.u32[at + Inode.flags] = (inodes.u32[at + Inode.flags] as number) | Flag.young;
}

/** Counts one reference and tells the guest. */
function found(share: Share, slot: number, dir: number): number {
  const inodes = share.inodes;
  const at = slot << SHIFT;
  const held = inodes.f64[(at + Inode.nlookup) >> 1] as number;
  inodes.f64[(at + Inode.nlookup) >> 1] = held + 1;
  if (held === 0 && inodes.u32[at + Inode.type] === S_IFDIR && share.watcher?.known(inodes.nodeid(slot))) {
    // What changed before the mark was set is in the attributes, what changes after it is reported.
    const fd = share.fd(slot);
    if (fd >= 0) native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, share.attr);
  }
  const entry = share.entry;
  entry.nodeid = inodes.nodeid(slot);
  entry.attrFlags = 0;
  entry.volatile = false;
  if (
    share.session.submounts &&
    inodes.u32[at + Inode.type] === S_IFDIR &&
    inodes.u32[at + Inode.mount] !== inodes.u32[(dir << SHIFT) + Inode.mount]
  ) {
    entry.attrFlags = FUSE_ATTR_SUBMOUNT;
  }
  share.translateAttr();
  return slot;
}

/** Whether a handle is of the inode with this number, on a file system that writes the number into it (`MountFlag.inoInHandle`). */
function handleNames(handle: number, inoLow: number, inoHigh: number): boolean {
  const word = handle >> 2;
  const a = u32[word + 2] as number;
  const b = u32[word + 3] as number;
  switch (u32[word + 1]) {
    case 0x01: // FILEID_INO32_GEN: ext4, f2fs, xfs { ino, generation }; shmem_encode_fh() { generation, ino, ino >> 32 }
      return u32[word] === 12 ? b === inoLow && u32[word + 4] === inoHigh : a === inoLow && inoHigh === 0;
    case 0x81: // XFS_FILEID_INO32_GEN | XFS_FILEID_TYPE_64FLAG { u64 ino, generation }
    case 0x4d: // FILEID_BTRFS_WITHOUT_PARENT { u64 objectid, … }
      return a === inoLow && b === inoHigh;
    default:
      return false;
  }
}

/** Same number, device and mount in two struct statx (word offsets). */
function sameObject(a: number, b: number): boolean {
  const ino = Statx.ino >> 2;
  const dev = Statx.devMajor >> 2;
  const mount = Statx.mountId >> 2;
  return (
    u32[a + ino] === u32[b + ino] &&
    u32[a + ino + 1] === u32[b + ino + 1] &&
    u32[a + dev] === u32[b + dev] &&
    u32[a + dev + 1] === u32[b + dev + 1] &&
    u32[a + mount] === u32[b + mount]
  );
}

/**
 * As {@link lookup}, for an inode that the guest knows already, whatever its name is; of one that the host has removed only the type is
 * known.
 */
export function lookupAgain(share: Share, nodeid: number): number {
  const slot = share.inodes.find(nodeid);
  if (slot < 0) return slot;
  const fd = share.fd(slot);
  const error = fd < 0 ? fd : native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, share.attr);
  if (error === -ESTALE) {
    u8.fill(0, share.attr, share.attr + Statx.bytes);
    u32[(share.attr + Statx.ino) >> 2] = share.inodes.u32[slot << SHIFT] as number;
    u32[(share.attr + Statx.ino + 4) >> 2] = share.inodes.u32[(slot << SHIFT) + Inode.inoHigh] as number;
    u16[(share.attr + Statx.mode) >> 1] = share.type(slot);
  } else if (error < 0) return error;
  found(share, slot, slot);
  return 0;
}

/**
 * LOOKUP ".": the inode itself, of any type (`fuse_get_dentry()`). The guest may have forgotten it: {@link Share.keepForgotten}.
 * @returns its slot; -ESTALE when it is not known any more: ENOENT would be about a name, and be kept by a guest that may
 */
function lookupSelf(share: Share, nodeid: number): number {
  const slot = share.inodes.find(nodeid);
  if (slot < 0) return -ESTALE;
  const fd = share.fd(slot);
  if (fd < 0) return fd;
  const error = native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, share.attr);
  return error < 0 ? error : found(share, slot, slot);
}

/**
 * LOOKUP "..": the parent, but nothing above the root: a directory that was moved out of the share has a parent outside it.
 * Such a parent is answered with -ESTALE.
 */
function lookupParent(share: Share, dir: number, dirfd: number): number {
  if (dir === ROOT_SLOT) return lookupSelf(share, ROOT_NODEID);
  if (!share.room()) return -ENFILE;
  const fd = native.openat(dirfd, share.dotDot, O_PATH | O_DIRECTORY | O_NOFOLLOW, 0);
  if (fd < 0) return fd;
  const error = belowRoot(share, fd);
  if (error < 0) {
    native.close(fd);
    return error;
  }
  return lookupFd(share, dir, fd, true, false);
}

/** 0 when a directory is the root or the way up from it meets the root; -ESTALE when it does not. */
function belowRoot(share: Share, start: number): number {
  const { attr, probe } = share;
  const root = share.inodes.i32[(ROOT_SLOT << SHIFT) + Inode.fd] as number;
  let error = native.statx(root, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, probe);
  let fd = start;
  for (let depth = 0; error === 0; depth++) {
    error = native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, attr);
    if (error < 0 || sameObject(attr >> 2, probe >> 2)) break;
    const up = depth < DEPTH ? native.openat(fd, share.dotDot, O_PATH | O_DIRECTORY | O_NOFOLLOW, 0) : -ESTALE;
    if (up < 0) {
      error = up;
      break;
    }
    const before = u32[(attr + Statx.ino) >> 2] as number;
    const beforeMount = u32[(attr + Statx.mountId) >> 2] as number;
    if (fd !== start) native.close(fd);
    fd = up;
    error = native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, attr);
    // The top of everything is its own parent.
    if (error === 0 && before === u32[(attr + Statx.ino) >> 2] && beforeMount === u32[(attr + Statx.mountId) >> 2]) error = -ESTALE;
  }
  if (fd !== start) native.close(fd);
  return error;
}
