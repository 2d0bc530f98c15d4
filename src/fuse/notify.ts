/**
 * Encoders of notifications (server to guest): one message at a time into a buffer of the arena, whatever carries it to the guest.
 * A message is a fuse_out_header with the code in `error` and `unique` 0, then the body (`fuse_notify()` in fs/fuse/notify.c).
 */
import { arena } from 'vhost-user-ts/native';
import {
  FsnotifyRecord,
  FsnotifyRecordFlag,
  NAME_MAX,
  NotifyCode,
  NotifyDeleteOut,
  NotifyInvalEntryOut,
  NotifyInvalInodeOut,
  OutHeader,
  recordAlign,
} from './abi.js';

/** Bytes of a buffer that the guest lends (`notify_buf_size`). Every message but a full one of records is far shorter. */
export const NOTIFY_BYTES = 4096;

/** One file event: what a record says. Names are arena offsets of `nameLength` bytes; `nameLength` 0: the object itself. */
export interface FileEvent {
  /** The object, or the directory that `name` is in. */
  nodeid: number;
  generation: number;
  /** The child, if the guest knows it; else 0. */
  child: number;
  childGeneration: number;
  /** FS_* bits in two halves. */
  maskLow: number;
  maskHigh: number;
  /** 0, or the id of a rename whose halves are sent apart. */
  cookie: number;
  name: number;
  nameLength: number;
}

const u8 = arena.u8;
const u32 = arena.u32;

/** A message buffer. Event records are added until one does not fit; the other messages are complete at once. */
export class Notification {
  /** Bytes of the message so far; 0 when there is none. */
  length = 0;
  /** Arena offset of the message. */
  readonly at: number;
  readonly #capacity: number;

  /**
   * @param at arena offset of the buffer, aligned to 8
   * @param capacity its size in bytes: {@link NOTIFY_BYTES}, or what the guest's buffers have if that is less
   */
  constructor(at: number, capacity: number) {
    this.at = at;
    this.#capacity = capacity;
  }

  /**
   * FUSE_NOTIFY_INVAL_INODE: attributes, and the cached data from `offset` on for `length` bytes (0: to the end).
   * A negative offset leaves the data alone (`fuse_reverse_inval_inode()`).
   */
  invalInode(nodeid: number, offset: number, length: number): number {
    const body = this.#begin(NotifyCode.INVAL_INODE, NotifyInvalInodeOut.bytes);
    set64(body + NotifyInvalInodeOut.ino, nodeid);
    set64(body + NotifyInvalInodeOut.off, offset);
    set64(body + NotifyInvalInodeOut.len, length);
    return this.length;
  }

  /** FUSE_NOTIFY_INVAL_ENTRY: the name's entry, positive or negative. `flags`: INVAL_ENTRY_EXPIRE_ONLY (FUSE_HAS_EXPIRE_ONLY). */
  invalEntry(parent: number, name: number, nameLength: number, flags: number): number {
    const body = this.#begin(NotifyCode.INVAL_ENTRY, NotifyInvalEntryOut.bytes + nameLength + 1);
    set64(body + NotifyInvalEntryOut.parent, parent);
    u32[(body + NotifyInvalEntryOut.namelen) >> 2] = nameLength;
    u32[(body + NotifyInvalEntryOut.flags) >> 2] = flags;
    copyName(body + NotifyInvalEntryOut.bytes, name, nameLength);
    return this.length;
  }

  /** FUSE_NOTIFY_DELETE: the name is gone, and it was `child`; the guest's watchers of the child hear of it. */
  delete(parent: number, child: number, name: number, nameLength: number): number {
    const body = this.#begin(NotifyCode.DELETE, NotifyDeleteOut.bytes + nameLength + 1);
    set64(body + NotifyDeleteOut.parent, parent);
    set64(body + NotifyDeleteOut.child, child);
    u32[(body + NotifyDeleteOut.namelen) >> 2] = nameLength;
    u32[(body + NotifyDeleteOut.padding) >> 2] = 0;
    copyName(body + NotifyDeleteOut.bytes, name, nameLength);
    return this.length;
  }

  /** FUSE_NOTIFY_FSNOTIFY: begins a message of event records. */
  events(): void {
    this.#begin(NotifyCode.FSNOTIFY, 0);
  }

