/** A passthrough file system over a temporary directory, with calls in strings and buffers instead of arena offsets. */
import * as fs from 'node:fs';
import * as os from 'node:os';
import * as path from 'node:path';
import { arena, arenaAlloc, arenaString, cString, native } from 'vhost-user-ts/native';
import { NO_FH, type SessionOptions, type SetAttr } from '../../src/fs/filesystem.js';
import { openPassthrough, type PassthroughFs, type PassthroughOptions } from '../../src/fs/passthrough.js';

export const SESSION: SessionOptions = {
  dontMask: false,
  posixAcl: false,
  killPrivV2: false,
  writebackCache: false,
  submounts: true,
  atomicOTrunc: true,
  stripsSetgid: false,
  securityContext: false,
  exportSupport: false,
  autoInvalData: false,
  posixLock: false,
  flock: false,
};

const DATA = 4 << 20;
const data = arenaAlloc(DATA);
const iov = arenaAlloc(2048 * 16);
const nameA = arenaAlloc(8192);
const nameB = arenaAlloc(8192);
const base = native.arenaAddress();
const words = new BigUint64Array(arena.u8.buffer);

export const root = process.geteuid?.() === 0;

export interface Listed {
  name: string;
  ino: number;
  type: number;
  offsetLow: number;
  offsetHigh: number;
  known: boolean;
  nodeid: number;
}

/** One share. */
export class TestFs {
  readonly dir: string;
  readonly fs: PassthroughFs;
  readonly warnings: string[] = [];

  constructor(options: Partial<PassthroughOptions> = {}, session: Partial<SessionOptions> = {}) {
    this.dir = options.root ?? fs.mkdtempSync(path.join(os.tmpdir(), 'fs-test-'));
    fs.chmodSync(this.dir, 0o777);
    this.fs = openPassthrough({ warn: (message) => this.warnings.push(message), ...options, root: this.dir });
    this.fs.init({ ...SESSION, ...session });
  }

  close(): void {
    this.fs.close();
    fs.rmSync(this.dir, { recursive: true, force: true });
  }

  path(name: string): string {
    return path.join(this.dir, name);
  }

  as(uid: number, gid: number = uid, group = -1): this {
    Object.assign(this.fs.caller, { uid, gid, supplementaryGid: group });
    return this;
  }

  /** LOOKUP of a path from the root; the nodeid, or -errno. */
  lookup(name: string, parent = 1): number {
    let nodeid = parent;
    for (const part of name.split('/')) {
      const error = this.fs.lookup(nodeid, cString(part, nameA), Buffer.byteLength(part));
      if (error < 0) return error;
      nodeid = this.fs.entry.nodeid;
    }
    return nodeid;
  }

  /** A field of the attributes of the last call. */
  get attr(): {
    mode: number;
    uid: number;
    gid: number;
    nlink: number;
    size: number;
    ino: number;
    mtime: number;
    mtimeNsec: number;
    atime: number;
    blocks: number;
  } {
    const at = this.fs.attr;
    const { u16, u32 } = arena;
    const u64 = (offset: number): number => (u32[(at + offset) >> 2] as number) + (u32[(at + offset + 4) >> 2] as number) * 2 ** 32;
    return {
      mode: u16[(at + 28) >> 1] as number,
      uid: u32[(at + 20) >> 2] as number,
      gid: u32[(at + 24) >> 2] as number,
      nlink: u32[(at + 16) >> 2] as number,
      size: u64(40),
      ino: u64(32),
      blocks: u64(48),
      atime: Number(BigInt.asIntN(64, words[(at + 64) >> 3] as bigint)),
      mtime: Number(BigInt.asIntN(64, words[(at + 112) >> 3] as bigint)),
      mtimeNsec: u32[(at + 120) >> 2] as number,
    };
  }

  get nodeid(): number {
    return this.fs.entry.nodeid;
  }

  get fh(): number {
    return this.fs.opened.fh;
  }

  getattr(nodeid: number, fh = NO_FH): number {
    return this.fs.getattr(nodeid, fh, 0, 0xfff);
  }

  setattr(nodeid: number, valid: number, fields: Partial<SetAttr> = {}): number {
    return this.fs.setattr(nodeid, {
      fh: NO_FH,
      mode: 0,
      uid: 0,
      gid: 0,
      size: 0,
      atime: 0,
      atimeNsec: 0,
      mtime: 0,
      mtimeNsec: 0,
      ctime: 0,
      ctimeNsec: 0,
      ...fields,
      valid,
    });
  }

