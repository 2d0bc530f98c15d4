/**
 * Where inodes are: paths below the shared directory, as bytes. The kernel knows the path of a descriptor (the link in
 * /proc/self/fd) as long as it has the name in its cache; otherwise, and for what was renamed meanwhile, the whole tree is searched.
 */
import { arena, arenaAlloc, arenaFree, EMPTY_NAME, native } from 'vhost-user-ts/native';
import { Inode, ROOT_SLOT, SHIFT } from '../fs/inodes.js';
import {
  AT_EMPTY_PATH,
  AT_NO_AUTOMOUNT,
  AT_SYMLINK_NOFOLLOW,
  Dirent64,
  ENAMETOOLONG,
  ENOENT,
  ENOTDIR,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_PATH,
  O_RDONLY,
  S_IFDIR,
  S_IFMT,
  Statx,
} from '../fs/linux.js';
import { LOOKUP_MASK, type Share } from '../fs/passthrough/share.js';
import { PATH_BYTES } from './stream.js';

const { u8, u16, u32 } = arena;

const SLASH = 0x2f;
const DOT = 0x2e;
const DT_UNKNOWN = 0;
const DT_DIR = 4;
const LINK_BYTES = 4096 + 64;
const LIST_BYTES = 32 << 10;
/** Directories inside each other that are searched; each holds a descriptor meanwhile. */
const DEPTH = 512;

/** Finds paths of the inodes of a share, which stands still meanwhile as far as the guest goes. */
export class Paths {
  /** Arena offset of the path that {@link link} has found. */
  readonly path: number;
  readonly #share: Share;
  readonly #link = arenaAlloc(LINK_BYTES);
  readonly #name = arenaAlloc(32);
  readonly #list = arenaAlloc(LIST_BYTES);
  /** Bytes of the root's own path in links. */
  readonly #rootBytes: number;

  constructor(share: Share) {
    this.#share = share;
    this.path = this.#link;
    // "/" is its own end, others are followed by a slash.
    const bytes = this.#read(share.fd(ROOT_SLOT));
    this.#rootBytes = bytes === 1 ? 0 : Math.max(bytes, 0);
  }

