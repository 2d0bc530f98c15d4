/** Writes the state of a session: what the guest holds of us, in the records of stream.ts. */
import { arena, EMPTY_NAME, native } from 'vhost-user-ts/native';
import type { Lock } from '../fs/filesystem.js';
import { Kind } from '../fs/handles.js';
import { Inode, ROOT_SLOT, SHIFT } from '../fs/inodes.js';
import { AT_EMPTY_PATH, ESTALE, S_IFDIR, Statx } from '../fs/linux.js';
import { LOOKUP_MASK, type Share } from '../fs/passthrough/share.js';
import type { Session } from '../fuse/init.js';
import type { Fsnotify } from '../watch/fsnotify.js';
import { Paths } from './paths.js';
import {
  Found,
  HandleRecord,
  InodeRecord,
  LockRecord,
  MAGIC_HIGH,
  MAGIC_LOW,
  PATH_BYTES,
  padded,
  RecordType,
  type StateWriter,
  VERSION,
} from './stream.js';

const { u8, u32, f64 } = arena;

/** `--migration-mode`. */
export type MigrationMode = 'find-paths' | 'file-handles';

export interface SaveOptions {
  mode: MigrationMode;
  /** Paths go with the inodes' file handles, which the destination compares. */
  verifyHandles: boolean;
  /** What the search has found is looked at once more before it is written. */
  confirmPaths: boolean;
}

/** What was written, for people. */
export interface Saved {
  inodes: number;
  handles: number;
  watches: number;
  locks: number;
  /** Inodes and open files that the destination cannot have, and what the first of them is. */
  lost: number;
  reason: string;
}

/** Why an inode is lost, as the destination is told it. */
const UNLINKED = 'it was deleted and is still open, so it has no path: with --migration-mode=file-handles it can be taken along';
const NO_PATH = 'no path below the shared directory leads to it';
const NO_HANDLE = 'its file system has no file handles: --migration-mode=find-paths does without';

/**
 * Writes a session, in steps: after each `yield` the writer has something to send, and has room again before the next step.
 * The guest stands still, and nothing of the session changes meanwhile.
 */
export function* save(
  session: Session,
  share: Share,
  fsnotify: Fsnotify | undefined,
  options: Readonly<SaveOptions>,
  out: StateWriter,
  saved: Saved,
): Generator<void> {
  out.begin(RecordType.start);
  u32[out.body >> 2] = MAGIC_LOW;
  u32[(out.body >> 2) + 1] = MAGIC_HIGH;
  u32[(out.body >> 2) + 2] = VERSION;
  u32[(out.body >> 2) + 3] = 0;
  out.end(16);
  if (session.minor !== 0) {
    writeSession(session, share, out);
    yield* new InodeSaver(share, options, out, saved).run();
    yield* saveHandles(share, out, saved);
    yield* saveLocks(share, out, saved);
    if (session.fsnotify && fsnotify !== undefined) yield* saveWatches(fsnotify, out, saved);
  }
  out.begin(RecordType.end);
  u32[out.body >> 2] = saved.inodes;
  u32[(out.body >> 2) + 1] = saved.handles;
  u32[(out.body >> 2) + 2] = saved.watches;
  u32[(out.body >> 2) + 3] = saved.locks;
  out.end(16);
  yield;
}

/** SESSION: u32 minor, flags, flags2, max_readahead, and the youngest generation of inodes and of handles. */
function writeSession(session: Session, share: Share, out: StateWriter): void {
  out.begin(RecordType.session);
  const at = out.body >> 2;
  u32[at] = session.minor;
  u32[at + 1] = session.flags;
  u32[at + 2] = session.flags2;
  u32[at + 3] = session.maxReadahead;
  u32[at + 4] = share.inodes.generation;
  u32[at + 5] = share.handles.generation;
  out.end(24);
}

class InodeSaver {
  readonly #share: Share;
  readonly #options: Readonly<SaveOptions>;
  readonly #out: StateWriter;
  readonly #saved: Saved;
  readonly #paths: Paths;
  /** Slots of inodes that the guest has open. */
  readonly #open = new Set<number>();
  readonly #mounts = new Set<number>();

  constructor(share: Share, options: Readonly<SaveOptions>, out: StateWriter, saved: Saved) {
    this.#share = share;
    this.#options = options;
    this.#out = out;
    this.#saved = saved;
    this.#paths = new Paths(share);
    const { handles, inodes } = share;
    for (let slot = 1; slot < handles.top; slot++)
      if (handles.live(slot) && handles.kind(slot) !== Kind.lock) this.#open.add(inodes.find(handles.nodeid(slot)));
  }

