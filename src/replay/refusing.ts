/**
 * Without `--agent`: the replay agent's user id changes nothing all the same. An agent that was about to replay a change when the guest came
 * to this daemon (by migration, say) from one that takes agents would otherwise do it.
 */
import type { FileSystem } from '../fs/filesystem.js';
import { EPERM, O_ACCMODE, O_RDONLY, O_TRUNC } from '../fs/linux.js';
import { delegates } from '../watch/echofs.js';
import { AGENT_UID } from './replay.js';

/** The file system, which refuses every change under the agent's user id. A guest that maps ids has no agent. */
export function refusingAgent(fs: FileSystem): FileSystem {
  const { caller } = fs;
  const agent = (): boolean => caller.uid === AGENT_UID;
  const own: Partial<FileSystem> = {
    setattr: (nodeid, change) => (agent() ? -EPERM : fs.setattr(nodeid, change)),
    symlink: (parent, name, target) => (agent() ? -EPERM : fs.symlink(parent, name, target)),
    mknod: (parent, name, mode, umask, rdev) => (agent() ? -EPERM : fs.mknod(parent, name, mode, umask, rdev)),
    mkdir: (parent, name, mode, umask) => (agent() ? -EPERM : fs.mkdir(parent, name, mode, umask)),
    unlink: (parent, name) => (agent() ? -EPERM : fs.unlink(parent, name)),
    rmdir: (parent, name) => (agent() ? -EPERM : fs.rmdir(parent, name)),
    rename: (parent, name, newParent, newName, flags) => (agent() ? -EPERM : fs.rename(parent, name, newParent, newName, flags)),
    link: (nodeid, parent, name) => (agent() ? -EPERM : fs.link(nodeid, parent, name)),
    open: (nodeid, flags, killPriv) =>
      agent() && ((flags & O_ACCMODE) !== O_RDONLY || (flags & O_TRUNC) !== 0) ? -EPERM : fs.open(nodeid, flags, killPriv),
    create: (parent, name, flags, mode, umask, killPriv) => (agent() ? -EPERM : fs.create(parent, name, flags, mode, umask, killPriv)),
    tmpfile: (parent, flags, mode, umask) => (agent() ? -EPERM : fs.tmpfile(parent, flags, mode, umask)),
    write: (nodeid, fh, offset, size, flags, iov, count, skip) =>
      agent() ? -EPERM : fs.write(nodeid, fh, offset, size, flags, iov, count, skip),
    fallocate: (nodeid, fh, offset, length, mode) => (agent() ? -EPERM : fs.fallocate(nodeid, fh, offset, length, mode)),
    copyFileRange: (fhIn, offsetIn, nodeidOut, fhOut, offsetOut, length) =>
      agent() ? -EPERM : fs.copyFileRange(fhIn, offsetIn, nodeidOut, fhOut, offsetOut, length),
    setxattr: (nodeid, name, value, size, flags, extraFlags) =>
      agent() ? -EPERM : fs.setxattr(nodeid, name, value, size, flags, extraFlags),
    removexattr: (nodeid, name) => (agent() ? -EPERM : fs.removexattr(nodeid, name)),
    ioctl: (nodeid, fh, command, data, inputSize, outputSize) =>
      agent() ? -EPERM : fs.ioctl(nodeid, fh, command, data, inputSize, outputSize),
  };
  return { ...delegates(fs), ...own } as FileSystem;
}
