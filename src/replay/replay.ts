/**
 * The daemon's half of the replay agent: a layer over the file system that answers the agent's requests, and serves its control
 * file. Without `--agent` there is no such layer.
 *
 * Rules, in this order:
 *  1. No request of the agent's user id changes anything on the host, whatever it is and whoever sends it. It succeeds only when it is what
 *     the last BEGIN of the connected agent said, comes from that agent's thread, and has not come before; else EPERM.
 *  2. Requests of everybody else go on unchanged, but for the names of the control file's and the staging directory.
 *  3. What is pending ends with the next BEGIN, with FLUSH and RELEASE of the control file (a process that dies sends the first before its
 *     thread id is free again), and with the session.
 *
 * The guest's VFS looks a name up before it changes it, with flags that make it ask though it has a valid entry. So in a replay a name that
 * appears is still hidden, and one that goes is still there, with one link more: the kernel takes one away itself.
 */
import { createHash, timingSafeEqual } from 'node:crypto';
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import type { Caller, FileSystem, SessionOptions, SetAttr } from '../fs/filesystem.js';
import {
  EACCES,
  EBADF,
  EINVAL,
  ENOENT,
  ENOTTY,
  EOPNOTSUPP,
  EPERM,
  ESTALE,
  FATTR_ATIME,
  FATTR_FH,
  FATTR_MODE,
  FATTR_MTIME,
  FOPEN_DIRECT_IO,
  O_ACCMODE,
  O_RDONLY,
  S_IFDIR,
  S_IFMT,
  S_IFREG,
  Statx,
} from '../fs/linux.js';
import {
  FS_ATTRIB,
  FS_CLOSE_WRITE,
  FS_CREATE,
  FS_DELETE,
  FS_DELETE_SELF,
  FS_EVENT_ON_CHILD,
  FS_MODIFY,
  FS_MOVE_SELF,
  FS_MOVED_FROM,
  FS_MOVED_TO,
} from '../watch/mask.js';
import {
  AUTH,
  AuthIn,
  AuthOut,
  BEGIN,
  BEGIN_ISDIR,
  BeginIn,
  BeginOut,
  CONTROL_DIRECTORY,
  CONTROL_NAME,
  CONTROL_VERSION,
  LOOK_MAX,
  Replay as Op,
  STAGING_NAME,
  TOKEN_MAX,
  WatchIn,
} from './abi.js';
import { CONTROL_DIRECTORY_NODE, CONTROL_NODE, Phantoms, STAGING_NODE } from './phantoms.js';

/**
 * The agent's user id (fsuid). A constant, so that also a daemon that was started anew knows a request of an agent that has not noticed
 * yet. Nobody else may use it in the guest: its changes are refused.
 */
export const AGENT_UID = 0xf500_0000;

const ROOT = 1;
const EBUSY = 16;
const EPROTO = 71;
/** Handles of the control file, and that of everything an agent opens: numbers that the handle store never gives out (slot 0). */
const FH_STEP = 2 ** 20;
const FAKE_FH = FH_STEP;
const WATCH_BYTES = 64 << 10;
const VIEW_MAX = 65_536;
/** What a replayed change of attributes may ask for: times of which one is given, or a mode. FATTR_CTIME comes with each. */
const HARMLESS = FATTR_MODE | FATTR_ATIME | FATTR_MTIME | FATTR_FH | 1024;
/** What may matter of a directory that somebody has looked into: changes, for so long (ns) and of so many directories. */
const EXPECTED =
  FS_MODIFY |
  FS_ATTRIB |
  FS_CLOSE_WRITE |
  FS_CREATE |
  FS_DELETE |
  FS_MOVED_FROM |
  FS_MOVED_TO |
  FS_DELETE_SELF |
  FS_MOVE_SELF |
  FS_EVENT_ON_CHILD;
const EXPECTED_NS = 3e9;
const EXPECTED_MAX = 2048;
/** A process that makes requests is named to the agent so often, in nanoseconds. */
const LOOK_AGAIN = 50e6;

