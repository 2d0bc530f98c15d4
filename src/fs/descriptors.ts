/** The descriptors in a state block: what a process must have open, under the same numbers, to go on with it. */
import { native } from 'vhost-user-ts/native';
import { type Block, HANDLE_RECORD, HANDLE_SLOTS, Header, INODE_RECORD, INODE_SLOTS, MOUNT_RECORD, MOUNT_SLOTS, Part } from './block.js';
import { TOP as HANDLES_TOP, Handle, HandleFlag, Kind } from './handles.js';
import { Flag, TOP as INODES_TOP, Inode } from './inodes.js';
import { Mount } from './mounts.js';

/** Where in the block descriptors stand. */
export class BlockDescriptors {
  readonly #inodes: Int32Array;
  readonly #handles: Int32Array;
  readonly #mounts: Int32Array;
  readonly #header: Uint32Array;
  readonly #buffers: ArrayBuffer[];

  constructor(block: Block) {
    const parts = [
      block.buffer(Part.inodes, INODE_SLOTS * INODE_RECORD),
      block.buffer(Part.handles, HANDLE_SLOTS * HANDLE_RECORD),
      block.buffer(Part.mounts, MOUNT_SLOTS * MOUNT_RECORD),
    ] as const;
    this.#buffers = [...parts];
    this.#inodes = new Int32Array(parts[0]);
    this.#handles = new Int32Array(parts[1]);
    this.#mounts = new Int32Array(parts[2]);
    this.#header = block.header;
  }

  /**
   * Calls `visit` with the place of each: pinned ones of inodes, those of open handles, those of mounts. Cached ones can be had again.
   */
  visit(visit: (words: Int32Array, at: number) => void): void {
    const inodes = this.#inodes;
    for (let at = 0, end = (this.#header[Header.inodes + INODES_TOP] as number) * (INODE_RECORD / 4); at < end; at += INODE_RECORD / 4) {
      const flags = inodes[at + Inode.flags] as number;
      if ((flags & Flag.live) !== 0 && (flags & Flag.pinned) !== 0 && (inodes[at + Inode.fd] as number) >= 0) visit(inodes, at + Inode.fd);
    }
    const handles = this.#handles;
    for (
      let at = 0, end = (this.#header[Header.handles + HANDLES_TOP] as number) * (HANDLE_RECORD / 4);
      at < end;
      at += HANDLE_RECORD / 4
    ) {
      const closing = ((handles[at + Handle.flags] as number) & HandleFlag.closing) !== 0;
      if (handles[at + Handle.kind] !== Kind.none && !closing) visit(handles, at + Handle.fd);
    }
    const mounts = this.#mounts;
    for (let at = 0, end = (this.#header[Header.mounts] as number) * (MOUNT_RECORD / 4); at < end; at += MOUNT_RECORD / 4) {
      if ((mounts[at + Mount.fd] as number) >= 0) visit(mounts, at + Mount.fd);
    }
  }

  /** All of them, each once. */
  list(): number[] {
    const fds = new Set<number>();
    this.visit((words, at) => fds.add(words[at] as number));
    return [...fds];
  }

  /** Takes out those that could not be had. An open handle without a descriptor answers every request with EBADF. */
  drop(lost: ReadonlySet<number>): void {
    if (lost.size === 0) return;
    this.visit((words, at) => {
      if (lost.has(words[at] as number)) words[at] = -1;
    });
  }

  close(): void {
    for (const buffer of this.#buffers) native.regionDetach(buffer);
  }
}
