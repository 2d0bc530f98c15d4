/** Extended attributes, on the inode's O_PATH descriptor by way of /proc/self/fd. Names go through `--xattrmap`. */
import { arena, EMPTY_NAME, native } from 'vhost-user-ts/native';
import {
  AT_EMPTY_PATH,
  EEXIST,
  ENODATA,
  ENOSYS,
  EOPNOTSUPP,
  EPERM,
  FUSE_SETXATTR_ACL_KILL_SGID,
  S_ISGID,
  STATX_BASIC_STATS,
  Statx,
} from '../linux.js';
import type { Share } from './share.js';

const { u8, u16 } = arena;

const NAME_ROOM = 1024;

const ACL_ACCESS = Buffer.from('system.posix_acl_access\0');
const ACL_DEFAULT = Buffer.from('system.posix_acl_default\0');
const CAPABILITY = Buffer.from('security.capability\0');

/** GETXATTR. */
export function getxattr(share: Share, nodeid: number, name: number, out: number, size: number): number {
  if (!share.xattr) return -ENOSYS;
  const hostName = mapName(share, name);
  if (hostName < 0) return hostName === -EPERM ? -ENODATA : hostName;
  const fd = inodeFd(share, nodeid);
  return fd < 0 ? fd : native.getxattr(share.procfd, fd, hostName, out, size);
}

/** SETXATTR. */
export function setxattr(
  share: Share,
  nodeid: number,
  name: number,
  value: number,
  size: number,
  flags: number,
  extraFlags: number,
): number {
  if (!share.xattr) return -ENOSYS;
  const hostName = mapName(share, name);
  if (hostName < 0) return hostName;
  const fd = inodeFd(share, nodeid);
  if (fd < 0) return fd;
  // The kernel would do this for a caller without CAP_FSETID who is not in the group; the guest's has judged that.
  if (extraFlags & FUSE_SETXATTR_ACL_KILL_SGID && share.session.posixAcl && equal(hostName, ACL_ACCESS)) {
    const error = clearSetGid(share, fd);
    if (error < 0) return error;
  }
  const again = flags !== 0 && share.journal.begin();
  const error = native.setxattr(share.procfd, fd, hostName, value, size, flags);
  return error === -EEXIST && again ? native.setxattr(share.procfd, fd, hostName, value, size, 0) : error;
}

/** LISTXATTR. */
export function listxattr(share: Share, nodeid: number, out: number, size: number): number {
  if (!share.xattr) return -ENOSYS;
  const fd = inodeFd(share, nodeid);
  if (fd < 0) return fd;
  const length = native.listxattr(share.procfd, fd, out, size);
  if (length <= 0 || size === 0) return length;
  const mapped = share.xattrmap ? share.xattrmap.listToGuest(u8, out, length) : length;
  return share.session.posixAcl ? mapped : hideAcl(out, mapped);
}

/** REMOVEXATTR. */
export function removexattr(share: Share, nodeid: number, name: number): number {
  if (!share.xattr) return -ENOSYS;
  const hostName = mapName(share, name);
  if (hostName < 0) return hostName;
  const fd = inodeFd(share, nodeid);
  if (fd < 0) return fd;
  const again = share.journal.begin();
  const error = native.removexattr(share.procfd, fd, hostName);
  return error === -ENODATA && again ? 0 : error;
}

/**
 * The host's name for one of the guest's, at an arena offset; -EOPNOTSUPP for access control lists that were not agreed on
 * (the guest would take the host's for its own, without the rules that go with them).
 */
export function mapName(share: Share, name: number): number {
  if (!share.session.posixAcl && (equal(name, ACL_ACCESS) || equal(name, ACL_DEFAULT))) return -EOPNOTSUPP;
  if (!share.xattrmap) return name;
  const length = share.xattrmap.toHost(u8, name, share.nameBuffer, NAME_ROOM);
  return length < 0 ? length : share.nameBuffer;
}

/**
 * Removes the file capabilities that the guest sees, where the map keeps them under another name: the kernel does it for
 * "security.capability" itself on every write, truncation and chown.
 */
export function clearCapabilities(share: Share, fd: number): void {
  if (share.mappedCapability !== 0) native.removexattr(share.procfd, fd, share.mappedCapability);
}

/** Arena offset of the host's name of the guest's "security.capability" when that is another one, else 0. Found once. */
export function findMappedCapability(share: Share, at: number): number {
  if (!share.xattr || !share.xattrmap) return 0;
  u8.set(CAPABILITY, share.nameBuffer);
  const length = share.xattrmap.toHost(u8, share.nameBuffer, at, NAME_ROOM);
  return length < 0 || equal(at, CAPABILITY) ? 0 : at;
}

function inodeFd(share: Share, nodeid: number): number {
  const slot = share.inodes.find(nodeid);
  return slot < 0 ? slot : share.fd(slot);
}

function clearSetGid(share: Share, fd: number): number {
  const error = native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, STATX_BASIC_STATS, share.probe);
  if (error < 0) return error;
  const mode = (u16[(share.probe + Statx.mode) >> 1] as number) & 0o7777;
  return mode & S_ISGID ? native.chmodProc(share.procfd, fd, mode & ~S_ISGID) : 0;
}

/** Takes the names of access control lists out of a list. */
function hideAcl(list: number, length: number): number {
  let to = list;
  let at = list;
  const end = list + length;
  while (at < end) {
    let next = at;
    while (next < end && u8[next] !== 0) next++;
    next++;
    if (!equal(at, ACL_ACCESS) && !equal(at, ACL_DEFAULT)) {
      if (to !== at) u8.copyWithin(to, at, next);
      to += next - at;
    }
    at = next;
  }
  return to - list;
}

/** Whether NUL-terminated bytes of the arena are these (with their NUL). */
function equal(at: number, bytes: Uint8Array): boolean {
  for (let i = 0; i < bytes.length; i++) if (u8[at + i] !== bytes[i]) return false;
  return true;
}