const { u8, u16, u32 } = arena;
const controlDirectory = bytes(CONTROL_DIRECTORY);
const controlName = bytes(CONTROL_NAME);
const stagingName = bytes(STAGING_NAME);

/** As a look-up of an inode that the guest knows, whatever its name is: `entry` and `attr`, one reference more. 0 or -errno. */
export type Again = (nodeid: number) => number;

/** Events of the host on their way to the agent. */
export interface AgentEvents {
  /** An agent has come. @returns 0; -EALREADY: the guest's kernel is told of events itself */
  beginAgent(): number;
  endAgent(): void;
  watch(nodeid: number, generation: number, maskLow: number, maskHigh: number, flags: number): number;
  /** Takes the chain of a READ for the next notification, of `size` bytes at least. @returns KEPT or -errno */
  lendRead(size: number, waitMs: number): number;
  /** FS_* bits that can be watched. */
  readonly supportedLow: number;
  /** Processes to look at, `count` thread ids at arena offset `at`. @returns whether the agent was told */
  look(at: number, count: number): boolean;
}

/** What the agent is about to do. */
interface Pending {
  operation: number;
  isdir: boolean;
  parent: number;
  target: number;
  child: number;
  replaced: number;
  /** Keys of both names in the view. */
  from: string;
  to: string;
  /** The object, once the guest was told of it. */
  node: number;
  /** S_IFMT and permissions that it was said to have. */
  mode: number;
}

export class Replay {
  /** The file system with the layer. */
  readonly served: FileSystem;
  /** Requests of the agent's user id that were refused: none in an agent's normal life. */
  refused = 0;
  /** Changes replayed. */
  replayed = 0;

