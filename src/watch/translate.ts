/**
 * The host's events in the guest's words: nodeids for handles, one bit a record, only what the guest asked for, and before each
 * event what makes the guest's caches fresh (PROTOCOL.md, "Caches").
 */
import { arena, arenaAlloc, cString, EMPTY_NAME, native } from 'vhost-user-ts/native';
import { Counter, type Counters } from './counters.js';
import {
  DIRENT,
  FS_ATTRIB,
  FS_CLOSE_WRITE,
  FS_CREATE,
  FS_DELETE,
  FS_DELETE_SELF,
  FS_EVENT_ON_CHILD,
  FS_ISDIR,
  FS_MODIFY,
  FS_MOVE_SELF,
  FS_MOVED_FROM,
  FS_MOVED_TO,
  FS_RENAME,
  ON_CHILD,
  ORDER,
} from './mask.js';
import type { WatchNodes } from './nodes.js';
import type { Notifier } from './notifier.js';
import type { WatchTable } from './table.js';
import type { EventSink } from './watcher.js';

/** What the guest caches, so that no message is spent on what it does not. */
export interface GuestCaches {
  /** Attributes and data. */
  inodes: boolean;
  /** Names that exist. */
  entries: boolean;
  /** Names that do not exist. */
  negative: boolean;
}

/** The guest's file may have other data. */
const DATA = FS_MODIFY | FS_CLOSE_WRITE;
const AT_EMPTY_PATH = 0x1000;
const STATX_NLINK_BIT = 4;
const STATX_NLINK = 16;
const ENOENT = 2;
const ESTALE = 116;
/** Where a DELETE says that a node ended whose name is not known: no directory has this one. */
const ROOT = 1;
const DOT = cString('.', arenaAlloc(8));

export class Translator implements EventSink {
  readonly caches: Readonly<GuestCaches>;

  readonly #table: WatchTable;
  readonly #nodes: WatchNodes;
  readonly #out: Notifier;
  readonly #counters: Counters;
  readonly #statx = arenaAlloc(256);

  constructor(table: WatchTable, nodes: WatchNodes, out: Notifier, counters: Counters, caches: Readonly<GuestCaches>) {
    this.#table = table;
    this.caches = caches;
    this.#nodes = nodes;
    this.#out = out;
    this.#counters = counters;
  }

  batch(): void {
    this.#out.batch();
  }

  overflow(): void {
    this.#counters.add(Counter.hostOverflows);
    this.#out.overflow();
  }

  named(mask: number, directory: number, child: number, name: number, nameLength: number, handle: number, known: number): void {
    const table = this.#table;
    let told = 0;
    for (let slot = directory; slot !== 0; slot = table.next[slot] as number) {
      const parent = table.nodeid[slot] as number;
      let nodeid = known !== 0 ? known : this.#child(handle, parent, child === 0 && (mask & FS_DELETE) === 0 ? parent : 0, name);
      let childSlot = child === 0 ? 0 : nodeid === 0 ? this.#onMountOf(child, parent) : table.find(nodeid);
      // A slot that only guards is not the guest's watch.
      if (childSlot !== 0 && table.mask[childSlot] === 0) childSlot = 0;
      if (childSlot !== 0) {
        nodeid = table.nodeid[childSlot] as number;
        told = childSlot;
      }
      this.#one(mask, slot, parent, childSlot, nodeid, name, nameLength);
    }
    if (child === 0 || (mask & ON_CHILD) === 0 || (told === child && table.next[child] === 0)) return;
    // The child is watched through other mounts, too, or not through the one of a watched parent.
    for (let slot = child; slot !== 0; slot = table.next[slot] as number) if (slot !== told) this.#self(mask & (ON_CHILD | FS_ISDIR), slot);
  }