  mkdir(parent: number, name: string, mode = 0o755, umask = 0): number {
    return this.fs.mkdir(parent, cString(name, nameA), mode, umask);
  }
  mknod(parent: number, name: string, mode: number, rdev = 0, umask = 0): number {
    return this.fs.mknod(parent, cString(name, nameA), mode, umask, rdev);
  }
  symlink(parent: number, name: string, target: string): number {
    return this.fs.symlink(parent, cString(name, nameA), cString(target, nameB));
  }
  readlink(nodeid: number): string | number {
    const n = this.fs.readlink(nodeid, data, 4096);
    return n < 0 ? n : arenaString(data, n);
  }
  unlink(parent: number, name: string): number {
    return this.fs.unlink(parent, cString(name, nameA));
  }
  rmdir(parent: number, name: string): number {
    return this.fs.rmdir(parent, cString(name, nameA));
  }
  rename(parent: number, name: string, newParent: number, newName: string, flags = 0): number {
    return this.fs.rename(parent, cString(name, nameA), newParent, cString(newName, nameB), flags);
  }
  link(nodeid: number, newParent: number, newName: string): number {
    return this.fs.link(nodeid, newParent, cString(newName, nameA));
  }
  open(nodeid: number, flags = 0, killPriv = false): number {
    return this.fs.open(nodeid, flags, killPriv);
  }
  create(parent: number, name: string, flags = 2, mode = 0o644, umask = 0): number {
    return this.fs.create(parent, cString(name, nameA), flags, mode, umask, false);
  }

  /** Lays iovecs of `pieces` bytes each over the data buffer, after 16 bytes that a header would take. */
  iov(size: number, pieces = size || 1): number {
    let count = 0;
    for (let at = 0; at < size + 16 || count === 0; at += pieces) {
      words[(iov + count * 16) >> 3] = BigInt(base + data + at);
      words[((iov + count * 16) >> 3) + 1] = BigInt(Math.min(pieces, size + 16 - at));
      count++;
    }
    return count;
  }

  read(nodeid: number, fh: number, offset: number, size: number, pieces?: number): string | number {
    const n = this.readRaw(nodeid, fh, offset, size, pieces);
    return n < 0 || n === 0x40000000 ? n : this.data(n);
  }
  readRaw(nodeid: number, fh: number, offset: number, size: number, pieces?: number): number {
    const count = this.iov(size, pieces);
    return this.fs.read(nodeid, fh, offset, size, iov, count, 16);
  }
  /** What READ left in the buffer. */
  data(bytes: number): string {
    return arenaString(data + 16, bytes);
  }
  write(nodeid: number, fh: number, offset: number, text: string | Buffer, flags = 0, pieces?: number): number {
    const bytes = Buffer.from(text);
    arena.u8.set(bytes, data + 16);
    const count = this.iov(bytes.length, pieces);
    return this.fs.write(nodeid, fh, offset, bytes.length, flags, iov, count, 16);
  }

  /** Everything in a directory in answers of at most `perReply` entries; an errno as a number. */
  list(nodeid: number, plus = false, perReply = 1000): Listed[] | number {
    const error = this.fs.opendir(nodeid, 0);
    if (error < 0) return error;
    const fh = this.fh;
    const all: Listed[] = [];
    let low = 0;
    let high = 0;
    for (;;) {
      const some = this.readdir(nodeid, fh, low, high, plus, perReply);
      if (typeof some === 'number') return some;
      const last = some.at(-1);
      if (!last) break;
      all.push(...some);
      low = last.offsetLow;
      high = last.offsetHigh;
    }
    this.fs.releasedir(nodeid, fh);
    return all;
  }

  readdir(nodeid: number, fh: number, low: number, high: number, plus = false, perReply = 1000): Listed[] | number {
    const taken: Listed[] = [];
    const put = (
      name: number,
      length: number,
      inoLow: number,
      inoHigh: number,
      type: number,
      offsetLow: number,
      offsetHigh: number,
      known = false,
    ): boolean => {
      if (taken.length >= perReply) return false;
      const nodeid = known ? this.fs.entry.nodeid : 0;
      taken.push({ name: arenaString(name, length), ino: inoLow + inoHigh * 2 ** 32, type, offsetLow, offsetHigh, known, nodeid });
      return true;
    };
    const result = this.fs.readdir(nodeid, fh, low, high, 65536, { add: put, fits: () => taken.length < perReply, addPlus: put }, plus);
    return result < 0 ? result : taken;
  }

  getxattr(nodeid: number, name: string, size = 4096): string | number {
    const n = this.fs.getxattr(nodeid, cString(name, nameA), data, size);
    return n < 0 || size === 0 ? n : arenaString(data, n);
  }
  setxattr(nodeid: number, name: string, value: string | Buffer, flags = 0, extra = 0): number {
    const bytes = Buffer.from(value);
    arena.u8.set(bytes, data);
    return this.fs.setxattr(nodeid, cString(name, nameA), data, bytes.length, flags, extra);
  }
  listxattr(nodeid: number): string[] | number {
    const n = this.fs.listxattr(nodeid, data, 65536);
    return n < 0 ? n : arenaString(data, n).split('\0').slice(0, -1);
  }
  removexattr(nodeid: number, name: string): number {
    return this.fs.removexattr(nodeid, cString(name, nameA));
  }
}

/** Result of a Node call as the file system would give it: 0 or -errno. */
export function direct(call: () => unknown): number {
  try {
    call();
    return 0;
  } catch (error) {
    const errno = (error as NodeJS.ErrnoException).errno;
    if (errno === undefined) throw error;
    return errno;
  }
}

/** Descriptors that this process has open. */
export function openFds(): number {
  return fs.readdirSync('/proc/self/fd').length;
}
