/**
 * The mounts below the share. An entry is a pair of mount id and device: a mount of btrfs has a device per subvolume, and one
 * file system can be mounted twice. Inodes and file handles name their entry by its index.
 */
import { native } from 'vhost-user-ts/native';
import type { Block } from './block.js';
import { Header, MOUNT_RECORD, MOUNT_SLOTS, Part } from './block.js';
import { BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, RAMFS_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC } from './linux.js';

const SHIFT = 3;

/** Words of a record. */
export const Mount = { id: 0, major: 1, minor: 2, flags: 3, type: 4, fd: 5 } as const;

/** What is known of a file system. */
export const MountFlag = {
  /** No file handles that can be opened again: inodes keep an O_PATH descriptor. */
  noHandles: 1,
  /** A file system of this host alone: nobody else asks who we are, so the thread may go on under a guest user's id. */
  local: 2,
  /** close(2) has nothing to do (no ->flush in its file operations): FLUSH is no system call. */
  noFlush: 4,
  /** Pages are the file system: reads and writes never wait for a disk. */
  memory: 8,
  /** statx gives a birth time. */
  birthTime: 16,
  /** Handles hold the inode's number, in a way that lookup.ts knows. */
  inoInHandle: 32,
} as const;

/** Known file systems; everything else gets the careful treatment. */
function traits(magic: number): number {
  switch (magic) {
    case EXT4_SUPER_MAGIC:
    case XFS_SUPER_MAGIC:
    case BTRFS_SUPER_MAGIC:
      return MountFlag.local | MountFlag.noFlush | MountFlag.inoInHandle;
    case TMPFS_MAGIC:
      return MountFlag.local | MountFlag.noFlush | MountFlag.memory | MountFlag.inoInHandle;
    case RAMFS_MAGIC:
      return MountFlag.local | MountFlag.noFlush | MountFlag.memory;
    case F2FS_SUPER_MAGIC:
      return MountFlag.local | MountFlag.inoInHandle;
    default:
      return 0;
  }
}

/** The table, and the descriptors that open_by_handle_at(2) needs, one per mount. */
export class MountTable {
  readonly #u32: Uint32Array;
  readonly #count: Uint32Array;
  readonly #i32: Int32Array;
  readonly #byMount = new Map<number, number>();
  readonly #byKey = new Map<number, number>();

  constructor(block: Block) {
    this.#u32 = block.u32(Part.mounts, (MOUNT_SLOTS * MOUNT_RECORD) / 4);
    this.#i32 = new Int32Array(this.#u32.buffer);
    this.#count = block.header.subarray(Header.mounts, Header.mounts + 1);
    for (let i = 0; i < this.size; i++) {
      this.#byKey.set(this.#key(i), i);
      if (this.fd(i) >= 0) this.#byMount.set(this.id(i), this.fd(i));
    }
  }

  get size(): number {
    return this.#count[0] as number;
  }

  /** Whether entry `index` is this mount and device. */
  is(index: number, id: number, major: number, minor: number): boolean {
    const at = index << SHIFT;
    return this.#u32[at] === id && this.#u32[at + Mount.major] === major && this.#u32[at + Mount.minor] === minor;
  }

  /** The entry of a mount and device, or -1. */
  find(id: number, major: number, minor: number): number {
    const index = this.#byKey.get(key(id, major, minor));
    return index !== undefined && this.is(index, id, major, minor) ? index : -1;
  }

  /** Adds an entry for a file system of type `magic`; -1 when the table is full. */
  add(id: number, major: number, minor: number, magic: number): number {
    const index = this.size;
    if (index === MOUNT_SLOTS) return -1;
    const at = index << SHIFT;
    this.#u32[at] = id;
    this.#u32[at + Mount.major] = major;
    this.#u32[at + Mount.minor] = minor;
    this.#u32[at + Mount.flags] = traits(magic);
    this.#u32[at + Mount.type] = magic;
    this.#i32[at + Mount.fd] = this.#byMount.get(id) ?? -1;
    this.#count[0] = index + 1;
    this.#byKey.set(this.#key(index), index);
    return index;
  }

  flags(index: number): number {
    return this.#u32[(index << SHIFT) + Mount.flags] as number;
  }

  setFlag(index: number, flag: number): void {
    const at = (index << SHIFT) + Mount.flags;
    this.#u32[at] = (this.#u32[at] as number) | flag;
  }

  id(index: number): number {
    return this.#u32[index << SHIFT] as number;
  }

  magic(index: number): number {
    return this.#u32[(index << SHIFT) + Mount.type] as number;
  }

  /** A readable descriptor on the entry's mount, or -1. */
  fd(index: number): number {
    return this.#i32[(index << SHIFT) + Mount.fd] as number;
  }

  /** Gives all entries of a mount their descriptor; it belongs to the table from now on. */
  setFd(index: number, fd: number): void {
    const id = this.id(index);
    this.#byMount.set(id, fd);
    for (let i = 0; i < this.size; i++) if (this.id(i) === id) this.#setFd(i, fd);
  }

  /** An entry whose descriptor was closed is met again: it may be another file system by now. */
  renew(index: number, magic: number): void {
    const at = index << SHIFT;
    this.#u32[at + Mount.flags] = traits(magic);
    this.#u32[at + Mount.type] = magic;
  }

  /**
   * Closes the descriptor of an entry's mount, which would keep it from being unmounted, unless an entry of it is in use. That of the
   * share itself stays.
   */
  release(index: number, used: (index: number) => boolean): void {
    const id = this.id(index);
    const fd = this.#byMount.get(id);
    if (fd === undefined || id === this.id(0)) return;
    const entries: number[] = [];
    for (let i = 0; i < this.size; i++) if (this.id(i) === id) entries.push(i);
    if (entries.some(used)) return;
    for (const i of entries) this.#setFd(i, -1);
    this.#byMount.delete(id);
    native.close(fd);
  }

  /** Closes the descriptors of all mounts but entry 0's, the share itself. */
  closeSubmounts(): void {
    const root = this.id(0);
    for (let i = 0; i < this.size; i++) if (this.id(i) !== root) this.#setFd(i, -1);
    for (const [id, fd] of this.#byMount) {
      if (id === root) continue;
      native.close(fd);
      this.#byMount.delete(id);
    }
  }

  close(): void {
    for (let i = 0; i < this.size; i++) this.#setFd(i, -1);
    for (const fd of this.#byMount.values()) native.close(fd);
    this.#byMount.clear();
  }

  #setFd(index: number, fd: number): void {
    this.#i32[(index << SHIFT) + Mount.fd] = fd;
  }

  #key(index: number): number {
    const at = index << SHIFT;
    return key(this.#u32[at] as number, this.#u32[at + Mount.major] as number, this.#u32[at + Mount.minor] as number);
  }
}

/** Exact while mount ids stay below 2^21 and device numbers fit 32 bits, as they do; what it finds is compared anyway. */
function key(id: number, major: number, minor: number): number {
  return id * 0x1_0000_0000 + ((major << 20) | minor);
}
