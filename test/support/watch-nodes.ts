/** A small inode store for tests of the watcher: real descriptors and handles, nodeids counted from 1. */
import { arena, arenaAlloc, cString, EMPTY_NAME, native } from 'vhost-user-ts/native';
import type { WatchNodes } from '../../src/watch/nodes.js';

const O_PATH = 0x200000;
const O_NOFOLLOW = process.arch === 'arm64' ? 0x8000 : 0x20000;
const AT_EMPTY_PATH = 0x1000;
const ENOENT = 2;
const ESTALE = 116;
const S_IFDIR = 0x4000;
const NAME_AT = arenaAlloc(8192);

interface Node {
  fd: number;
  directory: boolean;
  handle: string;
  mount: number;
  ino: string;
}

export interface TestNodesOptions {
  /** Without handles, as a store without CAP_DAC_READ_SEARCH is: nothing is found by handle, and handles cannot be opened. */
  handles: boolean;
}

export class TestNodes implements WatchNodes {
  readonly procfd = must(native.openat(-100, cString('/proc/self/fd', NAME_AT), O_PATH, 0));
  readonly #nodes = new Map<number, Node>();
  readonly #byIno = new Map<string, number>();
  readonly #byHandle = new Map<string, number>();
  readonly #paths = new Map<number, string>();
  readonly #handles: boolean;
  readonly #out = arenaAlloc(256);
  readonly #statx = arenaAlloc(256);
  #next = 1;
  /** Readable descriptors by mount id, for open_by_handle_at. */
  readonly #mounts = new Map<number, number>();

  constructor(options: TestNodesOptions = { handles: true }) {
    this.#handles = options.handles;
  }

  /** The guest looks a path up: gives it a nodeid (the first one is 1, the root). */
  look(path: string): number {
    const fd = must(native.openat(-100, cString(path, NAME_AT), O_PATH | O_NOFOLLOW, 0));
    const stat = this.#stat(fd, EMPTY_NAME, AT_EMPTY_PATH);
    const known = this.#byIno.get(`${stat.mount} ${stat.ino}`);
    if (known !== undefined) {
      native.close(fd);
      return known;
    }
    // Some file systems have no handles that can be opened.
    const handle = native.nameToHandle(fd, EMPTY_NAME, AT_EMPTY_PATH, this.#out) < 0 ? 'none' : this.#hex(this.#out);
    const node = { fd, directory: stat.directory, handle, mount: stat.mount, ino: stat.ino };
    if (node.directory && !this.#mounts.has(stat.mount)) this.#mounts.set(stat.mount, must(native.reopen(this.procfd, fd, 0)));
    this.#nodes.set(this.#next, node);
    this.#byIno.set(`${node.mount} ${node.ino}`, this.#next);
    this.#byHandle.set(`${node.mount} ${node.handle}`, this.#next);
    this.#paths.set(this.#next, path);
    return this.#next++;
  }

  /** The guest forgets a node. */
  forget(nodeid: number): void {
    const node = this.#nodes.get(nodeid);
    if (node === undefined) return;
    native.close(node.fd);
    this.#nodes.delete(nodeid);
    this.#byIno.delete(`${node.mount} ${node.ino}`);
    this.#byHandle.delete(`${node.mount} ${node.handle}`);
  }

  /** The path that a node was looked up by. */
  path(nodeid: number): string {
    return this.#paths.get(nodeid) ?? `?${nodeid}`;
  }

  close(): void {
    for (const nodeid of [...this.#nodes.keys()]) this.forget(nodeid);
    for (const fd of this.#mounts.values()) native.close(fd);
    native.close(this.procfd);
  }

  check(nodeid: number, generation: number): number {
    if (!this.#nodes.has(nodeid)) return -ENOENT;
    return generation === this.generation(nodeid) ? 0 : -ESTALE;
  }

  generation(nodeid: number): number {
    return this.#nodes.has(nodeid) ? 7000 + nodeid : 0;
  }

  isDirectory(nodeid: number): boolean {
    return this.#nodes.get(nodeid)?.directory ?? false;
  }

  fd(nodeid: number): number {
    return this.#nodes.get(nodeid)?.fd ?? -ENOENT;
  }

  byHandle(handle: number, near: number): number {
    if (!this.#handles) return 0;
    return this.#byHandle.get(`${this.#nodes.get(near)?.mount} ${this.#hex(handle)}`) ?? 0;
  }

  hasHandles(): boolean {
    return this.#handles;
  }

  byName(parent: number, name: number): number {
    const node = this.#nodes.get(parent);
    if (node === undefined || native.statx(node.fd, name, 0x100, 0x1100, this.#statx) < 0) return 0;
    const stat = this.#stat(node.fd, name, 0x100);
    return this.#byIno.get(`${stat.mount} ${stat.ino}`) ?? 0;
  }

  open(handle: number, near: number): number {
    const mountFd = this.#mounts.get(this.#nodes.get(near)?.mount ?? -1) ?? -1;
    return this.#handles ? native.openByHandle(mountFd, handle, O_PATH | O_NOFOLLOW) : -1;
  }

  sameMount(a: number, b: number): boolean {
    return this.#nodes.get(a)?.mount === this.#nodes.get(b)?.mount;
  }

  readonly masks = new Map<number, number>();

  remember(nodeid: number, mask: number): void {
    if (mask === 0) this.masks.delete(nodeid);
    else this.masks.set(nodeid, mask);
  }

  remembered(visit: (nodeid: number, mask: number) => void): void {
    for (const [nodeid, mask] of this.masks) visit(nodeid, mask);
  }

  directories(visit: (nodeid: number) => void): void {
    for (const [nodeid, node] of this.#nodes) if (node.directory) visit(nodeid);
  }

  #stat(fd: number, name: number, flags: number): { ino: string; mount: number; directory: boolean } {
    must(native.statx(fd, name, flags, 0x17ff, this.#statx));
    const word = (offset: number) => arena.u32[(this.#statx + offset) >> 2] as number;
    return {
      ino: `${word(136)}:${word(140)}:${word(36)}:${word(32)}`,
      mount: word(144),
      directory: ((arena.u16[(this.#statx + 28) >> 1] as number) & 0xf000) === S_IFDIR,
    };
  }

  #hex(handle: number): string {
    const bytes = arena.u32[handle >> 2] as number;
    return arena.buffer.toString('hex', handle, handle + 8 + bytes);
  }
}

function must(result: number): number {
  if (result < 0) throw new Error(`errno ${-result}`);
  return result;
}
