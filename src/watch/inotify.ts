/**
 * The host's events by inotify: for processes that may not use fanotify, and file systems without file handles or an id.
 *
 * What it cannot do, and what stands in for it:
 *  - it does not say who did it: the file system says what it does ({@link Echoes});
 *  - so it reports changes only. The daemon opens and reads for many reasons that no request names, and OPEN, ACCESS and CLOSE_NOWRITE
 *    of these would all look like somebody else's: they are not in `supported`;
 *  - it does not name the child: a child's nodeid is looked up by its name. Once the name is gone only watched children are known: directories
 *    by the name that they had when they got their guard, files because their link count changes right before;
 *  - a watched directory and a file in it watched by itself are two events, directory first: the second is left out;
 *  - the two halves of a rename are two events with one cookie: they are joined when the second is in the queue by then,
 *    and otherwise sent apart with the cookie.
 */
import { arena, arenaAlloc, cString, EMPTY_NAME, native } from 'vhost-user-ts/native';
import { Counter, type Counters } from './counters.js';
import type { Echoes } from './echo.js';
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
  FS_Q_OVERFLOW,
  FS_RENAME,
  ON_CHILD,
} from './mask.js';
import type { WatchNodes } from './nodes.js';
import { grown, mix, OpenIndex, WatchTable } from './table.js';
import { type EventSink, GUARDED, Watcher } from './watcher.js';

/** struct inotify_event { s32 wd; u32 mask; u32 cookie; u32 len; char name[]; } */
const Event = { wd: 0, mask: 4, cookie: 8, len: 12, name: 16 } as const;
const IN_MASK_ADD = 0x2000_0000;
const BUFFER_BYTES = 64 << 10;
/** A rename's second half is queued some instructions after the first: so many more looks at the queue for it. */
const HALF_LOOKS = 20;
/** Bytes of the longest event. */
const EVENT_MAX = 16 + 256;

/** Watch descriptor of an event that was told with another one. */
const TAKEN = -2;

const AT_EMPTY_PATH = 0x1000;
const STATX_NLINK_BIT = 4;
const STATX_NLINK = 16;
const SLASH = 0x2f;

const CHANGES = FS_MODIFY | FS_ATTRIB | FS_CLOSE_WRITE;

const u8 = arena.u8;
const u32 = arena.u32;
const i32 = arena.i32;

/** The watcher. */
export class Inotify extends Watcher {
  readonly kind = 'inotify';
  readonly supported =
    (CHANGES |
      FS_CREATE |
      FS_DELETE |
      FS_MOVED_FROM |
      FS_MOVED_TO |
      FS_RENAME |
      FS_DELETE_SELF |
      FS_MOVE_SELF |
      FS_EVENT_ON_CHILD |
      FS_ISDIR) >>>
    0;
  readonly fd: number;

  readonly #procfd: number;
  readonly #counters: Counters;
  readonly #echoes: Echoes;
  /** Watch descriptor of an object, and back. */
  #wd = new Int32Array(64);
  readonly #index = new OpenIndex((object) => mix(this.#wd[object] as number));
  readonly #buffer = arenaAlloc(BUFFER_BYTES);
  #end = 0;
  /** An event that the one before it has told already: this bit on the object of this watch. */
  #toldWd = -1;
  #toldBit = 0;
  /** A watched file whose attributes changed last: its name may be the one that is removed next. */
  #dying = 0;
  /** Guarded directories by their guard's slot and the hash of their name. */
  readonly #names = new Map<number, number>();
  readonly #nameOf = new Map<number, number>();
  readonly #link = arenaAlloc(8192);
  readonly #statx = arenaAlloc(256);

