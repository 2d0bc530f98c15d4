/**
 * Remote fsnotify as the rest of the daemon sees it: the guest's watch requests in, messages in the guest's buffers out.
 * Which watcher serves an object is decided here.
 */
import { native } from 'vhost-user-ts/native';
import { Counter, Counters } from './counters.js';
import { Echoes } from './echo.js';
import { Fanotify, type FanotifyAbility, fanotifyAbility } from './fanotify.js';
import { Inotify } from './inotify.js';
import { DIRENT, FS_ATTRIB, FS_CLOSE_WRITE, FS_EVENT_ON_CHILD, FS_MODIFY, FS_RENAME, MODIFIERS, maskText } from './mask.js';
import type { WatchNodes } from './nodes.js';
import { type BufferSource, Notifier, type NotifierOptions } from './notifier.js';
import { type GuestCaches, Translator } from './translate.js';
import { EOPNOTSUPP, type HostWatcher } from './watcher.js';

/** `--fsnotify`. */
export type FsnotifyMode = 'auto' | 'fanotify' | 'inotify' | 'off';

export interface FsnotifyOptions extends NotifierOptions {
  mode: Exclude<FsnotifyMode, 'off'>;
  /** Objects that the guest may watch at a time. */
  limit?: number;
  /** One line for people. */
  warn?: (line: string) => void;
  /** What a process before this one has watched with (-1: not), and its pid. */
  earlier?: { readonly fanotify: number; readonly inotify: number; readonly pid: number };
  /** A word that outlives the process: 1 while something was read from the host that the guest does not have. */
  unsaid?: Uint32Array;
}

/** Each watch keeps an inode in the host kernel's memory: about 1 KiB. */
export const DEFAULT_WATCH_LIMIT = 131_072;

/** struct fuse_fsnotify_in.flags: the mask is for everything that the guest looks up. */
export const FSNOTIFY_ALL = 1;

const ROOT_NODEID = 1;
const ENOENT = 2;
const ESTALE = 116;
const EXDEV = 18;
const ENODEV = 19;
const EINVAL = 22;
const EPOLLIN = 1;

/** What may not be stale when the guest keeps names and attributes for a day (`--cache=notify`). */
const COHERENT = (FS_MODIFY | FS_ATTRIB | FS_CLOSE_WRITE | (DIRENT & ~FS_RENAME) | FS_EVENT_ON_CHILD) >>> 0;

/** A watcher with the translator that knows its slots. */
interface Half {
  readonly watcher: HostWatcher;
  readonly translator: Translator;
  /** Where setting marks again goes on, 0: nothing to do. */
  rearm: number;
}

/** Marks (some 2 µs each) set again before the guest hears of an overflow, and in each turn after that. */
const REARM_AT_ONCE = 4096;
const REARM_STEP = 1024;

export class Fsnotify {
  readonly supportedLow: number;
  readonly supportedHigh = 0;
  readonly notifier: Notifier;
  readonly counters: Counters;
  /** Readable when the host has events. */
  readonly fd: number;
  /** Where the file system says what it does; null while no watcher needs it (fanotify is told by the kernel). */
  echoes: Echoes | null = null;

  /** A directory of a coherent session could not be marked: what is in it can change unseen. */
  onIncoherent: () => void = () => undefined;

  readonly #nodes: WatchNodes;
  readonly #procfd: number;
  readonly #limit: number;
  readonly #warn: (line: string) => void;
  readonly #caches: GuestCaches = { inodes: true, entries: true, negative: true };
  readonly #first: Half;
  /** In mode auto: inotify for what fanotify cannot mark, made when it is first needed. */
  #second: Half | null = null;
  readonly #epoll: number;
  /** Mask of FUSE_FSNOTIFY_ALL, 0: not asked. */
  #all = 0;
  #coherent = false;
  #toldLimit = false;
  readonly #earlier: NonNullable<FsnotifyOptions['earlier']>;
  readonly #unsaid: Uint32Array;
  /** What {@link saved} says has changed. */
  onWatcher: () => void = () => undefined;