  *run(): Generator<void> {
    const { inodes } = this.#share;
    const missing = new Set<number>();
    try {
      for (let slot = ROOT_SLOT; slot < inodes.top; slot++) {
        if (!inodes.live(slot)) continue;
        if (!this.#inode(slot)) missing.add(slot);
        if (this.#out.full) yield;
      }
      if (missing.size > 0) yield* this.#search(missing);
    } finally {
      this.#paths.free();
    }
  }

  /** Writes one inode; false when its path is to be searched for. */
  #inode(slot: number): boolean {
    const share = this.#share;
    const fd = share.fd(slot);
    // Gone from the host: the guest is told so when it asks.
    if (fd === -ESTALE) {
      this.#write(slot, Found.gone, '');
      return true;
    }
    let error = fd < 0 ? fd : native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, share.attr);
    if (error < 0) return this.#lose(slot, `it cannot be opened (errno ${-error})`);
    const unlinked = u32[(share.attr + Statx.nlink) >> 2] === 0;
    if (unlinked && !this.#open.has(slot)) {
      this.#write(slot, Found.gone, '');
      return true;
    }
    const byHandle = this.#options.mode === 'file-handles';
    if (byHandle || this.#options.verifyHandles) {
      error = share.nameToHandle(fd, EMPTY_NAME, AT_EMPTY_PATH, share.mountOf(slot));
      if (error < 0) return this.#lose(slot, NO_HANDLE);
    } else u32[share.handle >> 2] = 0;
    if (byHandle) {
      if (!this.#mount(slot, fd)) return this.#lose(slot, 'the place of its mount cannot be found');
      this.#write(slot, Found.handle, '');
      return true;
    }
    if (unlinked) return this.#lose(slot, UNLINKED);
    const bytes = this.#paths.link(slot, fd);
    if (bytes < 0) return false;
    this.#write(slot, Found.path, u8.subarray(this.#paths.path, this.#paths.path + bytes));
    return true;
  }

  *#search(missing: Set<number>): Generator<void> {
    const share = this.#share;
    const found = new Map<number, Buffer>();
    this.#paths.search(missing, (slot, path) => found.set(slot, path));
    for (const [slot, path] of found) {
      let where: Uint8Array = path;
      if (this.#options.confirmPaths && !this.#confirm(slot, path)) {
        // It was moved meanwhile: the kernel may know by now where to.
        const fd = share.fd(slot);
        const bytes = fd < 0 ? fd : this.#paths.link(slot, fd);
        if (bytes < 0) {
          this.#lose(slot, NO_PATH);
          continue;
        }
        where = u8.slice(this.#paths.path, this.#paths.path + bytes);
      }
      u32[share.handle >> 2] = 0;
      const fd = this.#options.verifyHandles ? share.fd(slot) : -1;
      if (fd >= 0 && share.nameToHandle(fd, EMPTY_NAME, AT_EMPTY_PATH, share.mountOf(slot)) < 0) this.#lose(slot, NO_HANDLE);
      else this.#write(slot, Found.path, where);
      if (this.#out.full) yield;
    }
    for (const slot of missing) {
      this.#lose(slot, NO_PATH);
      if (this.#out.full) yield;
    }
  }

  #confirm(slot: number, path: Buffer): boolean {
    u8.set(path, this.#paths.path);
    u8[this.#paths.path + path.length] = 0;
    return this.#paths.leads(slot, this.#paths.path);
  }

  /** MOUNT: u32 index, u32 bytes of the path, a path on it, which handles are opened by. False when that has none. */
  #mount(slot: number, fd: number): boolean {
    const share = this.#share;
    const index = share.mountOf(slot);
    if (this.#mounts.has(index)) return true;
    const known = share.mounts.fd(index);
    // Without handles of our own no mount has a descriptor: any directory on it leads there.
    if (known < 0 && share.type(slot) !== S_IFDIR) return false;
    const bytes = this.#paths.place(known < 0 ? fd : known);
    if (bytes < 0) return false;
    const out = this.#out;
    out.begin(RecordType.mount);
    u32[out.body >> 2] = index;
    u32[(out.body >> 2) + 1] = bytes;
    u8.copyWithin(out.body + 8, this.#paths.path, this.#paths.path + bytes);
    out.end(8 + bytes);
    this.#mounts.add(index);
    return true;
  }

  #lose(slot: number, reason: string): true {
    this.#saved.lost++;
    if (this.#saved.reason === '') this.#saved.reason = reason;
    u32[this.#share.handle >> 2] = 0;
    this.#write(slot, Found.lost, reason);
    return true;
  }

  /** INODE. Its handle is in `share.handle`, of length 0 when none is to be written. */
  #write(slot: number, found: number, path: string | Uint8Array): void {
    const { inodes, handle } = this.#share;
    const out = this.#out;
    const at = slot << SHIFT;
    const bytes = typeof path === 'string' ? Buffer.from(path) : path;
    const handleBytes = found === Found.gone || found === Found.lost ? 0 : (u32[handle >> 2] as number);
    out.begin(RecordType.inode);
    f64[out.body >> 3] = inodes.nodeid(slot);
    f64[(out.body >> 3) + 1] = inodes.f64[(at + Inode.nlookup) >> 1] as number;
    u32[(out.body + InodeRecord.type) >> 2] = inodes.u32[at + Inode.type] as number;
    u32[(out.body + InodeRecord.found) >> 2] = found;
    u32[(out.body + InodeRecord.mount) >> 2] = inodes.u32[at + Inode.mount] as number;
    u32[(out.body + InodeRecord.handleBytes) >> 2] = handleBytes;
    u32[(out.body + InodeRecord.handleType) >> 2] = u32[(handle >> 2) + 1] as number;
    u32[(out.body + InodeRecord.pathBytes) >> 2] = Math.min(bytes.length, PATH_BYTES);
    let end = out.body + InodeRecord.handle;
    u8.fill(0, end, end + padded(handleBytes));
    u8.copyWithin(end, handle + 8, handle + 8 + handleBytes);
    end += padded(handleBytes);
    u8.set(bytes.subarray(0, PATH_BYTES), end);
    out.end(end + Math.min(bytes.length, PATH_BYTES) - out.body);
    this.#saved.inodes++;
  }
}

/** HANDLE. Where a directory stands need not be said: each READDIR says where it goes on. */
function* saveHandles({ handles }: Share, out: StateWriter, saved: Saved): Generator<void> {
  for (let slot = 1; slot < handles.top; slot++) {
    if (!handles.live(slot) || handles.kind(slot) === Kind.lock) continue;
    out.begin(RecordType.handle);
    f64[out.body >> 3] = handles.fh(slot);
    f64[(out.body >> 3) + 1] = handles.nodeid(slot);
    u32[(out.body + HandleRecord.kind) >> 2] = handles.kind(slot);
    u32[(out.body + HandleRecord.openFlags) >> 2] = handles.openFlags(slot);
    u32[(out.body + HandleRecord.lost) >> 2] = handles.fd(slot) < 0 ? 1 : 0;
    u32[(out.body + HandleRecord.lost + 4) >> 2] = 0;
    out.end(HandleRecord.bytes);
    saved.handles++;
    if (out.full) yield;
  }
}

/** LOCK. Nobody waits for one: requests that did were answered when the queues stopped. */
function* saveLocks({ handles, locks }: Share, out: StateWriter, saved: Saved): Generator<void> {
  const list: [nodeid: number, fh: number, lock: Lock][] = [];
  locks.held((nodeid, file, lock) => list.push([nodeid, handles.fh(file), { ...lock }]));
  for (const [nodeid, fh, lock] of list) {
    out.begin(RecordType.lock);
    f64[out.body >> 3] = nodeid;
    f64[(out.body >> 3) + 1] = fh;
    for (const name of ['ownerLow', 'ownerHigh', 'startLow', 'startHigh', 'endLow', 'endHigh', 'type', 'pid'] as const)
      u32[(out.body + LockRecord[name]) >> 2] = lock[name];
    u32[(out.body + LockRecord.flock) >> 2] = lock.flock ? 1 : 0;
    u32[(out.body + LockRecord.flock + 4) >> 2] = 0;
    out.end(LockRecord.bytes);
    saved.locks++;
    if (out.full) yield;
  }
}

/** WATCH: f64 nodeid (0: everything that the guest looks up), u32 mask. */
function* saveWatches(fsnotify: Fsnotify, out: StateWriter, saved: Saved): Generator<void> {
  const all = fsnotify.maskOfAll === 0 ? [] : [{ nodeid: 0, mask: fsnotify.maskOfAll }];
  for (const watches of [all, fsnotify.all()]) {
    for (const { nodeid, mask } of watches) {
      out.begin(RecordType.watch);
      f64[out.body >> 3] = nodeid;
      u32[(out.body >> 2) + 2] = mask;
      u32[(out.body >> 2) + 3] = 0;
      out.end(16);
      saved.watches++;
      if (out.full) yield;
    }
  }
}
