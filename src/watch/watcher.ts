/**
 * What every host watcher is to the rest of the daemon, and what both kinds share: slots, objects, the guest's limit, and guards.
 *
 * A **guard** is a mark that the guest did not ask for, on the parent of a directory that it watches. Of the end of a watched
 * directory the kernel tells nobody but its parent while anybody, as our inode store, holds a descriptor of it; and the guest
 * makes DELETE_SELF and IGNORED itself out of FUSE_NOTIFY_DELETE, which names the parent.
 */

import { arenaAlloc, cString } from 'vhost-user-ts/native';
import { FS_EVENT_ON_CHILD, FS_MOVE_SELF } from './mask.js';
import type { WatchNodes } from './nodes.js';
import { grown, Numbers, type WatchTable } from './table.js';

export const ENOENT = 2;
export const EAGAIN = 11;
export const ENOSPC = 28;
export const EOPNOTSUPP = 95;

/** Takes what a drain found, in the host's order. Slots are heads of the chains of {@link WatchTable}; 0: not watched. */
export interface EventSink {
  /** What follows was read from the host in one go: all of it has already happened. */
  batch(): void;
  /**
   * Something with a name: `mask` has one or more bits (merged by the host), of which those that belong to the directory concern
   * `directory` and the others the child. `name` is an arena offset of `nameLength` bytes with a NUL.
   * The child's nodeid is `known`, or found by `handle`, the arena offset of its `struct file_handle`; each may be 0.
   */
  named(mask: number, directory: number, child: number, name: number, nameLength: number, handle: number, known: number): void;
  /** Something that happened to a watched object itself. */
  self(mask: number, slot: number): void;
  /** A rename; `from` or `to` may be 0. `cookie` is not 0 when the two halves come in two calls. */
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
  ): void;
  /** The host lost events. */
  overflow(): void;
}

/** A host watcher. */
export interface HostWatcher {
  readonly kind: 'fanotify' | 'inotify' | 'both';
  /** All FS_* bits that it can deliver, with the modifiers. */
  readonly supported: number;
  /** Readable when there are events. */
  readonly fd: number;
  readonly table: WatchTable;
  /**
   * Watches a node with this absolute mask (0: no more); the host's mark is in place when it returns.
   * @returns 0; -EOPNOTSUPP for bits that are not in {@link supported}; -ENOSPC at the guest's or the system's limit; what the
   *   system call said.
   */
  set(nodeid: number, mask: number): number;
  /** Marks a directory with FS_* bits that the guest does not hear of, so that what it caches can be invalidated; 0: no more. */
  keep(nodeid: number, bits: number): number;
  /** The guest forgot the node: everything about it ends. While `fd(nodeid)` still works. */
  forget(nodeid: number): void;
  /** Reads events, at most `reads` times a buffer full (some 650 events, about a millisecond). Returns whether there may be more. */
  drain(sink: EventSink, reads?: number): boolean;
  /** Sets the marks of at most `count` slots from `from` on again, for the case that one got lost. Returns where to go on, 0 at the end. */
  rearm(from: number, count: number): number;
  /** Ends all watches. */
  clear(): void;
  /** Reads what there is and forgets it. */
  discard(): void;
  close(): void;
}

/** Slots, objects and guards; marks are the business of the two kinds. */
export abstract class Watcher implements HostWatcher {
  abstract readonly kind: HostWatcher['kind'];
  abstract readonly supported: number;
  abstract readonly fd: number;
  readonly table: WatchTable;
  protected readonly nodes: WatchNodes;

  /** Per object: first slot of its chain, and the mark's mask in the host's words. */
  protected head = new Int32Array(64);
  protected have = new Uint32Array(64);
  protected readonly objects = new Numbers();
  /** Bits that some directory wants of its children: others need no look for a parent. Never narrowed while there are watches. */
  protected childBits = 0;

  readonly #limit: number;
  readonly #keep = new Map<number, number>();

  constructor(nodes: WatchNodes, limit: number, table: WatchTable) {
    this.nodes = nodes;
    this.#limit = limit;
    this.table = table;
  }

  abstract drain(sink: EventSink, reads?: number): boolean;

  /** The host's mask for what a slot wants. */
  protected abstract hostMask(slot: number): number;
  /** Finds or makes the object of a node behind `fd`; a new one has `have` 0 and no slots. -errno. */
  protected abstract identify(slot: number, fd: number): number;
  /** Changes a mark from `have` to `want`. -errno, then nothing has changed. */
  protected abstract mark(object: number, fd: number, have: number, want: number): number;
  /** Removes the mark; the object's number ends. `fd` may be an error. */
  protected abstract unmark(object: number, fd: number): void;

