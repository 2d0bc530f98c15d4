/**
 * Takes over the state of a session from records (stream.ts). What it says is believed only as far as it is checked: each number
 * is looked at, paths are walked below the shared directory alone, and a handle is one of a mount that was reached so.
 */
import { arena, arenaAlloc, arenaFree, EMPTY_NAME, native } from 'vhost-user-ts/native';
import type { Lock } from '../fs/filesystem.js';
import { HandleFlag, Kind } from '../fs/handles.js';
import { ROOT_NODEID, ROOT_SLOT } from '../fs/inodes.js';
import {
  AT_EMPTY_PATH,
  EAGAIN,
  EBADF,
  EROFS,
  ESTALE,
  O_ACCMODE,
  O_DIRECT,
  O_DIRECTORY,
  O_DSYNC,
  O_NOATIME,
  O_NOCTTY,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_PATH,
  O_RDONLY,
  O_SYNC,
  S_IFDIR,
  S_IFMT,
  S_IFREG,
} from '../fs/linux.js';
import { restoreFd, restoreLost } from '../fs/passthrough/lookup.js';
import type { Share } from '../fs/passthrough/share.js';
import { type ServerOptions, type Session, takeOver } from '../fuse/init.js';
import type { FuseServer } from '../fuse/server.js';
import { FSNOTIFY_ALL, type Fsnotify } from '../watch/fsnotify.js';
import { mountDescriptor, Opener, typeOf } from './paths.js';
import type { MigrationMode } from './save.js';
import { Found, HandleRecord, InodeRecord, LockRecord, MAGIC_HIGH, MAGIC_LOW, padded, RecordType, VERSION } from './stream.js';

const { u8, u32, f64 } = arena;

export interface LoadOptions {
  /** `--migration-mode`: whether inodes may be named by file handles, which reach whatever is on the share's file systems. */
  mode: MigrationMode;
  /** `--migration-on-error`. */
  onError: 'abort' | 'guest-error';
  /** Every change is refused: nothing is opened for writing. */
  readonly: boolean;
  /** What this daemon agrees on with guests. */
  server: () => ServerOptions;
}

const FILE_FLAGS = O_ACCMODE | O_NONBLOCK | O_SYNC | O_DIRECT | O_NOATIME | O_NOFOLLOW | O_NOCTTY;
const DIRECTORY_FLAGS = O_DIRECTORY | O_NOATIME;
/** Longest struct file_handle (MAX_HANDLE_SZ). */
const HANDLE_BYTES = 128;
const MOST_MOUNTS = 65536;

/** One transfer; {@link record} is called for each record, then {@link close}. */
export class Loader {
  /** END was there, and all is as it says. */
  complete = false;
  inodes = 0;
  handles = 0;
  watches = 0;
  locks = 0;
  /** Locks that somebody else still has; the source, most likely. */
  locksTaken = 0;
  /** What could not be had, with `guest-error`; and the first of it in words. */
  lost = 0;
  reason = '';

  readonly #server: FuseServer;
  readonly #share: Share;
  readonly #fsnotify: Fsnotify | undefined;
  readonly #options: LoadOptions;
  readonly #opener: Opener;
  readonly #mounts = new Map<number, number>();
  readonly #handle = arenaAlloc(192);
  #session: Session | undefined;
  /** The record before: they come in an order. */
  #last: number = 0;

  constructor(server: FuseServer, share: Share, fsnotify: Fsnotify | undefined, options: LoadOptions) {
    this.#server = server;
    this.#share = share;
    this.#fsnotify = fsnotify;
    this.#options = options;
    this.#opener = new Opener(share.fd(ROOT_SLOT));
  }

  /** Takes over a record of `type` whose body of `bytes` lies at arena offset `at`. @returns what is wrong, or undefined */
  record(type: number, at: number, bytes: number): string | undefined {
    const last = this.#last;
    this.#last = type;
    if (last === 0 ? type !== RecordType.start : !this.#follows(last, type)) return corrupt(`record ${type} after ${last}`);
    switch (type) {
      case RecordType.start:
        return this.#start(at, bytes);
      case RecordType.session:
        return this.#begin(at, bytes);
      case RecordType.mount:
        return this.#mount(at, bytes);
      case RecordType.inode:
        return this.#inode(at, bytes);
      case RecordType.handle:
        return this.#open(at, bytes);
      case RecordType.lock:
        return this.#lock(at, bytes);
      case RecordType.watch:
        return this.#watch(at, bytes);
      default:
        return this.#end(at, bytes);
    }
  }

