/**
 * IOCTL: file flags and attributes (lsattr, chattr, xfs_io), the only commands that are passed on. Linux asks by
 * `fuse_fileattr_get()` and `fuse_fileattr_set()` with sizes of its own choice; kernels before 5.13 with those of the command.
 */
import { arena, native } from 'vhost-user-ts/native';
import { EINVAL, ENOTTY, EOPNOTSUPP } from '../linux.js';
import type { Share } from './share.js';

/** linux/fs.h, as 64-bit programs have them; FS_IOC_GETFLAGS and SETFLAGS transfer an int all the same. */
const FS_IOC_GETFLAGS = 0x80086601;
const FS_IOC_SETFLAGS = 0x40086602;
const FS_IOC_FSGETXATTR = 0x801c581f;
const FS_IOC_FSSETXATTR = 0x401c5820;

/** struct fsxattr { u32 xflags; u32 extsize; u32 nextents; u32 projid; u32 cowextsize; u8 pad[8]; } */
const FSXATTR_BYTES = 28;
const FSXATTR_EXTSIZE = 4;
const FSXATTR_PROJID = 12;
const FSXATTR_COWEXTSIZE = 16;

/**
 * Flags that a guest may change. Left out are those that concern the host's disk and not the file (project inheritance, by which
 * a guest would leave its quota; DAX; the layout on disk). Whether a file may be made immutable or append-only is for the
 * host's kernel to say: it asks for CAP_LINUX_IMMUTABLE, which the daemon has only with `--modcaps=+linux_immutable`.
 */
const CHANGEABLE_FLAGS =
  0x00000004 | // FS_COMPR_FL
  0x00000008 | // FS_SYNC_FL
  0x00000010 | // FS_IMMUTABLE_FL
  0x00000020 | // FS_APPEND_FL
  0x00000040 | // FS_NODUMP_FL
  0x00000080 | // FS_NOATIME_FL
  0x00000400 | // FS_NOCOMP_FL
  0x00010000 | // FS_DIRSYNC_FL
  0x00020000 | // FS_TOPDIR_FL
  0x00800000; //  FS_NOCOW_FL
const CHANGEABLE_XFLAGS =
  0x00000008 | // FS_XFLAG_IMMUTABLE
  0x00000010 | // FS_XFLAG_APPEND
  0x00000020 | // FS_XFLAG_SYNC
  0x00000040 | // FS_XFLAG_NOATIME
  0x00000080; //  FS_XFLAG_NODUMP

/**
 * IOCTL on an open file or directory: `input` bytes at arena `data`, overwritten by the result.
 * @returns the bytes of output; -ENOTTY for every other command, -EOPNOTSUPP for a change that is not let through
 */
export function ioctl(share: Share, nodeid: number, fh: number, command: number, data: number, input: number, output: number): number {
  const handle = share.anyHandle(fh, nodeid);
  if (handle < 0) return handle;
  const fd = share.handles.fd(handle);
  switch (command) {
    case FS_IOC_GETFLAGS:
      if (input !== 0 || !isFlags(output)) return -EINVAL;
      arena.u32[(data >> 2) + 1] = 0;
      return answered(native.ioctl(fd, command, data), output);
    case FS_IOC_FSGETXATTR:
      if (input !== 0 || output !== FSXATTR_BYTES) return -EINVAL;
      return answered(native.ioctl(fd, command, data), output);
    case FS_IOC_SETFLAGS:
      if (output !== 0 || !isFlags(input)) return -EINVAL;
      return setFlags(share, fd, data);
    case FS_IOC_FSSETXATTR:
      if (output !== 0 || input !== FSXATTR_BYTES) return -EINVAL;
      return setAttributes(share, fd, data);
    default:
      return -ENOTTY;
  }
}

/** Whether a command changes something, whatever becomes of it. */
export function changes(command: number): boolean {
  return command === FS_IOC_SETFLAGS || command === FS_IOC_FSSETXATTR;
}

function isFlags(bytes: number): boolean {
  return bytes === 4 || bytes === 8;
}

function answered(result: number, bytes: number): number {
  return result < 0 ? result : bytes;
}

function setFlags(share: Share, fd: number, data: number): number {
  const error = native.ioctl(fd, FS_IOC_GETFLAGS, share.probe);
  if (error < 0) return error;
  const changed = difference(share, data, 0);
  if ((changed & ~CHANGEABLE_FLAGS) !== 0) return -EOPNOTSUPP;
  return changed === 0 ? 0 : native.ioctl(fd, FS_IOC_SETFLAGS, data);
}

function setAttributes(share: Share, fd: number, data: number): number {
  const error = native.ioctl(fd, FS_IOC_FSGETXATTR, share.probe);
  if (error < 0) return error;
  for (const field of [FSXATTR_EXTSIZE, FSXATTR_PROJID, FSXATTR_COWEXTSIZE]) if (difference(share, data, field) !== 0) return -EOPNOTSUPP;
  const changed = difference(share, data, 0);
  if ((changed & ~CHANGEABLE_XFLAGS) !== 0) return -EOPNOTSUPP;
  return changed === 0 ? 0 : native.ioctl(fd, FS_IOC_FSSETXATTR, data);
}

/** Bits in which the word at `offset` of what is wanted differs from what there is (in `share.probe`). */
function difference(share: Share, data: number, offset: number): number {
  return (arena.u32[(data + offset) >> 2] as number) ^ (arena.u32[(share.probe + offset) >> 2] as number);
}