  set(nodeid: number, mask: number): number {
    if ((mask & ~this.supported) !== 0) return -EOPNOTSUPP;
    const table = this.table;
    const slot = table.find(nodeid);
    if (slot !== 0 && table.mask[slot] === mask) return 0;
    if (mask === 0) {
      if (slot !== 0) this.#end(slot);
      return 0;
    }
    if ((slot === 0 || table.mask[slot] === 0) && table.watches >= this.#limit) return -ENOSPC;
    const error = this.#want(slot, nodeid, mask);
    if (error < 0) return error;
    if ((mask & FS_EVENT_ON_CHILD) !== 0) this.childBits |= mask;
    const now = table.find(nodeid);
    if (table.directory[now] === 1 && table.guardedBy[now] === 0) this.#guard(now);
    return 0;
  }

  keep(nodeid: number, bits: number): number {
    const before = this.#keep.get(nodeid) ?? 0;
    if (before === bits) return 0;
    if (bits === 0) this.#keep.delete(nodeid);
    else this.#keep.set(nodeid, bits);
    const slot = this.table.find(nodeid);
    if (bits === 0) {
      if (slot !== 0) this.#release(slot);
      return 0;
    }
    const error = this.#want(slot, nodeid, slot === 0 ? 0 : (this.table.mask[slot] as number));
    if (error < 0) {
      if (before === 0) this.#keep.delete(nodeid);
      else this.#keep.set(nodeid, before);
      return error;
    }
    if ((bits & FS_EVENT_ON_CHILD) !== 0) this.childBits |= bits;
    return 0;
  }

  /** What {@link keep} was asked for. */
  protected kept(slot: number): number {
    return this.#keep.size === 0 ? 0 : (this.#keep.get(this.table.nodeid[slot] as number) ?? 0);
  }

  forget(nodeid: number): void {
    const table = this.table;
    this.#keep.delete(nodeid);
    const slot = table.find(nodeid);
    if (slot === 0) return;
    if ((table.guards[slot] as number) > 0) {
      for (let i = 1; i < table.top; i++) {
        if (table.guardedBy[i] !== slot || table.nodeid[i] === 0) continue;
        this.unguarded(i, slot);
        table.guardedBy[i] = 0;
      }
      table.guards[slot] = 0;
    }
    this.#end(slot);
  }

  rearm(from: number, count: number): number {
    const { table } = this;
    const end = Math.min(from + count, table.top);
    for (let slot = from; slot < end; slot++) {
      const object = table.object[slot] as number;
      if (table.nodeid[slot] === 0 || object === 0 || this.head[object] !== slot) continue;
      const fd = this.nodes.fd(table.nodeid[slot] as number);
      if (fd >= 0) this.mark(object, fd, 0, this.have[object] as number);
    }
    return end < table.top ? end : 0;
  }

  clear(): void {
    this.table.clear();
    this.#keep.clear();
    this.objects.clear();
    this.head.fill(0);
    this.have.fill(0);
    this.childBits = 0;
  }

  abstract discard(): void;
  abstract close(): void;

  /** A watched directory was moved: another one guards it now. */
  protected moved(head: number): void {
    for (let slot = head; slot !== 0; slot = this.table.next[slot] as number) {
      if (this.table.directory[slot] === 0 || this.table.mask[slot] === 0) continue;
      this.#unguard(slot);
      this.#guard(slot);
    }
  }

  protected newObject(): number {
    const object = this.objects.take();
    if (object >= this.head.length) {
      this.head = grown(this.head, new Int32Array(this.head.length * 2));
      this.have = grown(this.have, new Uint32Array(this.have.length * 2));
    }
    this.head[object] = 0;
    this.have[object] = 0;
    return object;
  }

  /** Gives a slot (0: a new one for `nodeid`) this mask, and the object its mark. On an error everything is as before. */
  #want(slot: number, nodeid: number, mask: number): number {
    const table = this.table;
    if (slot === 0) {
      const fd = this.nodes.fd(nodeid);
      if (fd < 0) return fd;
      const added = table.add(nodeid, this.nodes.generation(nodeid), this.nodes.isDirectory(nodeid));
      table.setMask(added, mask);
      const object = this.identify(added, fd);
      if (object < 0) {
        table.remove(added);
        return object;
      }
      table.object[added] = object;
      table.next[added] = this.head[object] as number;
      this.head[object] = added;
      const error = this.#refresh(object, fd);
      if (error < 0) this.#drop(added);
      return error;
    }
    const before = table.mask[slot] as number;
    table.setMask(slot, mask);
    const error = this.#refresh(table.object[slot] as number, -1);
    if (error < 0) table.setMask(slot, before);
    return error;
  }

