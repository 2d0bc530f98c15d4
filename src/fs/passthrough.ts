/**
 * The passthrough file system: a directory of the host as {@link FileSystem}. The operations are in `passthrough/`, one file a
 * concept; here they are put together.
 */
import { arenaAlloc } from 'vhost-user-ts/native';
import type { Caller, DirectorySink, Entry, FileSystem, Lock, Opened, SessionOptions, SetAttr } from './filesystem.js';
import { Kind } from './handles.js';
import { EAGAIN, EINVAL, ENOENT, EROFS, O_ACCMODE, O_EXCL, O_RDONLY, O_TRUNC, W_OK } from './linux.js';
import * as attr from './passthrough/attr.js';
import * as dir from './passthrough/dir.js';
import * as fileflags from './passthrough/fileflags.js';
import * as io from './passthrough/io.js';
import * as link from './passthrough/link.js';
import * as look from './passthrough/lookup.js';
import * as open from './passthrough/open.js';
import type { PassthroughOptions } from './passthrough/options.js';
import { Share } from './passthrough/share.js';
import * as xattr from './passthrough/xattr.js';

export type { PassthroughOptions } from './passthrough/options.js';

/** Opens a directory as a file system; one that refuses every modification when the options say so. */
export function openPassthrough(options: PassthroughOptions): PassthroughFs {
  return options.readonly ? new ReadOnlyFs(options) : new PassthroughFs(options);
}

/** The operations on a shared directory. */
export class PassthroughFs implements FileSystem {
  /** State and stores; the host watcher looks inodes up in them. */
  readonly share: Share;
  readonly caller: Caller;
  readonly entry: Entry;
  readonly opened: Opened;
  readonly attr: number;
  readonly statfsBuffer: number;

  /** @throws Error when the directory cannot be opened or an option is wrong; see {@link Share}. */
  constructor(options: PassthroughOptions) {
    this.share = new Share(options);
    this.share.mappedCapability = xattr.findMappedCapability(this.share, arenaAlloc(1024));
    this.caller = this.share.caller;
    this.entry = this.share.entry;
    this.opened = this.share.opened;
    this.attr = this.share.attr;
    this.statfsBuffer = this.share.statfsBuffer;
  }

  init(session: SessionOptions): void {
    this.share.reset();
    this.share.session = { ...session };
  }
  resume(session: SessionOptions): void {
    this.share.session = { ...session };
  }
  destroy(): void {
    this.share.reset();
  }
  /** Ends the file system; offload jobs must have ended before. */
  close(): void {
    this.share.close();
  }