  /**
   * The path of an inode, open as `fd`, at {@link path}; it is seen to lead there.
   * @returns its length (0: the root), or -ENOENT
   */
  link(slot: number, fd: number): number {
    if (slot === ROOT_SLOT) return 0;
    const bytes = this.place(fd);
    return bytes > 0 && this.leads(slot, this.#link) ? bytes : -ENOENT;
  }

  /** The path of what is open as `fd`, at {@link path}, as the kernel says it. @returns its length, or -ENOENT when it is not below the root */
  place(fd: number): number {
    const bytes = this.#read(fd);
    const skip = this.#rootBytes + 1;
    if (bytes === Math.max(this.#rootBytes, 1)) return 0;
    if (bytes <= skip || u8[this.#link + this.#rootBytes] !== SLASH) return -ENOENT;
    u8.copyWithin(this.#link, this.#link + skip, this.#link + bytes);
    u8[this.#link + bytes - skip] = 0;
    return bytes - skip;
  }

  /** Whether a path (NUL-terminated, at an arena offset) leads to an inode. */
  leads(slot: number, path: number): boolean {
    const share = this.#share;
    const error = native.statx(share.fd(ROOT_SLOT), path, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, LOOKUP_MASK, share.probe);
    return error === 0 && this.#is(slot);
  }

  /** Whether `share.probe` is of this inode. */
  #is(slot: number): boolean {
    const { inodes, mounts, probe } = this.#share;
    const at = slot << SHIFT;
    const word = probe >> 2;
    return (
      u32[word + (Statx.ino >> 2)] === inodes.u32[at] &&
      u32[word + (Statx.ino >> 2) + 1] === inodes.u32[at + Inode.inoHigh] &&
      mounts.is(
        inodes.u32[at + Inode.mount] as number,
        u32[word + (Statx.mountId >> 2)] as number,
        u32[word + (Statx.devMajor >> 2)] as number,
        u32[word + (Statx.devMinor >> 2)] as number,
      )
    );
  }

  #read(fd: number): number {
    return native.readlinkat(this.#share.procfd, decimal(fd, this.#name), this.#link, LINK_BYTES - 1);
  }

  /**
   * Searches the tree for inodes: `found` is called with each and its path, until none is missing.
   * @param missing slots
   */
  search(missing: Set<number>, found: (slot: number, path: Buffer) => void): void {
    const root = native.reopen(this.#share.procfd, this.#share.fd(ROOT_SLOT), O_RDONLY | O_DIRECTORY);
    if (root < 0) return;
    // By number first: most entries are none of them.
    const numbers = new Set<number>();
    for (const slot of missing) numbers.add(this.#share.inodes.u32[slot << SHIFT] as number);
    this.#walk(root, Buffer.alloc(0), 0, numbers, missing, found);
    native.close(root);
  }

  #walk(
    dirfd: number,
    path: Buffer,
    depth: number,
    numbers: ReadonlySet<number>,
    missing: Set<number>,
    found: (slot: number, path: Buffer) => void,
  ): void {
    const share = this.#share;
    const inside: Buffer[] = [];
    for (;;) {
      const bytes = native.getdents64(dirfd, this.#list, LIST_BYTES);
      if (bytes <= 0) break;
      for (let at = this.#list; at < this.#list + bytes; at += u16[(at + Dirent64.reclen) >> 1] as number) {
        const name = at + Dirent64.name;
        if (u8[name] === DOT && (u8[name + 1] === 0 || (u8[name + 1] === DOT && u8[name + 2] === 0))) continue;
        const type = u8[at + Dirent64.type];
        // A mount point has another number than its entry.
        if (type !== DT_DIR && type !== DT_UNKNOWN && !numbers.has(u32[at >> 2] as number)) continue;
        if (native.statx(dirfd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, LOOKUP_MASK, share.probe) < 0) continue;
        const bytesOf = () => Buffer.from(u8.slice(name, u8.indexOf(0, name)));
        if (((u16[(share.probe + Statx.mode) >> 1] as number) & S_IFMT) === S_IFDIR) inside.push(bytesOf());
        const slot = this.#slotOf();
        if (!missing.delete(slot)) continue;
        found(slot, join(path, bytesOf()));
        if (missing.size === 0) return;
      }
    }
    for (const name of inside) {
      const child = join(path, name);
      if (depth === DEPTH || child.length > PATH_BYTES) continue;
      u8.set(name, this.#link);
      u8[this.#link + name.length] = 0;
      const fd = native.openat(dirfd, this.#link, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0);
      if (fd < 0) continue;
      this.#walk(fd, child, depth + 1, numbers, missing, found);
      native.close(fd);
      if (missing.size === 0) return;
    }
  }

  /** The inode that `share.probe` is of, or 0. */
  #slotOf(): number {
    const { inodes, mounts, probe } = this.#share;
    const word = probe >> 2;
    const mount = mounts.find(
      u32[word + (Statx.mountId >> 2)] as number,
      u32[word + (Statx.devMajor >> 2)] as number,
      u32[word + (Statx.devMinor >> 2)] as number,
    );
    return mount < 0 ? 0 : inodes.byIno(u32[word + (Statx.ino >> 2)] as number, u32[word + (Statx.ino >> 2) + 1] as number, mount);
  }

  free(): void {
    arenaFree(this.#link, LINK_BYTES);
    arenaFree(this.#name, 32);
    arenaFree(this.#list, LIST_BYTES);
  }
}

function join(path: Buffer, name: Buffer): Buffer {
  return path.length === 0 ? name : Buffer.concat([path, Buffer.of(SLASH), name]);
}

/** A number ≥ 0 as a NUL-terminated name. */
function decimal(n: number, at: number): number {
  let end = at;
  for (let rest = n; rest > 9; rest = Math.floor(rest / 10)) end++;
  u8[end + 1] = 0;
  for (let rest = n, to = end; to >= at; rest = Math.floor(rest / 10), to--) u8[to] = 0x30 + (rest % 10);
  return at;
}

/** Opens paths below the root one component at a time: no link is followed, and nothing leads up. */
export class Opener {
  readonly #root: number;
  /** The directory that the last path was in, which the next one is likely to be in. */
  #dir = -1;
  #dirPath: Buffer = Buffer.alloc(0);
  readonly #name = arenaAlloc(256);

  constructor(root: number) {
    this.#root = root;
  }

  /** An O_PATH descriptor of what the path (`bytes` from arena offset `at`) names, or -errno. */
  open(at: number, bytes: number): number {
    if (bytes === 0) return native.openat(this.#root, this.#self(), O_PATH | O_DIRECTORY, 0);
    const path = u8.subarray(at, at + bytes);
    const slash = path.lastIndexOf(SLASH);
    const parent = this.#parent(Buffer.from(path.subarray(0, Math.max(slash, 0))));
    if (parent < 0) return parent;
    return this.#component(parent, path.subarray(slash + 1), O_PATH | O_NOFOLLOW);
  }

  #parent(path: Buffer): number {
    if (path.length === 0) return this.#root;
    if (this.#dir >= 0 && path.equals(this.#dirPath)) return this.#dir;
    let dir = this.#root;
    for (let from = 0; from <= path.length; ) {
      const slash = path.indexOf(SLASH, from);
      const to = slash < 0 ? path.length : slash;
      const next = this.#component(dir, path.subarray(from, to), O_PATH | O_DIRECTORY | O_NOFOLLOW);
      if (dir !== this.#root) native.close(dir);
      if (next < 0) return next;
      dir = next;
      from = to + 1;
    }
    if (this.#dir >= 0) native.close(this.#dir);
    this.#dir = dir;
    this.#dirPath = path;
    return dir;
  }

  #component(dir: number, name: Uint8Array, flags: number): number {
    if (name.length > 255) return -ENAMETOOLONG;
    if (name.length === 0 || name.includes(0) || (name[0] === DOT && (name.length === 1 || (name.length === 2 && name[1] === DOT))))
      return -ENOENT;
    u8.set(name, this.#name);
    u8[this.#name + name.length] = 0;
    return native.openat(dir, this.#name, flags, 0);
  }

  #self(): number {
    u8[this.#name] = DOT;
    u8[this.#name + 1] = 0;
    return this.#name;
  }

  close(): void {
    if (this.#dir >= 0) native.close(this.#dir);
    this.#dir = -1;
    arenaFree(this.#name, 256);
  }
}

/** S_IFMT of what is open as `fd`, or -errno. `out` gets its struct statx. */
export function typeOf(fd: number, out: number): number {
  const error = native.statx(fd, EMPTY_NAME, AT_EMPTY_PATH, LOOKUP_MASK, out);
  return error < 0 ? error : (u16[(out + Statx.mode) >> 1] as number) & S_IFMT;
}

/** A descriptor that open_by_handle_at(2) takes for the mount that `fd` is on, or -errno. */
export function mountDescriptor(procfd: number, fd: number, out: number): number {
  const type = typeOf(fd, out);
  if (type < 0) return type;
  return type === S_IFDIR ? native.reopen(procfd, fd, O_RDONLY | O_DIRECTORY) : -ENOTDIR;
}