  /**
   * @param root an O_PATH descriptor of the shared directory: what it can do decides in mode auto
   * @param procfd a descriptor of /proc/self/fd
   * @throws Error when the mode cannot be had
   */
  constructor(nodes: WatchNodes, root: number, procfd: number, options: FsnotifyOptions, counters = new Counters()) {
    this.#nodes = nodes;
    this.#procfd = procfd;
    this.#limit = options.limit ?? DEFAULT_WATCH_LIMIT;
    this.#warn = options.warn ?? (() => undefined);
    this.counters = counters;
    this.#earlier = options.earlier ?? { fanotify: -1, inotify: -1, pid: 0 };
    this.#unsaid = options.unsaid ?? new Uint32Array(1);
    this.notifier = new Notifier(counters, options);
    this.notifier.onOverflow = () => this.#rearm();
    const ability: FanotifyAbility | number = options.mode === 'inotify' ? -EOPNOTSUPP : fanotifyAbility(root, procfd);
    if (typeof ability === 'number' && options.mode === 'fanotify')
      throw new Error(`fanotify cannot watch the shared directory: errno ${-ability}`);
    if (typeof ability === 'number') {
      if (options.mode === 'auto')
        this.#warn(`fanotify cannot watch the shared directory (errno ${-ability}): inotify reports changes only`);
      this.#first = this.#inotify();
    } else {
      const { fanotify, pid } = this.#earlier;
      this.#first = this.#half(new Fanotify(ability, nodes, procfd, this.#limit, counters, undefined, fanotify, pid));
    }
    this.supportedLow = this.#first.watcher.supported;
    if (options.mode === 'auto' && this.#first.watcher.kind === 'fanotify') {
      this.#epoll = native.epollCreate();
      if (this.#epoll < 0) throw new Error(`epoll_create1: errno ${-this.#epoll}`);
      native.epollAdd(this.#epoll, this.#first.watcher.fd, EPOLLIN, 0);
      this.fd = this.#epoll;
    } else {
      this.#epoll = -1;
      this.fd = this.#first.watcher.fd;
    }
    if (this.#first.watcher.kind === 'fanotify' && this.#earlier.inotify >= 0) this.#other();
  }

  /** What a process after this one must have. */
  get saved(): { fanotify: number; inotify: number; all: number; coherent: boolean } {
    const fd = (kind: HostWatcher['kind']) => [this.#first, this.#second].find((half) => half?.watcher.kind === kind)?.watcher.fd ?? -1;
    return { fanotify: fd('fanotify'), inotify: fd('inotify'), all: this.#all, coherent: this.#coherent };
  }

  /**
   * Goes on with the session of the process before: its marks are there already, the guest's masks are the store's.
   * The guest hears of an overflow when something can be lost: what was read and not handed over, and what inotify has to tell, of
   * which nobody knows any more whose doing it was.
   */
  resume(caches: Readonly<GuestCaches>, saved: { readonly all: number; readonly coherent: boolean }): void {
    Object.assign(this.#caches, caches);
    this.#all = saved.all;
    this.#coherent = saved.coherent;
    let failed = 0;
    if (saved.coherent || saved.all !== 0) this.#nodes.directories((nodeid) => this.known(nodeid));
    this.#nodes.remembered((nodeid, mask) => {
      const error = this.#set(nodeid, (mask | this.#all) >>> 0);
      // A node that is gone has nothing to tell.
      if (error < 0 && error !== -ESTALE && error !== -ENOENT) failed = error;
    });
    this.counters.values[Counter.watches] = this.watches;
    if (failed !== 0) this.#warn(`a watch could not be set again (errno ${-failed}): the guest is told that events may be missing`);
    const inotify = this.saved.inotify;
    for (const half of [this.#first, this.#second]) if (half?.watcher.kind === 'inotify') half.watcher.discard();
    if (failed !== 0 || inotify >= 0 || this.#unsaid[0] !== 0) this.notifier.overflow();
  }

  /** Hands over what can be, and notes whether something is left. */
  #pump(): void {
    this.notifier.pump();
    this.#unsaid[0] = this.notifier.pending ? 1 : 0;
  }

  /** Which watcher serves the shared directory itself. */
  get kind(): 'fanotify' | 'inotify' | 'both' {
    return this.#second === null ? this.#first.watcher.kind : 'both';
  }

  /** A session begins. `caches`: what its guest keeps. `coherent`: every directory it knows is marked, so that nothing it keeps gets old. */
  begin(caches?: Readonly<GuestCaches>, coherent = false): void {
    this.end();
    if (caches !== undefined) Object.assign(this.#caches, caches);
    this.#coherent = coherent;
    if (coherent) this.#nodes.directories((nodeid) => this.known(nodeid));
  }

  /** The session ends. */
  end(): void {
    this.#all = 0;
    this.#coherent = false;
    this.#toldLimit = false;
    this.#first.watcher.clear();
    this.#second?.watcher.clear();
    this.notifier.reset();
    this.counters.values[Counter.watches] = 0;
    this.#unsaid[0] = 0;
    this.#nodes.remember(ROOT_NODEID, 0); // the others are forgotten
  }

  /**
   * FUSE_FSNOTIFY: the watch of a node, an absolute mask; 0 ends it. When it returns 0 every later change is reported.
   * @returns 0; -ENOENT, -ESTALE: not this node; -EOPNOTSUPP: bits that nobody can deliver; -ENOSPC: too many watches; -EINVAL: unknown
   *   flags; else what the system said
   */
  watch(nodeid: number, generation: number, maskLow: number, maskHigh: number, flags: number): number {
    const error = this.#watch(nodeid, generation, maskLow >>> 0, maskHigh, flags);
    if (error < 0) this.counters.add(Counter.refused);
    this.counters.values[Counter.watches] = this.watches;
    return error;
  }

  #watch(nodeid: number, generation: number, mask: number, maskHigh: number, flags: number): number {
    const unknown = this.#nodes.check(nodeid, generation);
    if (unknown < 0) return unknown;
    if ((flags & ~FSNOTIFY_ALL) !== 0) return -EINVAL;
    if (maskHigh !== 0 || (mask & ~this.supportedLow) !== 0) return -EOPNOTSUPP;
    if ((mask & ~MODIFIERS) === 0) mask = 0;
    if ((flags & FSNOTIFY_ALL) === 0) {
      const error = this.#set(nodeid, (mask | this.#all) >>> 0);
      if (error === 0) this.#nodes.remember(nodeid, mask);
      return error;
    }
    // Every directory, with what happens to its children: a file that the guest knows is in a directory that it knows.
    this.#all = mask === 0 ? 0 : (mask | FS_EVENT_ON_CHILD) >>> 0;
    this.onWatcher();
    let result = 0;
    this.#nodes.directories((directory) => {
      const error = this.#set(directory, this.#all);
      if (error < 0) result = error;
    });
    return result;
  }

  /** Objects watched for the guest. */
  get watches(): number {
    return this.#first.watcher.table.watches + (this.#second?.watcher.table.watches ?? 0);
  }

  /** The guest has looked up a directory that it did not know: matters with FUSE_FSNOTIFY_ALL and coherence alone. */
  known(nodeid: number): void {
    let error = 0;
    if (this.#coherent) {
      error = this.#first.watcher.keep(nodeid, COHERENT & this.supportedLow);
      if (this.#elsewhere(error)) error = this.#other().watcher.keep(nodeid, COHERENT & this.#other().watcher.supported);
    }
    if (error < 0 && this.#coherent) {
      // Directories marked before stay coherent; from here on the guest must ask again.
      this.#coherent = false;
      this.onIncoherent();
    }
    if (error === 0 && this.#all !== 0) error = this.#set(nodeid, this.#all);
    // There is no reply to put it in. What is not marked can change unseen, which OVERFLOW says, once a session.
    if (error < 0) {
      if (this.#toldLimit) return;
      this.#toldLimit = true;
      this.#warn(`a directory could not be marked (errno ${-error}): the guest is told that events may be missing`);
      this.notifier.overflow();
    }
  }

  /** The guest forgot a node (nlookup 0): while the store still has its descriptor. */
  forget(nodeid: number): void {
    this.#first.watcher.forget(nodeid);
    this.#second?.watcher.forget(nodeid);
    this.counters.values[Counter.watches] = this.watches;
  }

  /** Where the guest's buffers come from; null: nowhere. */
  attach(source: BufferSource | null): void {
    this.notifier.attach(source);
    this.#pump();
  }

  /** The guest has given buffers. */
  buffersArrived(): void {
    this.#pump();
  }

  /** Reads what the host has and hands it over. @returns whether there may be more: other work goes first, then call again. */
  drain(): boolean {
    this.#unsaid[0] = 1;
    let more = this.#first.watcher.drain(this.#first.translator);
    if (this.#second?.watcher.drain(this.#second.translator)) more = true;
    this.#pump();
    if (this.#sweepOn(this.#first)) more = true;
    if (this.#sweepOn(this.#second)) more = true;
    return more;
  }

  /** Every watch, for people: nodeid and mask in words. */
  *list(): Generator<{ nodeid: number; mask: string }> {
    for (const { nodeid, mask } of this.all()) yield { nodeid, mask: maskText(mask) };
  }

  /** Mask of FUSE_FSNOTIFY_ALL, 0: not asked. */
  get maskOfAll(): number {
    return this.#all;
  }

  /** Every watch: nodeid and mask. */
  *all(): Generator<{ nodeid: number; mask: number }> {
    for (const half of this.#second === null ? [this.#first] : [this.#first, this.#second]) {
      const { table } = half.watcher;
      for (let slot = 1; slot < table.top; slot++) {
        const mask = table.mask[slot] as number;
        if (table.nodeid[slot] !== 0 && mask !== 0) yield { nodeid: table.nodeid[slot] as number, mask };
      }
    }
  }

  close(): void {
    this.#first.watcher.close();
    this.#second?.watcher.close();
    if (this.#epoll >= 0) native.close(this.#epoll);
    this.notifier.free();
  }

  #set(nodeid: number, mask: number): number {
    const error = this.#first.watcher.set(nodeid, mask);
    if (mask === 0) this.#second?.watcher.set(nodeid, 0);
    if (!this.#elsewhere(error)) return error;
    const { watcher } = this.#other();
    // The object's file system can be watched by inotify alone, which has changes: better these than nothing.
    return watcher.set(nodeid, (mask & watcher.supported) >>> 0);
  }

  /** Whether an error of fanotify says that this file system cannot be marked, and inotify may be used. */
  #elsewhere(error: number): boolean {
    return this.#epoll >= 0 && (error === -EOPNOTSUPP || error === -ENODEV || error === -EXDEV);
  }

  #other(): Half {
    if (this.#second === null) {
      this.#second = this.#inotify();
      native.epollAdd(this.#epoll, this.#second.watcher.fd, EPOLLIN, 0);
      this.onWatcher();
    }
    return this.#second;
  }

  #inotify(): Half {
    this.echoes = new Echoes();
    return this.#half(new Inotify(this.#nodes, this.#procfd, this.#limit, this.counters, this.echoes, undefined, this.#earlier.inotify));
  }

  #half(watcher: HostWatcher): Half {
    return { watcher, translator: new Translator(watcher.table, this.#nodes, this.notifier, this.counters, this.#caches), rearm: 0 };
  }

  /** Events were lost, and the guest is about to be told: marks are set again, many of them in steps so that requests go on. */
  #rearm(): void {
    this.#sweep(this.#first, REARM_AT_ONCE);
    if (this.#second !== null) this.#sweep(this.#second, REARM_AT_ONCE);
  }

  #sweep(half: Half, count: number): void {
    half.rearm = half.watcher.rearm(half.rearm === 0 ? 1 : half.rearm, count);
  }

  /** Goes on with {@link #rearm}. Returns whether there is more of it. */
  #sweepOn(half: Half | null): boolean {
    if (half === null || half.rearm === 0) return false;
    this.#sweep(half, REARM_STEP);
    return half.rearm !== 0;
  }
}