  lookup(parent: number, name: number, nameLength: number): number {
    return look.lookup(this.share, parent, name, nameLength);
  }
  forget(nodeid: number, nlookup: number): void {
    look.forget(this.share, nodeid, nlookup);
  }
  getattr(nodeid: number, fh: number, statxFlags: number, mask: number): number {
    return attr.getattr(this.share, nodeid, fh, statxFlags, mask);
  }
  setattr(nodeid: number, change: SetAttr): number {
    return attr.setattr(this.share, nodeid, change);
  }
  readlink(nodeid: number, out: number, size: number): number {
    return link.readlink(this.share, nodeid, out, size);
  }
  symlink(parent: number, name: number, target: number): number {
    return link.symlink(this.share, parent, name, target);
  }
  mknod(parent: number, name: number, mode: number, umask: number, rdev: number): number {
    return link.mknod(this.share, parent, name, mode, umask, rdev);
  }
  mkdir(parent: number, name: number, mode: number, umask: number): number {
    return link.mkdir(this.share, parent, name, mode, umask);
  }
  unlink(parent: number, name: number): number {
    return link.unlink(this.share, parent, name);
  }
  rmdir(parent: number, name: number): number {
    return link.rmdir(this.share, parent, name);
  }
  rename(parent: number, name: number, newParent: number, newName: number, flags: number): number {
    return link.rename(this.share, parent, name, newParent, newName, flags);
  }
  link(nodeid: number, newParent: number, newName: number): number {
    return link.link(this.share, nodeid, newParent, newName);
  }
  open(nodeid: number, flags: number, killPriv: boolean): number {
    return open.open(this.share, nodeid, flags, killPriv);
  }
  create(parent: number, name: number, flags: number, mode: number, umask: number, killPriv: boolean): number {
    return open.create(this.share, parent, name, flags, mode, umask, killPriv);
  }
  tmpfile(parent: number, flags: number, mode: number, umask: number): number {
    return open.tmpfile(this.share, parent, flags, mode, umask);
  }
  read(nodeid: number, fh: number, offset: number, size: number, iov: number, count: number, skip: number): number {
    return io.read(this.share, nodeid, fh, offset, size, iov, count, skip);
  }
  write(nodeid: number, fh: number, offset: number, size: number, writeFlags: number, iov: number, count: number, skip: number): number {
    return io.write(this.share, nodeid, fh, offset, size, writeFlags, iov, count, skip);
  }
  flush(nodeid: number, fh: number): number {
    return open.flush(this.share, nodeid, fh);
  }
  release(nodeid: number, fh: number): number {
    return open.release(this.share, nodeid, fh);
  }
  fsync(nodeid: number, fh: number, dataOnly: boolean): number {
    return io.fsync(this.share, nodeid, fh, dataOnly, Kind.file);
  }
  opendir(nodeid: number, flags: number): number {
    return dir.opendir(this.share, nodeid, flags);
  }
  readdir(nodeid: number, fh: number, offsetLow: number, offsetHigh: number, _size: number, sink: DirectorySink, plus: boolean): number {
    return dir.readdir(this.share, nodeid, fh, offsetLow, offsetHigh, sink, plus);
  }
  releasedir(nodeid: number, fh: number): number {
    return dir.releasedir(this.share, nodeid, fh);
  }
  fsyncdir(nodeid: number, fh: number, dataOnly: boolean): number {
    return io.fsync(this.share, nodeid, fh, dataOnly, Kind.directory);
  }
  statfs(nodeid: number): number {
    return attr.statfs(this.share, nodeid);
  }
  access(nodeid: number, mask: number): number {
    return attr.access(this.share, nodeid, mask);
  }
  getxattr(nodeid: number, name: number, out: number, size: number): number {
    return xattr.getxattr(this.share, nodeid, name, out, size);
  }
  setxattr(nodeid: number, name: number, value: number, size: number, flags: number, extraFlags: number): number {
    return xattr.setxattr(this.share, nodeid, name, value, size, flags, extraFlags);
  }
  listxattr(nodeid: number, out: number, size: number): number {
    return xattr.listxattr(this.share, nodeid, out, size);
  }
  removexattr(nodeid: number, name: number): number {
    return xattr.removexattr(this.share, nodeid, name);
  }
  fallocate(nodeid: number, fh: number, offset: number, length: number, mode: number): number {
    return io.fallocate(this.share, nodeid, fh, offset, length, mode);
  }
  lseek(nodeid: number, fh: number, offset: number, whence: number): number {
    return io.lseek(this.share, nodeid, fh, offset, whence);
  }
  copyFileRange(fhIn: number, offsetIn: number, nodeidOut: number, fhOut: number, offsetOut: number, length: number): number {
    return io.copyFileRange(this.share, fhIn, offsetIn, nodeidOut, fhOut, offsetOut, length);
  }
  ioctl(nodeid: number, fh: number, command: number, data: number, inputSize: number, outputSize: number): number {
    return fileflags.ioctl(this.share, nodeid, fh, command, data, inputSize, outputSize);
  }
  syncfs(nodeid: number): number {
    return io.syncfs(this.share, nodeid);
  }
  getlk(nodeid: number, fh: number, lock: Lock): number {
    return this.share.locks.getlk(nodeid, fh, lock);
  }
  setlk(nodeid: number, fh: number, lock: Lock, wait: boolean): number {
    return this.share.locks.setlk(nodeid, fh, lock, wait);
  }
  unlockOwner(nodeid: number, ownerLow: number, ownerHigh: number): void {
    this.share.locks.flush(nodeid, ownerLow, ownerHigh);
  }
  interrupt(uniqueLow: number, uniqueHigh: number): void {
    this.share.locks.interrupt(uniqueLow, uniqueHigh);
  }
  cancelWaits(): void {
    this.share.locks.cancel(-EAGAIN);
  }
  completed(job: number): void {
    io.completed(this.share, job);
  }
}

/**
 * `--readonly`: what would modify the share is answered with -EROFS before the host is asked, as in virtiofsd. It is no
 * read-only mount: reading still moves access times.
 */
class ReadOnlyFs extends PassthroughFs {
  override setattr(): number {
    return -EROFS;
  }
  override symlink(): number {
    return -EROFS;
  }
  override mknod(): number {
    return -EROFS;
  }
  override mkdir(): number {
    return -EROFS;
  }
  override unlink(): number {
    return -EROFS;
  }
  override rmdir(): number {
    return -EROFS;
  }
  override rename(): number {
    return -EROFS;
  }
  override link(): number {
    return -EROFS;
  }
  override tmpfile(): number {
    return -EROFS;
  }
  override write(): number {
    return -EROFS;
  }
  override setxattr(): number {
    return -EROFS;
  }
  override removexattr(): number {
    return -EROFS;
  }
  override fallocate(): number {
    return -EROFS;
  }
  override ioctl(nodeid: number, fh: number, command: number, data: number, inputSize: number, outputSize: number): number {
    return fileflags.changes(command) ? -EROFS : super.ioctl(nodeid, fh, command, data, inputSize, outputSize);
  }
  override copyFileRange(): number {
    return -EROFS;
  }
  override open(nodeid: number, flags: number, killPriv: boolean): number {
    if ((flags & O_ACCMODE) !== O_RDONLY || flags & O_EXCL) return -EROFS;
    // The host may truncate even a file opened for reading.
    return flags & O_TRUNC ? -EINVAL : super.open(nodeid, flags, killPriv);
  }
  override create(parent: number, name: number, flags: number): number {
    if ((flags & O_ACCMODE) !== O_RDONLY || flags & O_EXCL) return -EROFS;
    if (flags & O_TRUNC) return -EINVAL;
    const error = this.lookup(parent, name, 0);
    if (error < 0) return error === -ENOENT ? -EROFS : error;
    const result = super.open(this.entry.nodeid, flags, false);
    if (result < 0) this.forget(this.entry.nodeid, 1);
    return result;
  }
  override access(nodeid: number, mask: number): number {
    return mask & W_OK ? -EROFS : super.access(nodeid, mask);
  }
}