  /** @param earlier the instance of a process before this one, with its watches */
  constructor(
    nodes: WatchNodes,
    procfd: number,
    limit: number,
    counters: Counters,
    echoes: Echoes,
    table = new WatchTable(),
    earlier = -1,
  ) {
    super(nodes, limit, table);
    const fd = earlier >= 0 ? earlier : native.inotifyInit();
    if (fd < 0) throw new Error(`inotify_init1: errno ${-fd}`);
    this.fd = fd;
    this.#procfd = procfd;
    this.#counters = counters;
    this.#echoes = echoes;
  }

  protected hostMask(slot: number): number {
    const table = this.table;
    const mask = (table.mask[slot] as number) | this.kept(slot);
    let host = mask & (CHANGES | FS_MOVE_SELF);
    if (table.directory[slot] === 0) return host | ((mask & FS_DELETE_SELF) !== 0 ? FS_ATTRIB : 0);
    host |= mask & (FS_CREATE | FS_DELETE);
    if ((mask & (FS_MOVED_FROM | FS_MOVED_TO | FS_RENAME)) !== 0) host |= FS_MOVED_FROM | FS_MOVED_TO;
    if ((table.guards[slot] as number) > 0) host |= FS_DELETE;
    if (table.guardedBy[slot] !== 0) host |= GUARDED;
    return host;
  }

