/**
 * A file system that tells {@link Echoes} what it does, for hosts that are watched by inotify: every operation that
 * changes something is passed on, and what it will cause there is expected afterwards. While no watcher asks for that it only
 * passes on.
 */
import { arena } from 'vhost-user-ts/native';
import { type FileSystem, PENDING, type SetAttr } from '../fs/filesystem.js';
import type { Echoes } from './echo.js';
import { FS_ATTRIB, FS_CLOSE_WRITE, FS_CREATE, FS_DELETE, FS_MODIFY, FS_MOVE_SELF, FS_MOVED_FROM, FS_MOVED_TO } from './mask.js';
import type { WatchNodes } from './nodes.js';

const O_TRUNC = 0x200;
const FATTR_SIZE = 8;
/** RENAME_EXCHANGE. */
const EXCHANGE = 2;

/** What is asked for where echoes are kept. */
export interface EchoKeeper {
  /** null: nobody wants to know. */
  readonly echoes: Echoes | null;
}

/** The number of the job that the last PENDING stands for: `Offload` has it. */
export interface LastJob {
  readonly lastJob: number;
}

/** The operations of `fs`, with echoes told to what `keeper` has. */
export function withEchoes(fs: FileSystem, keeper: EchoKeeper, nodes: WatchNodes, jobs: LastJob): FileSystem {
  /** Nodes that jobs change, by job; and nodes whose last close waits for a job. */
  const changing = new Map<number, number>();

  function entry(directory: number, mask: number, name: number): void {
    const length = nameLength(name);
    keeper.echoes?.entry(directory, mask, name, length);
  }

  /** A change to an object is done, or goes on in a job. */
  function object(nodeid: number, mask: number, result: number): number {
    const echoes = keeper.echoes;
    if (echoes === null || (result < 0 && result !== PENDING)) return result;
    if (result === PENDING) {
      echoes.begin(nodeid, mask);
      changing.set(jobs.lastJob, nodeid);
    } else echoes.object(nodeid, mask);
    return result;
  }

  /** A new name was made: of a new object, `fs.entry`, whose attributes may have been set after it. */
  function made(directory: number, name: number, result: number): number {
    if (keeper.echoes === null || result < 0) return result;
    entry(directory, FS_CREATE, name);
    keeper.echoes.object(fs.entry.nodeid, FS_ATTRIB | FS_MODIFY);
    return result;
  }

  /** A name is gone, and with it one link of `child`, which was asked for before. */
  function removed(echoes: Echoes, directory: number, name: number, child: number, result: number): number {
    if (result < 0) return result;
    entry(directory, FS_DELETE, name);
    if (child !== 0) echoes.object(child, FS_ATTRIB);
    return result;
  }

  const own: Partial<FileSystem> = {
    setattr(nodeid: number, change: SetAttr): number {
      // Truncating without a handle opens the file and closes it.
      const mask = (change.valid & FATTR_SIZE) !== 0 ? FS_MODIFY | FS_ATTRIB | FS_CLOSE_WRITE : FS_ATTRIB;
      return object(nodeid, mask, fs.setattr(nodeid, change));
    },
    write(nodeid, fh, offset, size, writeFlags, iov, count, skip): number {
      // A write can take set-id bits away.
      return object(nodeid, FS_MODIFY | FS_ATTRIB, fs.write(nodeid, fh, offset, size, writeFlags, iov, count, skip));
    },
    fallocate(nodeid, fh, offset, length, mode): number {
      return object(nodeid, FS_MODIFY | FS_ATTRIB, fs.fallocate(nodeid, fh, offset, length, mode));
    },
    copyFileRange(fhIn, offsetIn, nodeidOut, fhOut, offsetOut, length): number {
      return object(nodeidOut, FS_MODIFY | FS_ATTRIB, fs.copyFileRange(fhIn, offsetIn, nodeidOut, fhOut, offsetOut, length));
    },
    setxattr(nodeid, name, value, size, flags, extraFlags): number {
      return object(nodeid, FS_ATTRIB, fs.setxattr(nodeid, name, value, size, flags, extraFlags));
    },
    removexattr(nodeid, name): number {
      return object(nodeid, FS_ATTRIB, fs.removexattr(nodeid, name));
    },
    ioctl(nodeid, fh, command, data, inputSize, outputSize): number {
      return object(nodeid, FS_ATTRIB, fs.ioctl(nodeid, fh, command, data, inputSize, outputSize));
    },
    open(nodeid, flags, killPriv): number {
      return object(nodeid, (flags & O_TRUNC) !== 0 ? FS_MODIFY | FS_ATTRIB : 0, fs.open(nodeid, flags, killPriv));
    },
    release(nodeid, fh): number {
      // Which way it was opened only the host knows; a handle that was not written through has no CLOSE_WRITE to be mistaken.
      return object(nodeid, FS_CLOSE_WRITE, fs.release(nodeid, fh));
    },
    unlockOwner(nodeid, ownerLow, ownerHigh): void {
      fs.unlockOwner(nodeid, ownerLow, ownerHigh);
      // An owner's locks have a descriptor of their own, open for writing.
      keeper.echoes?.object(nodeid, FS_CLOSE_WRITE);
    },
    create(parent, name, flags, mode, umask, killPriv): number {
      return made(parent, name, fs.create(parent, name, flags, mode, umask, killPriv));
    },
    tmpfile(parent, flags, mode, umask): number {
      const result = fs.tmpfile(parent, flags, mode, umask);
      if (result >= 0) keeper.echoes?.object(fs.entry.nodeid, FS_ATTRIB | FS_MODIFY);
      return result;
    },
    mknod(parent, name, mode, umask, rdev): number {
      return made(parent, name, fs.mknod(parent, name, mode, umask, rdev));
    },
    mkdir(parent, name, mode, umask): number {
      return made(parent, name, fs.mkdir(parent, name, mode, umask));
    },
    symlink(parent, name, target): number {
      return made(parent, name, fs.symlink(parent, name, target));
    },
    link(nodeid, newParent, newName): number {
      return made(newParent, newName, fs.link(nodeid, newParent, newName));
    },
    unlink(parent, name): number {
      const echoes = keeper.echoes;
      if (echoes === null) return fs.unlink(parent, name);
      const child = nodes.byName(parent, name);
      return removed(echoes, parent, name, child, fs.unlink(parent, name));
    },
    rmdir(parent, name): number {
      const echoes = keeper.echoes;
      if (echoes === null) return fs.rmdir(parent, name);
      const child = nodes.byName(parent, name);
      return removed(echoes, parent, name, child, fs.rmdir(parent, name));
    },
    rename(parent, name, newParent, newName, flags): number {
      const echoes = keeper.echoes;
      if (echoes === null) return fs.rename(parent, name, newParent, newName, flags);
      const moved = nodes.byName(parent, name);
      const replaced = nodes.byName(newParent, newName);
      const result = fs.rename(parent, name, newParent, newName, flags);
      if (result < 0) return result;
      const both = (flags & EXCHANGE) !== 0 ? FS_MOVED_FROM | FS_MOVED_TO : 0;
      entry(parent, FS_MOVED_FROM | both, name);
      entry(newParent, FS_MOVED_TO | both, newName);
      if (moved !== 0) echoes.object(moved, FS_MOVE_SELF | FS_ATTRIB);
      if (replaced !== 0) echoes.object(replaced, both !== 0 ? FS_MOVE_SELF | FS_ATTRIB : FS_ATTRIB);
      return result;
    },
    completed(job): void {
      fs.completed(job);
      const nodeid = changing.get(job);
      if (nodeid === undefined) return;
      changing.delete(job);
      keeper.echoes?.end(nodeid);
      // A handle that was released meanwhile is closed now.
      keeper.echoes?.object(nodeid, FS_CLOSE_WRITE);
    },
    destroy(): void {
      fs.destroy();
      changing.clear();
    },
  };
  return { ...delegates(fs), ...own } as FileSystem;
}

/**
 * The operations and the fields of `fs`. An object that has them itself, and not from `fs` as its prototype: whose properties V8 does
 * not compile into the caller (35 of 1050 ns of a GETATTR).
 */
export function delegates(fs: FileSystem): Partial<FileSystem> {
  // One that was made so itself: its functions are bound already.
  if (Object.getPrototypeOf(fs) === Object.prototype) return fs;
  const result: Record<string, unknown> = {};
  for (let level: object = fs; level !== Object.prototype; level = Object.getPrototypeOf(level)) {
    for (const name of Object.getOwnPropertyNames(level)) {
      if (name === 'constructor') continue;
      const value: unknown = fs[name as keyof FileSystem];
      result[name] ??= typeof value === 'function' ? value.bind(fs) : value;
    }
  }
  return result as Partial<FileSystem>;
}

function nameLength(name: number): number {
  return arena.u8.indexOf(0, name) - name;
}