  readonly #fs: FileSystem;
  readonly #again: Again;
  readonly #events: AgentEvents;
  readonly #caller: Caller;
  readonly #token: Buffer;
  readonly #log: (level: 'info' | 'warn' | 'debug', line: string) => void;
  readonly #phantoms = new Phantoms();
  /** What the guest has under a name since a replay, by parent and name. */
  readonly #view = new Map<string, number>();
  readonly #pending: Pending = {
    operation: Op.none,
    isdir: false,
    parent: 0,
    target: 0,
    child: 0,
    replaced: 0,
    from: '',
    to: '',
    node: 0,
    mode: 0,
  };
  readonly #names = arenaAlloc(512);
  readonly #in = arenaAlloc(WATCH_BYTES + 256);
  readonly #looked = new Map<number, number>();
  readonly #looks = arenaAlloc(4 * LOOK_MAX);
  #lookCount = 0;
  #lastPid = 0;
  /** Watches that the agent has reported; and directories that are watched in case it will, with the time until when. The oldest come first. */
  readonly #reported = new Set<number>();
  readonly #expected = new Map<number, number>();

  /** Handle of the open control file, 0: closed. */
  #open = 0;
  #serial = 1;
  #session: SessionOptions | undefined;
  /** The agent's thread, 0: it has not shown its token. */
  #thread = 0;

  constructor(
    fs: FileSystem,
    again: Again,
    events: AgentEvents,
    token: Buffer,
    log: (level: 'info' | 'warn' | 'debug', line: string) => void,
  ) {
    this.#fs = fs;
    this.#again = again;
    this.#events = events;
    this.#caller = fs.caller;
    this.#token = createHash('sha256').update(token).digest();
    this.#log = log;
    this.served = this.#layer();
  }

  /** Whether an agent is there. */
  get connected(): boolean {
    return this.#thread !== 0;
  }

  /** The agent can be told something again: which processes to look at, if any wait. */
  readable(): void {
    if (this.#lookCount > 0 && this.#events.look(this.#looks, this.#lookCount)) this.#lookCount = 0;
  }

  #layer(): FileSystem {
    const fs = this.#fs;
    const caller = this.#caller;
    const agent = (): boolean => caller.uid === AGENT_UID;
    const refuse = (): number => {
      this.refused++;
      this.#log('warn', 'a change under the user id of the replay agent was refused: nobody else may use that id');
      return -EPERM;
    };
    /** Names of ours are no names of the host's. */
    const ours = (parent: number, name: number): boolean =>
      Phantoms.is(parent) || (parent === ROOT && (is(name, controlDirectory) || is(name, stagingName)));

    const own: Partial<FileSystem> = {
      init: (session: SessionOptions) => {
        this.#end();
        this.#session = session;
        fs.init(session);
      },
      resume: (session: SessionOptions) => {
        this.#session = session;
        fs.resume(session);
      },
      destroy: () => {
        this.#end();
        fs.destroy();
      },
      lookup: (parent, name, nameLength) => {
        if (parent === ROOT) {
          // Root alone, and asked each time: an entry that others could find in the guest's cache is not kept.
          if (is(name, controlDirectory)) return caller.uid === 0 ? this.#special(CONTROL_DIRECTORY_NODE, S_IFDIR | 0o700) : -ENOENT;
          if (is(name, stagingName)) return agent() ? this.#special(STAGING_NODE, S_IFDIR | 0o700) : -ENOENT;
        }
        if (parent === CONTROL_DIRECTORY_NODE)
          return caller.uid === 0 && is(name, controlName) ? this.#special(CONTROL_NODE, S_IFREG) : -ENOENT;
        if (agent()) return this.#lookup(parent, name, nameLength);
        const result = fs.lookup(parent, name, nameLength);
        if (this.#thread !== 0) {
          this.#expect(parent);
          if (result === 0 && ((u16[(fs.attr + Statx.mode) >> 1] as number) & S_IFMT) === S_IFDIR) this.#expect(fs.entry.nodeid);
          this.#look();
        }
        return result;
      },
      forget: (nodeid, nlookup) => {
        if (Phantoms.is(nodeid)) this.#phantoms.forget(nodeid, nlookup);
        else fs.forget(nodeid, nlookup);
      },
      getattr: (nodeid, fh, flags, mask) => this.#getattr(nodeid, fh, flags, mask),
      setattr: (nodeid, change) => {
        if (!agent()) return Phantoms.is(nodeid) ? -EPERM : fs.setattr(nodeid, change);
        return this.#setattr(nodeid, change) ?? refuse();
      },
      mknod: (parent, name, mode, umask, rdev) => {
        if (!agent()) return ours(parent, name) ? -EPERM : fs.mknod(parent, name, mode, umask, rdev);
        return this.#created(parent, name) ?? refuse();
      },
      mkdir: (parent, name, mode, umask) => {
        if (!agent()) {
          const result = ours(parent, name) ? -EPERM : fs.mkdir(parent, name, mode, umask);
          if (result === 0 && this.#thread !== 0) this.#expect(fs.entry.nodeid);
          return result;
        }
        return this.#created(parent, name) ?? refuse();
      },
      symlink: (parent, name, target) => {
        if (!agent()) return ours(parent, name) ? -EPERM : fs.symlink(parent, name, target);
        return this.#created(parent, name) ?? refuse();
      },
      link: (nodeid, parent, name) => {
        if (!agent()) return ours(parent, name) ? -EPERM : fs.link(nodeid, parent, name);
        return (nodeid === this.#pending.child ? this.#created(parent, name) : undefined) ?? refuse();
      },
      unlink: (parent, name) => {
        if (!agent()) return ours(parent, name) ? -EPERM : fs.unlink(parent, name);
        return this.#removed(parent, name) ?? refuse();
      },
      rmdir: (parent, name) => {
        if (!agent()) return ours(parent, name) ? -EPERM : fs.rmdir(parent, name);
        return this.#removed(parent, name) ?? refuse();
      },
      rename: (parent, name, newParent, newName, flags) => {
        if (!agent()) return ours(parent, name) || ours(newParent, newName) ? -EPERM : fs.rename(parent, name, newParent, newName, flags);
        return this.#renamed(parent, name, newParent, newName, flags) ?? refuse();
      },
      open: (nodeid, flags, killPriv) => {
        if (nodeid === CONTROL_NODE) return this.#openControl(flags);
        return agent() ? (this.#opened() ?? refuse()) : fs.open(nodeid, flags, killPriv);
      },
      opendir: (nodeid, flags) => {
        // Looking for the name of a directory, the guest's kernel reads the one that it is in.
        if (agent()) return this.#opened() ?? fs.opendir(nodeid, flags);
        if (Phantoms.is(nodeid)) return -EACCES;
        if (this.#thread !== 0) {
          this.#expect(nodeid);
          this.#look();
        }
        return fs.opendir(nodeid, flags);
      },
      create: (parent, name, flags, mode, umask, killPriv) =>
        agent() ? refuse() : ours(parent, name) ? -EPERM : fs.create(parent, name, flags, mode, umask, killPriv),
      tmpfile: (parent, flags, mode, umask) => (agent() ? refuse() : fs.tmpfile(parent, flags, mode, umask)),
      read: (nodeid, fh, offset, size, iov, count, skip) =>
        nodeid === CONTROL_NODE ? this.#read(fh, offset, size) : fs.read(nodeid, fh, offset, size, iov, count, skip),
      write: (nodeid, fh, offset, size, writeFlags, iov, count, skip) => {
        if (nodeid === CONTROL_NODE) return this.#write(fh, size, iov, count, skip);
        return agent() ? refuse() : fs.write(nodeid, fh, offset, size, writeFlags, iov, count, skip);
      },
      flush: (nodeid, fh) => {
        if (nodeid === CONTROL_NODE && fh === this.#open) this.#pending.operation = Op.none;
        return fh % FH_STEP === 0 ? 0 : fs.flush(nodeid, fh);
      },
      release: (nodeid, fh) => {
        if (fh % FH_STEP !== 0) return fs.release(nodeid, fh);
        if (nodeid === CONTROL_NODE && fh === this.#open) this.#close('it has gone');
        return 0;
      },
      releasedir: (nodeid, fh) => (fh % FH_STEP === 0 ? 0 : fs.releasedir(nodeid, fh)),
      fsync: (nodeid, fh, dataOnly) => (agent() ? refuse() : fs.fsync(nodeid, fh, dataOnly)),
      fallocate: (nodeid, fh, offset, length, mode) => (agent() ? refuse() : fs.fallocate(nodeid, fh, offset, length, mode)),
      copyFileRange: (fhIn, offsetIn, nodeidOut, fhOut, offsetOut, length) =>
        agent() ? refuse() : fs.copyFileRange(fhIn, offsetIn, nodeidOut, fhOut, offsetOut, length),
      setxattr: (nodeid, name, value, size, flags, extraFlags) =>
        agent() ? refuse() : fs.setxattr(nodeid, name, value, size, flags, extraFlags),
      removexattr: (nodeid, name) => (agent() ? refuse() : fs.removexattr(nodeid, name)),
      ioctl: (nodeid, fh, command, data, inputSize, outputSize) => {
        if (nodeid === CONTROL_NODE) return this.#ioctl(fh, command, data, inputSize, outputSize);
        return agent() ? refuse() : fs.ioctl(nodeid, fh, command, data, inputSize, outputSize);
      },
      syncfs: (nodeid) => (agent() ? refuse() : fs.syncfs(nodeid)),
    };
    return Object.assign(Object.create(fs) as FileSystem, own);
  }

  // --- the control file ---

  #openControl(flags: number): number {
    if (this.#caller.uid !== 0) return -EACCES;
    // Whoever marks the mount with fanotify gets a descriptor of what the agent reads. It is good for nothing, and keeps no agent out.
    if ((flags & O_ACCMODE) === O_RDONLY) {
      this.#fs.opened.fh = FAKE_FH;
      this.#fs.opened.openFlags = FOPEN_DIRECT_IO;
      return 0;
    }
    if (this.#open !== 0) return -EBUSY;
    this.#serial = (this.#serial % 2 ** 31) + 1;
    this.#open = this.#serial * FH_STEP;
    this.#fs.opened.fh = this.#open;
    this.#fs.opened.openFlags = FOPEN_DIRECT_IO;
    return 0;
  }

  #close(why: string): void {
    this.#open = 0;
    this.#pending.operation = Op.none;
    if (this.#thread === 0) return;
    this.#thread = 0;
    this.#lookCount = 0;
    this.#looked.clear();
    this.#reported.clear();
    this.#expected.clear();
    this.#events.endAgent();
    this.#log('info', `the replay agent in the guest is disconnected: ${why}`);
  }

  /** The session ends. */
  #end(): void {
    this.#close('the session ends');
    this.#phantoms.clear();
    this.#view.clear();
  }

  /** Whether a request on the control file is the agent's. 0 or -errno. */
  #check(fh: number): number {
    if (fh !== this.#open || fh === 0) return -EBADF;
    return this.#thread !== 0 && this.#caller.pid === this.#thread && this.#caller.uid === AGENT_UID ? 0 : -EACCES;
  }

  #ioctl(fh: number, command: number, data: number, inputSize: number, outputSize: number): number {
    if (command === AUTH) return inputSize === AuthIn.bytes && outputSize >= AuthOut.bytes ? this.#auth(fh, data) : -EINVAL;
    if (command !== BEGIN) return -ENOTTY;
    const error = this.#check(fh);
    if (error < 0) return error;
    if (inputSize !== BeginIn.bytes || outputSize < BeginOut.bytes) return -EINVAL;
    return this.#begin(data);
  }

  #auth(fh: number, data: number): number {
    if (fh !== this.#open) return -EBADF;
    if (this.#caller.uid !== 0 || this.#thread !== 0) return -EACCES;
    if (u32[data >> 2] !== CONTROL_VERSION) return -EPROTO;
    const length = u32[(data + AuthIn.length) >> 2] as number;
    if (length > TOKEN_MAX) return -EINVAL;
    const given = createHash('sha256')
      .update(u8.subarray(data + AuthIn.token, data + AuthIn.token + length))
      .digest();
    if (!timingSafeEqual(given, this.#token)) {
      this.#log('warn', 'a replay agent in the guest has another token than --agent');
      return -EACCES;
    }
    // Without the one the guest would keep old contents, without the other the agent cannot open a directory by its nodeid.
    if (this.#session?.autoInvalData !== true || !this.#session.exportSupport) return -EOPNOTSUPP;
    const error = this.#events.beginAgent();
    if (error < 0) return error;
    this.#thread = this.#caller.pid;
    u32[data >> 2] = CONTROL_VERSION;
    u32[(data + AuthOut.uid) >> 2] = AGENT_UID;
    this.#log('info', 'a replay agent in the guest is connected: file events go through it');
    return AuthOut.bytes;
  }

  #read(fh: number, offset: number, size: number): number {
    const error = this.#check(fh);
    return error < 0 ? error : this.#events.lendRead(size, offset);
  }

  #write(fh: number, size: number, iov: number, count: number, skip: number): number {
    const error = this.#check(fh);
    if (error < 0) return error;
    // A short count: the agent goes on with the rest.
    const length = Math.min(size, WATCH_BYTES);
    if (length === 0 || length % WatchIn.bytes !== 0) return -EINVAL;
    if (native.gather(iov, count, this.#in, skip + length) !== skip + length) return -EINVAL;
    for (let at = this.#in + skip; at < this.#in + skip + length; at += WatchIn.bytes) {
      const mask = ((u32[(at + WatchIn.mask) >> 2] as number) & this.#events.supportedLow) >>> 0;
      const nodeid = number64(at + WatchIn.nodeid);
      this.#expected.delete(nodeid);
      if (mask === 0) this.#reported.delete(nodeid);
      else this.#reported.add(nodeid);
      // Objects that are gone meanwhile, or of the agent's own making, are not worth a word.
      this.#events.watch(nodeid, u32[(at + WatchIn.generation) >> 2] as number, mask, 0, 0);
    }
    return length;
  }

  /**
   * Somebody has looked into a directory, and may watch it or what is in it before the agent finds that out. What happens there from now on is
   * replayed: where nobody watches that is in vain, where somebody has begun to watch nothing is missed.
   */
  #expect(nodeid: number): void {
    if (this.#reported.has(nodeid) || Phantoms.is(nodeid)) return;
    const expected = this.#expected;
    const now = native.monotonic();
    if (!expected.delete(nodeid)) this.#events.watch(nodeid, 0, (EXPECTED & this.#events.supportedLow) >>> 0, 0, 0);
    expected.set(nodeid, now + EXPECTED_NS);
    for (const [oldest, until] of expected) {
      if (until > now && expected.size <= EXPECTED_MAX) break;
      expected.delete(oldest);
      this.#events.watch(oldest, 0, 0, 0, 0);
    }
  }

  /** A process makes requests that may come before a watch of it. */
  #look(): void {
    const { pid } = this.#caller;
    if (pid === this.#lastPid && this.#lookCount > 0) return;
    const now = native.monotonic();
    if (now - (this.#looked.get(pid) ?? 0) < LOOK_AGAIN || this.#lookCount === LOOK_MAX) return;
    if (this.#looked.size > 4096) this.#looked.clear();
    this.#looked.set(pid, now);
    this.#lastPid = pid;
    u32[(this.#looks >> 2) + this.#lookCount++] = pid;
    this.readable();
  }

  // --- replays ---

  #begin(data: number): number {
    const p = this.#pending;
    const nameLength = u16[(data + BeginIn.nameLength) >> 1] as number;
    const newNameLength = u16[(data + BeginIn.newNameLength) >> 1] as number;
    if (nameLength > 255 || newNameLength > 255) return -EINVAL;
    p.operation = u32[data >> 2] as number;
    p.isdir = ((u32[(data + BeginIn.flags) >> 2] as number) & BEGIN_ISDIR) !== 0;
    p.parent = number64(data + BeginIn.parent);
    p.target = number64(data + BeginIn.target);
    p.child = number64(data + BeginIn.child);
    p.replaced = number64(data + BeginIn.replaced);
    p.from = nameLength === 0 ? '' : key(p.parent, data + BeginIn.name, nameLength);
    p.to = newNameLength === 0 ? '' : key(p.target, data + BeginIn.newName, newNameLength);
    p.node = 0;
    p.mode = 0;
    u8.fill(0, this.#names, this.#names + 512);
    u8.copyWithin(this.#names, data + BeginIn.name, data + BeginIn.name + nameLength);
    u8.copyWithin(this.#names + 256, data + BeginIn.newName, data + BeginIn.newName + newNameLength);
    let go = true;
    if (p.operation === Op.create) {
      // The guest has to make an object of this type.
      go = this.#resolve(p, this.#names, nameLength) === 0;
      if (go) {
        p.mode = u16[(this.#fs.attr + Statx.mode) >> 1] as number;
        this.served.forget(this.#fs.entry.nodeid, 1);
      }
    } else if (p.operation > Op.open) return -EINVAL;
    if (!go) p.operation = Op.none;
    else if (p.operation !== Op.none) this.replayed++;
    u32[data >> 2] = go ? 1 : 0;
    u32[(data + BeginOut.mode) >> 2] = p.mode;
    return BeginOut.bytes;
  }

  /** Whether this request is the agent's, and a replay of one of these kinds is under way. */
  #is(operation: number): boolean {
    return this.#pending.operation === operation && this.#caller.pid === this.#thread && this.#thread !== 0;
  }

  /** A look-up of the agent: in a replay it sees what the guest has to believe, else what there is. */
  #lookup(parent: number, name: number, nameLength: number): number {
    const p = this.#pending;
    if (this.#caller.pid !== this.#thread || p.operation === Op.none) return this.#fs.lookup(parent, name, nameLength);
    const asked = key(parent, name, nameLength);
    if (p.operation === Op.rename && asked === p.to) {
      if (p.replaced === 0 || p.replaced === p.node || this.#known(p.replaced) < 0) return -ENOENT;
      addLink(this.#fs.attr);
      this.#fs.entry.volatile = true;
      return 0;
    }
    if (asked !== p.from) {
      return Phantoms.is(parent) ? -ENOENT : this.#fs.lookup(parent, name, nameLength);
    }
    if (p.operation === Op.create) return -ENOENT;
    const error = this.#resolve(p, name, nameLength);
    if (error < 0) return error;
    p.node = this.#fs.entry.nodeid;
    if (p.operation === Op.remove) addLink(this.#fs.attr);
    return 0;
  }

  /** Finds the object of a replay: `entry` and `attr`, one reference more. */
  #resolve(p: Pending, name: number, nameLength: number): number {
    const { entry } = this.#fs;
    const appears = p.operation === Op.create;
    if (p.node !== 0 && this.#known(p.node) === 0) return this.#volatile();
    if (!appears) {
      if (p.child !== 0 && this.#known(p.child) === 0) return this.#volatile();
      const seen = this.#view.get(p.from);
      if (seen !== undefined) {
        if (this.#known(seen) === 0) return this.#volatile();
        this.#view.delete(p.from);
      }
    }
    // Where it is now, if it is of the right kind.
    const moved = p.operation === Op.rename && p.target !== STAGING_NODE;
    const error = moved
      ? this.#fs.lookup(p.target, this.#names + 256, p.to.length - p.to.indexOf('/') - 1)
      : this.#fs.lookup(p.parent, name, nameLength);
    if (error === 0) {
      const type = (u16[(this.#fs.attr + Statx.mode) >> 1] as number) & S_IFMT;
      if ((type === S_IFDIR) === p.isdir && (p.mode === 0 || type === (p.mode & S_IFMT))) {
        if (appears) this.#see(p.from, entry.nodeid);
        return this.#volatile();
      }
      this.#fs.forget(entry.nodeid, 1);
    }
    if (appears && p.child !== 0 && this.#known(p.child) === 0) return this.#volatile();
    const phantom = this.#phantoms.add(p.mode !== 0 ? p.mode : p.isdir ? S_IFDIR | 0o755 : S_IFREG | 0o644);
    if (phantom === 0) return -EPERM;
    this.#see(p.from, phantom);
    return this.#known(phantom);
  }

  #volatile(): number {
    this.#fs.entry.volatile = true;
    return 0;
  }

  #see(name: string, nodeid: number): void {
    if (this.#view.size >= VIEW_MAX) this.#view.clear();
    this.#view.set(name, nodeid);
  }

  /** As a look-up of a node, real or phantom. 0 or -errno. */
  #known(nodeid: number): number {
    if (!Phantoms.is(nodeid)) return this.#again(nodeid);
    const mode = this.#phantoms.mode(nodeid);
    if (mode === 0) return -ENOENT;
    this.#phantoms.reference(nodeid);
    return this.#special(nodeid, mode);
  }

  /** `entry` and `attr` of what is not on the host. */
  #special(nodeid: number, mode: number): number {
    const { entry, attr } = this.#fs;
    entry.nodeid = nodeid;
    entry.generation = 0;
    entry.attrFlags = 0;
    entry.volatile = true;
    u8.fill(0, attr, attr + Statx.bytes);
    u32[(attr + Statx.nlink) >> 2] = 1;
    u16[(attr + Statx.mode) >> 1] = mode;
    u32[(attr + Statx.ino) >> 2] = nodeid >>> 0;
    u32[(attr + Statx.ino + 4) >> 2] = Math.floor(nodeid / 2 ** 32) | 0x4000_0000; // no number of the host's
    return 0;
  }

  #getattr(nodeid: number, fh: number, flags: number, mask: number): number {
    const fs = this.#fs;
    if (Phantoms.is(nodeid)) {
      const directory = nodeid === CONTROL_DIRECTORY_NODE || nodeid === STAGING_NODE;
      const mode = nodeid === CONTROL_NODE ? S_IFREG : directory ? S_IFDIR | 0o700 : this.#phantoms.mode(nodeid);
      return mode === 0 ? -ENOENT : this.#special(nodeid, mode);
    }
    let error = fs.getattr(nodeid, fh, flags, mask);
    if (this.#caller.uid !== AGENT_UID || this.#caller.pid !== this.#thread) return error;
    if (error === -ESTALE) {
      // The host has removed it since; what happened to it before that is still to be replayed.
      error = this.#again(nodeid);
      if (error === 0) fs.forget(nodeid, 1);
    }
    if (error < 0) return error;
    const p = this.#pending;
    if ((p.operation === Op.remove && nodeid === p.node) || (p.operation === Op.rename && nodeid === p.replaced)) addLink(fs.attr);
    // Another time than the guest has, whatever it has: its pages go. The right one comes with the answer to SETATTR.
    if (p.operation === Op.change) u32[(fs.attr + Statx.mtime + 8) >> 2] = (u32[(fs.attr + Statx.mtime + 8) >> 2] as number) ^ 1;
    return 0;
  }

  /** Each of these answers undefined for what is no replay. */
  #setattr(nodeid: number, change: SetAttr): number | undefined {
    if (!this.#is(Op.change) || (change.valid & ~HARMLESS) !== 0) return undefined;
    // Its node is what the guest has under the name: what the answer says of it is right for any.
    this.#pending.operation = Op.none;
    return this.#getattr(nodeid, -1, 0, 0xfff);
  }

  #opened(): number | undefined {
    if (!this.#is(Op.open)) return undefined;
    this.#pending.operation = Op.none;
    this.#fs.opened.fh = FAKE_FH;
    this.#fs.opened.openFlags = 0;
    return 0;
  }

  #created(parent: number, name: number): number | undefined {
    const p = this.#pending;
    if (!this.#is(Op.create) || keyOf(parent, name) !== p.from) return undefined;
    const error = this.#resolve(p, name, length(name));
    p.operation = Op.none;
    return error;
  }

  #removed(parent: number, name: number): number | undefined {
    const p = this.#pending;
    if (!this.#is(Op.remove) || keyOf(parent, name) !== p.from) return undefined;
    p.operation = Op.none;
    this.#view.delete(p.from);
    return 0;
  }

  #renamed(parent: number, name: number, newParent: number, newName: number, flags: number): number | undefined {
    const p = this.#pending;
    if (!this.#is(Op.rename) || flags !== 0 || keyOf(parent, name) !== p.from || keyOf(newParent, newName) !== p.to) return undefined;
    p.operation = Op.none;
    this.#view.delete(p.from);
    if (p.target !== STAGING_NODE && p.node !== 0) this.#see(p.to, p.node);
    return 0;
  }
}

function addLink(attr: number): void {
  u32[(attr + Statx.nlink) >> 2] = (u32[(attr + Statx.nlink) >> 2] as number) + 1;
}

/** Directory and name as one string: a byte is a character. */
function key(parent: number, name: number, nameLength: number): string {
  return `${parent}/${arena.buffer.toString('latin1', name, name + nameLength)}`;
}

function keyOf(parent: number, name: number): string {
  return key(parent, name, length(name));
}

function length(name: number): number {
  return u8.indexOf(0, name) - name;
}

function number64(at: number): number {
  return (u32[at >> 2] as number) + (u32[(at >> 2) + 1] as number) * 4294967296;
}

function bytes(text: string): Uint8Array {
  return new Uint8Array(Buffer.from(`${text}\0`));
}

function is(name: number, other: Uint8Array): boolean {
  for (let i = 0; i < other.length; i++) if (u8[name + i] !== other[i]) return false;
  return true;
}