  self(mask: number, head: number): void {
    for (let slot = head; slot !== 0; slot = this.#table.next[slot] as number) this.#self(mask, slot);
  }

  renamed(
    isdir: number,
    from: number,
    fromName: number,
    fromLength: number,
    to: number,
    toName: number,
    toLength: number,
    handle: number,
    known: number,
    cookie: number,
  ): void {
    const table = this.#table;
    const single = (from === 0 || table.next[from] === 0) && (to === 0 || table.next[to] === 0);
    if (single) {
      if (from === 0 || to === 0 || this.#nodes.sameMount(table.nodeid[from] as number, table.nodeid[to] as number)) {
        this.#rename(isdir, from, fromName, fromLength, to, toName, toLength, handle, known, cookie);
        return;
      }
    }
    // Directories that the guest knows through several mounts: each pair on one mount, and the rest by halves.
    for (let f = from; f !== 0; f = table.next[f] as number) {
      const t = to === 0 ? 0 : this.#onMountOf(to, table.nodeid[f] as number);
      this.#rename(isdir, f, fromName, fromLength, t, toName, toLength, handle, known, cookie);
    }
    for (let t = to; t !== 0; t = table.next[t] as number) {
      if (from === 0 || this.#onMountOf(from, table.nodeid[t] as number) === 0)
        this.#rename(isdir, 0, 0, 0, t, toName, toLength, handle, known, cookie);
    }
  }

  /** An event with a name, for one directory that the guest knows. `nodeid` 0: the guest does not know the child. */
  #one(mask: number, slot: number, parent: number, childSlot: number, nodeid: number, name: number, nameLength: number): void {
    const table = this.#table;
    const out = this.#out;
    const wanted = table.mask[slot] as number;
    const isdir = mask & FS_ISDIR;
    const isGuard = wanted === 0;
    if (isGuard && (mask & FS_DELETE) !== 0 && childSlot !== 0 && this.#gone(nodeid, isdir)) {
      out.deleteEntry(parent, nodeid, name, nameLength);
      return;
    }
    if ((mask & DIRENT) !== 0) {
      if (this.caches.inodes) {
        out.invalInode(parent, true);
        if (nodeid !== 0) out.invalInode(nodeid, false); // its link count
      }
      if ((mask & FS_CREATE) !== 0 && this.caches.negative) out.invalEntry(parent, name, nameLength);
    }
    if (nodeid !== 0 && this.caches.inodes) {
      if ((mask & DATA) !== 0) out.invalInode(nodeid, true);
      else if ((mask & FS_ATTRIB) !== 0) out.invalInode(nodeid, false);
    }
    const forChild = childSlot === 0 ? 0 : (table.mask[childSlot] as number) & ON_CHILD;
    const forDirectory = wanted & (ON_CHILD | DIRENT) & ((wanted & FS_EVENT_ON_CHILD) !== 0 ? ~0 : ~ON_CHILD);
    const generation = table.generation[slot] as number;
    const childGeneration = nodeid === 0 ? 0 : this.#nodes.generation(nodeid);
    for (let i = 0; i < ORDER.length; i++) {
      const bit = ORDER[i] as number;
      if ((mask & bit) === 0) continue;
      if (bit === FS_DELETE && this.caches.entries) {
        if (childSlot !== 0 && this.#gone(nodeid, isdir)) out.deleteEntry(parent, nodeid, name, nameLength);
        else out.invalEntry(parent, name, nameLength);
      }
      if ((bit & (FS_MOVED_FROM | FS_MOVED_TO)) !== 0) {
        // Kernels without FAN_RENAME (before 5.17): two events that nothing joins.
        if (this.caches.entries) out.invalEntry(parent, name, nameLength);
        if ((wanted & (bit | FS_RENAME)) !== 0)
          out.record((bit | isdir) >>> 0, parent, generation, nodeid, childGeneration, 0, name, nameLength);
      } else if ((forDirectory & bit) !== 0) {
        const on = (bit & ON_CHILD) !== 0 ? FS_EVENT_ON_CHILD : 0;
        out.record((bit | isdir | on) >>> 0, parent, generation, nodeid, childGeneration, 0, name, nameLength);
      } else if ((forChild & bit) !== 0) out.record((bit | isdir) >>> 0, nodeid, childGeneration, 0, 0, 0, 0, 0);
    }
  }

  #self(mask: number, slot: number): void {
    const table = this.#table;
    const nodeid = table.nodeid[slot] as number;
    if (this.caches.inodes) {
      if ((mask & DATA) !== 0) this.#out.invalInode(nodeid, true);
      else if ((mask & (FS_ATTRIB | FS_MOVE_SELF)) !== 0) this.#out.invalInode(nodeid, false);
    }
    const wanted = table.mask[slot] as number;
    const bits = mask & wanted & (ON_CHILD | FS_MOVE_SELF) & ~FS_DELETE_SELF;
    for (let i = 0; bits !== 0 && i < ORDER.length; i++) {
      const bit = ORDER[i] as number;
      if ((bits & bit) !== 0) this.#out.record((bit | (mask & FS_ISDIR)) >>> 0, nodeid, table.generation[slot] as number, 0, 0, 0, 0, 0);
    }
    // A file whose link count changed, to 0: removed or replaced, by what name is not said. Of a directory its parent tells.
    if ((mask & (FS_ATTRIB | FS_ISDIR)) === FS_ATTRIB && (wanted & FS_DELETE_SELF) !== 0 && this.#ended(nodeid))
      this.#out.deleteEntry(ROOT, nodeid, DOT, 1);
  }

  #rename(
    isdir: number,
    from: number,
    fromName: number,
    fromLength: number,
    to: number,
    toName: number,
    toLength: number,
    handle: number,
    known: number,
    cookie: number,
  ): void {
    const table = this.#table;
    const out = this.#out;
    const near = from !== 0 ? from : to;
    if (near === 0) return;
    const child =
      known !== 0 ? known : this.#child(handle, table.nodeid[near] as number, to === 0 ? 0 : (table.nodeid[to] as number), toName);
    const childGeneration = child === 0 ? 0 : this.#nodes.generation(child);
    const source = from === 0 ? 0 : (table.nodeid[from] as number);
    const target = to === 0 ? 0 : (table.nodeid[to] as number);
    if (this.caches.entries) {
      if (from !== 0) out.invalEntry(source, fromName, fromLength);
      if (to !== 0) out.invalEntry(target, toName, toLength);
    }
    if (this.caches.inodes) {
      if (from !== 0) out.invalInode(source, true);
      if (to !== 0) out.invalInode(target, true);
      if (child !== 0) out.invalInode(child, false);
    }
    const wantsFrom = from !== 0 && ((table.mask[from] as number) & (FS_MOVED_FROM | FS_RENAME)) !== 0;
    const wantsTo = to !== 0 && ((table.mask[to] as number) & (FS_MOVED_TO | FS_RENAME)) !== 0;
    const fromGeneration = from === 0 ? 0 : (table.generation[from] as number);
    const toGeneration = to === 0 ? 0 : (table.generation[to] as number);
    const maskFrom = (FS_MOVED_FROM | isdir) >>> 0;
    const maskTo = (FS_MOVED_TO | isdir) >>> 0;
    if (wantsFrom && wantsTo) {
      out.rename(
        maskFrom,
        source,
        fromGeneration,
        fromName,
        fromLength,
        maskTo,
        target,
        toGeneration,
        toName,
        toLength,
        child,
        childGeneration,
      );
    } else if (wantsFrom) out.record(maskFrom, source, fromGeneration, child, childGeneration, cookie, fromName, fromLength);
    else if (wantsTo) out.record(maskTo, target, toGeneration, child, childGeneration, cookie, toName, toLength);
  }

  /**
   * The nodeid of an event's child by its handle, or what has its name in directory `named` now (0: none) where the store knows no handles:
   * what is invalidated in vain then costs little.
   */
  #child(handle: number, near: number, named: number, name: number): number {
    if (handle === 0) return 0;
    const nodeid = this.#nodes.byHandle(handle, near);
    return nodeid !== 0 || named === 0 || this.#nodes.hasHandles(near) ? nodeid : this.#nodes.byName(named, name);
  }

  /** The slot of a chain that is on the mount of `nodeid`, or 0. */
  #onMountOf(head: number, nodeid: number): number {
    for (let slot = head; slot !== 0; slot = this.#table.next[slot] as number) {
      if (this.#nodes.sameMount(this.#table.nodeid[slot] as number, nodeid)) return slot;
    }
    return 0;
  }

  /** Whether a node has no name any more, as far as can be known. */
  #ended(nodeid: number): boolean {
    const fd = this.#nodes.fd(nodeid);
    if (fd < 0) return fd === -ESTALE || fd === -ENOENT;
    return (
      native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, STATX_NLINK_BIT, this.#statx) === 0 && arena.u32[(this.#statx + STATX_NLINK) >> 2] === 0
    );
  }

  /** Whether a removed name was the last one of its inode. */
  #gone(nodeid: number, isdir: number): boolean {
    if (isdir !== 0) return true;
    const fd = this.#nodes.fd(nodeid);
    if (fd < 0 || native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, STATX_NLINK_BIT, this.#statx) < 0) return true;
    return arena.u32[(this.#statx + STATX_NLINK) >> 2] === 0;
  }
}