  /** Makes the mark what the slots of the object want together. */
  #refresh(object: number, fd: number): number {
    let want = 0;
    for (let slot = this.head[object] as number; slot !== 0; slot = this.table.next[slot] as number) want |= this.hostMask(slot);
    want >>>= 0;
    const have = this.have[object] as number;
    if (want === have) return 0;
    if (fd < 0) fd = this.nodes.fd(this.table.nodeid[this.head[object] as number] as number);
    if (fd < 0) return fd;
    const error = this.mark(object, fd, have, want);
    if (error < 0) return error;
    this.have[object] = want;
    return 0;
  }

  /** The guest's watch ends. */
  #end(slot: number): void {
    this.#unguard(slot);
    this.table.setMask(slot, 0);
    this.#release(slot);
    if (this.table.watches === 0) this.childBits = 0;
  }

  /** Ends a slot that nothing needs any more, or narrows its mark. */
  #release(slot: number): void {
    const table = this.table;
    if (table.mask[slot] !== 0 || (table.guards[slot] as number) > 0 || this.kept(slot) !== 0) {
      this.#refresh(table.object[slot] as number, -1);
      return;
    }
    this.#drop(slot);
  }

  #drop(slot: number): void {
    const table = this.table;
    const object = table.object[slot] as number;
    const fd = this.nodes.fd(table.nodeid[slot] as number);
    if (this.head[object] === slot) this.head[object] = table.next[slot] as number;
    else {
      let before = this.head[object] as number;
      while (table.next[before] !== slot) before = table.next[before] as number;
      table.next[before] = table.next[slot] as number;
    }
    table.remove(slot);
    if (this.head[object] !== 0) {
      this.#refresh(object, fd);
      return;
    }
    this.unmark(object, fd);
    this.have[object] = 0;
    this.objects.give(object);
  }

  /** Has the parent of a watched directory tell of its end. Nothing is lost but DELETE_SELF when it cannot. */
  #guard(slot: number): void {
    const table = this.table;
    const nodeid = table.nodeid[slot] as number;
    if (nodeid === ROOT) return;
    const parent = this.nodes.byName(nodeid, DOT_DOT);
    if (parent === 0 || parent === nodeid) return;
    const before = table.find(parent);
    if (before === 0) {
      // The slot must exist with its guard before the mark is made: hostMask() asks for it.
      const fd = this.nodes.fd(parent);
      if (fd < 0) return;
      const added = table.add(parent, this.nodes.generation(parent), true);
      table.guards[added] = 1;
      const object = this.identify(added, fd);
      if (object < 0) {
        table.remove(added);
        return;
      }
      table.object[added] = object;
      table.next[added] = this.head[object] as number;
      this.head[object] = added;
      if (this.#refresh(object, fd) < 0) {
        table.guards[added] = 0;
        this.#drop(added);
        return;
      }
      table.guardedBy[slot] = added;
    } else {
      table.guards[before] = (table.guards[before] as number) + 1;
      if (this.#refresh(table.object[before] as number, -1) < 0) {
        table.guards[before] = (table.guards[before] as number) - 1;
        return;
      }
      table.guardedBy[slot] = before;
    }
    // hostMask() of a guarded directory has MOVE_SELF.
    this.#refresh(table.object[slot] as number, -1);
    this.guarded(slot, table.guardedBy[slot] as number);
  }

  /** A directory has got a guard, or lost it: for watchers whose events do not name the child. */
  protected guarded(_slot: number, _parent: number): void {}
  protected unguarded(_slot: number, _parent: number): void {}

  #unguard(slot: number): void {
    const table = this.table;
    const parent = table.guardedBy[slot] as number;
    if (parent === 0) return;
    this.unguarded(slot, parent);
    table.guardedBy[slot] = 0;
    table.guards[parent] = (table.guards[parent] as number) - 1;
    if (table.guards[parent] === 0) this.#release(parent);
  }
}

/** Bits of a guarded directory beside those that the guest asked for. */
export const GUARDED = FS_MOVE_SELF;

const ROOT = 1;
const DOT_DOT = cString('..', arenaAlloc(64));