  #follows(last: number, type: number): boolean {
    if (type > RecordType.end || last === RecordType.end) return false;
    if (last === RecordType.start) return type === RecordType.session || type === RecordType.end;
    // Mounts and inodes come mixed; after them the types grow.
    return type >= last ? type > RecordType.session : type === RecordType.mount && last === RecordType.inode;
  }

  #start(at: number, bytes: number): string | undefined {
    if (bytes !== 16 || u32[at >> 2] !== MAGIC_LOW || u32[(at >> 2) + 1] !== MAGIC_HIGH) return 'this is no state of virtiofsd-ts';
    const version = u32[(at >> 2) + 2];
    return version === VERSION
      ? undefined
      : `the state is of version ${version}, this program knows ${VERSION}: use the same program on both sides`;
  }

  #begin(at: number, bytes: number): string | undefined {
    if (bytes !== 24) return corrupt('SESSION');
    const i = at >> 2;
    const agreed = {
      minor: u32[i] as number,
      flags: (u32[i + 1] as number) | 0,
      flags2: (u32[i + 2] as number) | 0,
      maxReadahead: u32[i + 3] as number,
    };
    const session = takeOver(agreed, this.#options.server(), this.#fsnotify !== undefined);
    if (Array.isArray(session))
      return `the guest makes use of ${session.join(', ') || 'what'} that this daemon's options do not give it: start it with those of the source`;
    this.#server.resume(session);
    this.#session = session;
    this.#share.inodes.generation = u32[i + 4] as number;
    this.#share.handles.generation = u32[i + 5] as number;
    return undefined;
  }

  #mount(at: number, bytes: number): string | undefined {
    const index = u32[at >> 2] as number;
    const pathBytes = u32[(at >> 2) + 1] as number;
    if (bytes < 8 || pathBytes !== bytes - 8 || this.#mounts.has(index) || this.#mounts.size === MOST_MOUNTS) return corrupt('MOUNT');
    const fd = this.#opener.open(at + 8, pathBytes);
    const mount = fd < 0 ? fd : mountDescriptor(this.#share.procfd, fd, this.#share.attr);
    if (fd >= 0) native.close(fd);
    // Its inodes fail one by one.
    this.#mounts.set(index, mount);
    return undefined;
  }

  #inode(at: number, bytes: number): string | undefined {
    const nodeid = whole(at);
    const nlookup = f64[(at >> 3) + 1] as number;
    const type = (u32[(at + InodeRecord.type) >> 2] as number) & S_IFMT;
    const found = u32[(at + InodeRecord.found) >> 2] as number;
    const handleBytes = u32[(at + InodeRecord.handleBytes) >> 2] as number;
    const pathBytes = u32[(at + InodeRecord.pathBytes) >> 2] as number;
    const path = at + InodeRecord.handle + padded(handleBytes);
    if (bytes < InodeRecord.handle || handleBytes > HANDLE_BYTES || InodeRecord.handle + padded(handleBytes) + pathBytes !== bytes)
      return corrupt('INODE');
    if (!Number.isSafeInteger(nlookup) || nlookup < 0 || found > Found.lost) return corrupt('INODE');
    // As name_to_handle_at(2) leaves it.
    u32[this.#handle >> 2] = handleBytes;
    u32[(this.#handle >> 2) + 1] = u32[(at + InodeRecord.handleType) >> 2] as number;
    u8.copyWithin(this.#handle + 8, at + InodeRecord.handle, at + InodeRecord.handle + padded(handleBytes));
    this.inodes++;
    if (nodeid === ROOT_NODEID) return this.#root(handleBytes);
    // Forgotten, and kept only as long as it can be (export support).
    if (nlookup === 0 && found >= Found.gone) return undefined;
    if (found === Found.gone) return restoreLost(this.#share, nodeid, nlookup, type) ? undefined : corrupt('nodeid');
    if (found === Found.handle && this.#options.mode !== 'file-handles')
      return 'the source sends file handles, which could be of files outside the shared directory: where it is trusted, use --migration-mode=file-handles here, too';
    const text = () => u8.subarray(path, path + pathBytes);
    if (found === Found.lost) return this.#lose(nodeid, nlookup, type, Buffer.from(text()).toString());
    const fd = found === Found.path ? this.#opener.open(path, pathBytes) : this.#byHandle(u32[(at + InodeRecord.mount) >> 2] as number);
    const what = () => (found === Found.path ? JSON.stringify(Buffer.from(text()).toString()) : 'an inode');
    if (fd < 0)
      return this.#lose(nodeid, nlookup, type, `${what()} cannot be opened here (errno ${-fd})${found === Found.handle ? FOREIGN : ''}`);
    let wrong: string | undefined;
    if (typeOf(fd, this.#share.attr) !== type) wrong = 'is something else here';
    else if (found === Found.path && handleBytes > 0 && !this.#same(fd)) wrong = 'is another inode here (--migration-verify-handles)';
    const error = wrong === undefined ? restoreFd(this.#share, nodeid, nlookup, fd) : 0;
    // It has taken the descriptor, or what opens it again.
    if (wrong === undefined && error > 0) return undefined;
    native.close(fd);
    if (error === 0 && wrong === undefined) return corrupt('nodeid');
    return this.#lose(nodeid, nlookup, type, `${what()} ${wrong ?? `cannot be taken over (errno ${-error})`}`);
  }

  #root(handleBytes: number): string | undefined {
    if (handleBytes === 0 || this.#same(this.#share.fd(ROOT_SLOT))) return undefined;
    return 'this is another shared directory than that of the source, where file handles mean other files: use --migration-mode=find-paths there';
  }

  #byHandle(mount: number): number {
    const mountFd = this.#mounts.get(mount) ?? -ESTALE;
    return mountFd < 0 ? mountFd : native.openByHandle(mountFd, this.#handle, O_PATH | O_NOFOLLOW);
  }

  /** Whether what is open as `fd` has the handle of the record. */
  #same(fd: number): boolean {
    const share = this.#share;
    if (native.nameToHandle(fd, EMPTY_NAME, AT_EMPTY_PATH, share.handle) < 0) return false;
    const bytes = 8 + (u32[this.#handle >> 2] as number);
    for (let i = 0; i < bytes; i++) if (u8[share.handle + i] !== u8[this.#handle + i]) return false;
    return true;
  }

  #lose(nodeid: number, nlookup: number, type: number, reason: string): string | undefined {
    if (nlookup === 0) return undefined;
    if (this.#options.onError === 'abort') return `${reason} (--migration-on-error=guest-error would go on without it)`;
    this.lost++;
    if (this.reason === '') this.reason = reason;
    return restoreLost(this.#share, nodeid, nlookup, type) ? undefined : corrupt('nodeid');
  }

  #open(at: number, bytes: number): string | undefined {
    const share = this.#share;
    const fh = whole(at);
    const nodeid = whole(at + 8);
    const kind = u32[(at + HandleRecord.kind) >> 2] as number;
    let flags = (u32[(at + HandleRecord.openFlags) >> 2] as number) | 0;
    if (bytes !== HandleRecord.bytes) return corrupt('HANDLE');
    const allowed = kind === Kind.file ? FILE_FLAGS : kind === Kind.directory ? DIRECTORY_FLAGS : 0;
    const slot = share.inodes.find(nodeid);
    if (allowed === 0 || slot < 0 || (flags & ~allowed) !== 0) return corrupt('HANDLE');
    if (!share.allowDirectIo) flags &= ~O_DIRECT;
    if (!share.preserveNoatime) flags &= ~O_NOATIME;
    const lost = u32[(at + HandleRecord.lost) >> 2] !== 0;
    let fd = -ESTALE;
    if (lost) fd = -EBADF;
    else if (kind === Kind.file && this.#options.readonly && (flags & O_ACCMODE) !== O_RDONLY) fd = -EROFS;
    else if (share.type(slot) === (kind === Kind.file ? S_IFREG : S_IFDIR)) fd = share.open(slot, flags | O_NOFOLLOW);
    if (fd < 0 && !lost) {
      if (this.#options.onError === 'abort')
        return `an open file cannot be opened here (errno ${-fd}; --migration-on-error=guest-error would go on without it)`;
      this.lost++;
      if (this.reason === '') this.reason = `an open file cannot be opened here (errno ${-fd})`;
    }
    let handleFlags = 0;
    if (flags & O_DIRECT) handleFlags |= HandleFlag.direct | HandleFlag.slowWrite;
    if (flags & O_DSYNC) handleFlags |= HandleFlag.slowWrite;
    if (share.handles.addAs(fh, Math.max(fd, -1), nodeid, kind, share.mountOf(slot), flags, handleFlags) === 0) {
      if (fd >= 0) native.close(fd);
      return corrupt('fh');
    }
    this.handles++;
    return undefined;
  }

  #lock(at: number, bytes: number): string | undefined {
    if (bytes !== LockRecord.bytes) return corrupt('LOCK');
    const nodeid = whole(at);
    const fh = whole(at + 8);
    const word = (offset: number) => u32[(at + offset) >> 2] as number;
    const lock: Lock = {
      ownerLow: word(LockRecord.ownerLow),
      ownerHigh: word(LockRecord.ownerHigh),
      startLow: word(LockRecord.startLow),
      startHigh: word(LockRecord.startHigh),
      endLow: word(LockRecord.endLow),
      endHigh: word(LockRecord.endHigh),
      type: word(LockRecord.type),
      pid: word(LockRecord.pid),
      flock: word(LockRecord.flock) !== 0,
      uniqueLow: 0,
      uniqueHigh: 0,
    };
    const { locks, handles } = this.#share;
    if (lock.type > 1 || handles.find(fh, nodeid, Kind.file) < 0) return corrupt('LOCK');
    this.locks++;
    const error = locks.takeOver(nodeid, fh, lock);
    if (error === -EAGAIN) this.locksTaken++;
    else if (error < 0) {
      const reason = `a lock cannot be set here (errno ${-error})`;
      if (this.#options.onError === 'abort') return `${reason} (--migration-on-error=guest-error would go on without it)`;
      this.lost++;
      if (this.reason === '') this.reason = reason;
    }
    return undefined;
  }

  #watch(at: number, bytes: number): string | undefined {
    const fsnotify = this.#fsnotify;
    if (bytes !== 16 || this.#session?.fsnotify !== true || fsnotify === undefined) return corrupt('WATCH');
    if (this.watches++ === 0) this.#server.resumeEvents();
    const nodeid = whole(at);
    const mask = u32[(at >> 2) + 2] as number;
    // A watch that cannot be had again is covered by the overflow record, as all that happened meanwhile.
    if (nodeid === 0) fsnotify.watch(ROOT_NODEID, 0, mask & fsnotify.supportedLow, 0, FSNOTIFY_ALL);
    else fsnotify.watch(nodeid, 0, mask & fsnotify.supportedLow, 0, 0);
    return undefined;
  }

  #end(at: number, bytes: number): string | undefined {
    const i = at >> 2;
    if (bytes !== 16 || u32[i] !== this.inodes || u32[i + 1] !== this.handles || u32[i + 2] !== this.watches || u32[i + 3] !== this.locks)
      return corrupt('END');
    if (this.#session?.fsnotify) {
      if (this.watches === 0) this.#server.resumeEvents();
      this.#fsnotify?.notifier.overflow();
    }
    this.complete = true;
    return undefined;
  }

  close(): void {
    this.#opener.close();
    for (const fd of this.#mounts.values()) if (fd >= 0) native.close(fd);
    this.#mounts.clear();
    arenaFree(this.#handle, 192);
  }
}

/** A nodeid or file handle; -1, which is neither, for what no store gives out. */
function whole(at: number): number {
  const value = f64[at >> 3] as number;
  return Number.isSafeInteger(value) && value >= 0 ? value : -1;
}

const FOREIGN = ': handles are of use to a daemon that shares the same directory of the same host file system alone';

function corrupt(what: string): string {
  return `the state is damaged (${what})`;
}