  /** Adds one record. Returns false when it does not fit: the message goes out, and the record opens the next one. */
  add(event: Readonly<FileEvent>): boolean {
    const bytes = recordBytes(event.nameLength);
    if (this.length + bytes > this.#capacity) return false;
    this.#record(event, bytes, 0);
    return true;
  }

  /** Adds a rename: source and target, never in two messages. Returns false when both do not fit. */
  addRename(source: Readonly<FileEvent>, target: Readonly<FileEvent>): boolean {
    const first = recordBytes(source.nameLength);
    const second = recordBytes(target.nameLength);
    if (this.length + first + second > this.#capacity) return false;
    this.#record(source, first, FsnotifyRecordFlag.PAIRED);
    this.#record(target, second, 0);
    return true;
  }

  /** Adds the record that says that events were lost. Returns false when it does not fit. */
  addOverflow(): boolean {
    const at = this.at + this.length;
    if (this.length + FsnotifyRecord.name > this.#capacity) return false;
    for (let i = at >> 2; i < (at + FsnotifyRecord.name) >> 2; i++) u32[i] = 0;
    u32[(at + FsnotifyRecord.reclen) >> 2] = FsnotifyRecord.name;
    u32[(at + FsnotifyRecord.flags) >> 2] = FsnotifyRecordFlag.OVERFLOW;
    this.#grow(FsnotifyRecord.name);
    return true;
  }

  #record(event: Readonly<FileEvent>, bytes: number, flags: number): void {
    const at = this.at + this.length;
    const nameLength = event.nameLength;
    if (nameLength > NAME_MAX) throw new RangeError(`a name of ${nameLength} bytes`);
    u32[(at + FsnotifyRecord.reclen) >> 2] = bytes;
    u32[(at + FsnotifyRecord.flags) >> 2] = flags;
    set64(at + FsnotifyRecord.nodeid, event.nodeid);
    set64(at + FsnotifyRecord.child, event.child);
    u32[(at + FsnotifyRecord.mask) >> 2] = event.maskLow;
    u32[(at + FsnotifyRecord.mask + 4) >> 2] = event.maskHigh;
    u32[(at + FsnotifyRecord.generation) >> 2] = event.generation;
    u32[(at + FsnotifyRecord.childGeneration) >> 2] = event.childGeneration;
    u32[(at + FsnotifyRecord.cookie) >> 2] = event.cookie;
    u32[(at + FsnotifyRecord.namelen) >> 2] = nameLength;
    if (nameLength > 0) {
      u32[(at + bytes - 8) >> 2] = 0; // NUL and padding lie in the last 8 bytes
      u32[(at + bytes - 4) >> 2] = 0;
      u8.copyWithin(at + FsnotifyRecord.name, event.name, event.name + nameLength);
    }
    this.#grow(bytes);
  }

  /** Starts a message with a body of `bytes`; returns where the body goes. */
  #begin(code: number, bytes: number): number {
    if (OutHeader.bytes + bytes > this.#capacity) throw new RangeError(`a notification of ${bytes} bytes`);
    const h = this.at >> 2;
    u32[h + (OutHeader.error >> 2)] = code;
    u32[h + (OutHeader.unique >> 2)] = 0;
    u32[h + (OutHeader.unique >> 2) + 1] = 0;
    this.length = 0;
    this.#grow(OutHeader.bytes + bytes);
    return this.at + OutHeader.bytes;
  }

  #grow(bytes: number): void {
    this.length += bytes;
    u32[this.at >> 2] = this.length;
  }
}

/** Size of a record with a name of this length and its NUL; without a name there is no NUL either. */
export function recordBytes(nameLength: number): number {
  return nameLength === 0 ? FsnotifyRecord.name : recordAlign(FsnotifyRecord.name + nameLength + 1);
}

function copyName(to: number, name: number, nameLength: number): void {
  if (nameLength > NAME_MAX) throw new RangeError(`a name of ${nameLength} bytes`);
  u8.copyWithin(to, name, name + nameLength);
  u8[to + nameLength] = 0;
}

function set64(at: number, value: number): void {
  u32[at >> 2] = value;
  u32[(at >> 2) + 1] = Math.floor(value / 4294967296);
}