  protected identify(_slot: number, fd: number): number {
    // Added to what there is: it may be the object of another slot. Attribute changes are what any object can have.
    const wd = native.inotifyAddWatch(this.fd, this.#procfd, fd, IN_MASK_ADD | FS_ATTRIB);
    if (wd < 0) return wd;
    const known = this.#find(wd);
    if (known !== 0) return known;
    const object = this.newObject();
    if (object >= this.#wd.length) this.#wd = grown(this.#wd, new Int32Array(this.#wd.length * 2));
    this.#wd[object] = wd;
    this.have[object] = FS_ATTRIB;
    this.#index.insert(object);
    return object;
  }

  protected mark(object: number, fd: number, _have: number, want: number): number {
    // A watch without any bit is refused. What a watcher of no bits gets is dropped later.
    const wd = native.inotifyAddWatch(this.fd, this.#procfd, fd, want === 0 ? FS_ATTRIB : want);
    if (wd < 0) return wd;
    if (wd !== this.#wd[object]) {
      // The watch was ended by the kernel (IN_IGNORED is on its way) and made anew.
      this.#index.remove(object);
      this.#wd[object] = wd;
      this.#index.insert(object);
    }
    return 0;
  }

  protected unmark(object: number): void {
    native.inotifyRemoveWatch(this.fd, this.#wd[object] as number);
    this.#index.remove(object);
  }

  override clear(): void {
    for (let object = 1; object < this.objects.top; object++)
      if (this.head[object] !== 0) native.inotifyRemoveWatch(this.fd, this.#wd[object] as number);
    super.clear();
    this.#index.clear();
    this.#echoes.clear();
    this.#toldWd = -1;
    this.#dying = 0;
    this.#names.clear();
    this.#nameOf.clear();
    this.discard();
  }

  discard(): void {
    while (native.read(this.fd, this.#buffer, BUFFER_BYTES) > 0);
  }

  close(): void {
    native.close(this.fd);
  }

  drain(sink: EventSink, reads = 1): boolean {
    while (reads-- > 0) {
      const n = native.read(this.fd, this.#buffer, BUFFER_BYTES - EVENT_MAX);
      if (n <= 0) {
        this.#echoes.drained();
        return false;
      }
      sink.batch();
      this.#end = this.#buffer + n;
      let events = 0;
      for (let at = this.#buffer; at < this.#end; at += Event.name + (u32[(at + Event.len) >> 2] as number)) {
        events++;
        this.#event(sink, at);
      }
      this.#counters.add(Counter.events, events);
    }
    return true;
  }

  #event(sink: EventSink, at: number): void {
    const wd = i32[at >> 2] as number;
    const mask = u32[(at + Event.mask) >> 2] as number;
    if ((mask & FS_Q_OVERFLOW) !== 0) {
      sink.overflow();
      return;
    }
    const bit = mask & (CHANGES | DIRENT | FS_MOVE_SELF);
    const told = this.#toldWd === wd && this.#toldBit === bit;
    const dying = this.#dying;
    this.#toldWd = -1;
    this.#dying = 0;
    // IN_IGNORED, IN_DELETE_SELF and IN_UNMOUNT stay here. wd -2: the second half of a rename, told with the first.
    if (bit === 0 || wd === TAKEN || (told && u32[(at + Event.len) >> 2] === 0)) return;
    const object = this.#find(wd);
    if (object === 0) return;
    const slot = this.head[object] as number;
    const isdir = mask & FS_ISDIR;
    if (u32[(at + Event.len) >> 2] === 0) {
      if (bit === FS_MOVE_SELF) this.moved(slot);
      if (bit === FS_ATTRIB && isdir === 0) this.#dying = slot;
      if (this.#isEcho(slot, bit)) this.#counters.add(Counter.echoes);
      else sink.self(mask, slot);
      return;
    }
    const name = at + Event.name;
    const length = nameLength(at);
    const directory = this.table.nodeid[slot] as number;
    if ((bit & DIRENT) !== 0) {
      if (this.#isEntryEcho(slot, bit, name, length)) {
        this.#counters.add(Counter.echoes);
        return;
      }
      if (bit === FS_CREATE) this.#created(sink, mask, slot, name, length);
      else if (bit === FS_DELETE) this.#deleted(sink, mask, slot, name, length, dying);
      else this.#half(sink, at, slot, isdir);
      return;
    }
    const child = this.nodes.byName(directory, name);
    const childSlot = child === 0 ? 0 : this.table.find(child);
    if (childSlot !== 0) {
      // The kernel calls the parent's mark first and the child's own right after it.
      this.#toldWd = this.#wd[this.table.object[childSlot] as number] as number;
      this.#toldBit = bit;
    }
    if (child !== 0 && this.#echoes.isObject(child, bit)) {
      this.#counters.add(Counter.echoes);
      return;
    }
    const head = childSlot === 0 ? 0 : (this.head[this.table.object[childSlot] as number] as number);
    sink.named((mask & (ON_CHILD | FS_ISDIR)) >>> 0, slot, head, name, length, 0, child);
  }

  /** A new name of an inode that the guest may know (a hard link). */
  #created(sink: EventSink, mask: number, slot: number, name: number, length: number): void {
    const child = this.nodes.byName(this.table.nodeid[slot] as number, name);
    const childSlot = child === 0 ? 0 : this.table.find(child);
    sink.named(mask, slot, childSlot === 0 ? 0 : (this.head[this.table.object[childSlot] as number] as number), name, length, 0, child);
  }

  /** A name is gone; `dying` is the watched file whose link count may have changed for it. */
  #deleted(sink: EventSink, mask: number, slot: number, name: number, length: number, dying: number): void {
    let child = 0;
    if ((mask & FS_ISDIR) !== 0) {
      child = this.#names.get(nameKey(slot, name, length)) ?? 0;
      if (child !== 0 && !this.#unlinked(child)) child = 0;
    } else if (dying !== 0 && this.#unlinked(dying)) child = dying;
    const head = child === 0 ? 0 : (this.head[this.table.object[child] as number] as number);
    sink.named(mask, slot, head, name, length, 0, child === 0 ? 0 : (this.table.nodeid[child] as number));
  }

  #unlinked(slot: number): boolean {
    const fd = this.nodes.fd(this.table.nodeid[slot] as number);
    return (
      fd < 0 ||
      (native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, STATX_NLINK_BIT, this.#statx) === 0 && u32[(this.#statx + STATX_NLINK) >> 2] === 0)
    );
  }

  protected override guarded(slot: number, parent: number): void {
    const fd = this.nodes.fd(this.table.nodeid[slot] as number);
    if (fd < 0) return;
    const n = native.readlinkat(this.#procfd, cString(String(fd), this.#link + 4096), this.#link, 4096);
    let start = n;
    while (start > 0 && u8[this.#link + start - 1] !== SLASH) start--;
    if (n <= 0 || start === n) return;
    const key = nameKey(parent, this.#link + start, n - start);
    this.#names.set(key, slot);
    this.#nameOf.set(slot, key);
  }

  protected override unguarded(slot: number): void {
    const key = this.#nameOf.get(slot);
    if (key === undefined) return;
    this.#nameOf.delete(slot);
    if (this.#names.get(key) === slot) this.#names.delete(key);
  }

  #isEntryEcho(slot: number, bit: number, name: number, length: number): boolean {
    for (let s = slot; s !== 0; s = this.table.next[s] as number) {
      if (this.#echoes.isEntry(this.table.nodeid[s] as number, bit, name, length)) return true;
    }
    return false;
  }

  #isEcho(slot: number, bit: number): boolean {
    for (let s = slot; s !== 0; s = this.table.next[s] as number)
      if (this.#echoes.isObject(this.table.nodeid[s] as number, bit)) return true;
    return false;
  }

  /** One half of a rename, MOVED_FROM first if both are there. */
  #half(sink: EventSink, at: number, slot: number, isdir: number): void {
    const cookie = u32[(at + Event.cookie) >> 2] as number;
    const name = at + Event.name;
    const length = nameLength(at);
    if (((u32[(at + Event.mask) >> 2] as number) & FS_MOVED_TO) !== 0) {
      sink.renamed(isdir, 0, 0, 0, slot, name, length, 0, this.nodes.byName(this.table.nodeid[slot] as number, name), cookie);
      return;
    }
    const other = this.#other(at, cookie);
    if (other === 0) {
      sink.renamed(isdir, slot, name, length, 0, 0, 0, 0, 0, cookie);
      return;
    }
    const object = this.#find(i32[other >> 2] as number);
    i32[other >> 2] = TAKEN;
    const to = object === 0 ? 0 : (this.head[object] as number);
    const child = to === 0 ? 0 : this.nodes.byName(this.table.nodeid[to] as number, other + Event.name);
    sink.renamed(isdir, slot, name, length, to, other + Event.name, nameLength(other), 0, child, 0);
  }

  /** The MOVED_TO with this cookie behind `at`, or 0. More is read when it may just be on its way. */
  #other(at: number, cookie: number): number {
    let from = at + Event.name + (u32[(at + Event.len) >> 2] as number);
    for (let looks = HALF_LOOKS; ; looks--) {
      for (; from < this.#end; from += Event.name + (u32[(from + Event.len) >> 2] as number)) {
        if (u32[(from + Event.cookie) >> 2] === cookie && ((u32[(from + Event.mask) >> 2] as number) & FS_MOVED_TO) !== 0) return from;
      }
      const room = this.#buffer + BUFFER_BYTES - this.#end;
      if (looks === 0 || room < EVENT_MAX) return 0;
      const n = native.read(this.fd, this.#end, room);
      if (n > 0) this.#end += n;
    }
  }

  #find(wd: number): number {
    const index = this.#index;
    for (let place = index.start(mix(wd)); ; place = index.after(place)) {
      const object = index.at(place);
      if (object === 0 || this.#wd[object] === wd) return object;
    }
  }
}

/** Which guard and which name; that two names of 2^32 are one is checked by whether the directory is gone. */
function nameKey(slot: number, name: number, length: number): number {
  let h = slot;
  for (let i = 0; i < length; i++) h = Math.imul(h ^ (u8[name + i] as number), 0x01000193);
  return slot * 4294967296 + mix(h);
}

function nameLength(at: number): number {
  const end = at + Event.name + (u32[(at + Event.len) >> 2] as number);
  let to = at + Event.name;
  while (to < end && u8[to] !== 0) to++;
  return to - at - Event.name;
}
