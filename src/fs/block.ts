/**
 * The one block of memory that all state of a share lives in: a memfd with a fixed sparse layout, so that a page costs
 * something only when it is used, and so that the state can outlive the process (its fd can be kept and handed in again),
 * be copied, or be mapped by several threads.
 *
 * ```
 *      0  header page: magic, version, then the words of each store (u32)
 *   4 K  mounts       65536 records of 32 bytes                        (mounts.ts)
 *   4 M  inode maps   which slots are taken: 5 levels of bitmaps       (inodes.ts, slotmap.ts)
 *   8 M  handle maps  the same for open files                          (handles.ts)
 *  16 M  handles      2^20 records of 64 bytes
 *  80 M  index 1      2^24 buckets: inodes by (device, inode, mount)   (chainindex.ts)
 * 144 M  index 2      2^24 buckets: inodes by file handle
 * 256 M  inodes       2^24 records of 128 bytes
 * ```
 */
import { cString, native } from 'vhost-user-ts/native';
import { FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE } from './linux.js';

const MAGIC = 0x56465349; // "ISFV"
/** Grows with every change of layout or meaning: a process does not take up a block of another version. */
const VERSION = 2;

const M = 1 << 20;

export const INODE_SLOTS = 1 << 24;
export const INODE_RECORD = 128;
export const HANDLE_SLOTS = 1 << 20;
export const HANDLE_RECORD = 64;
export const MOUNT_SLOTS = 1 << 16;
export const MOUNT_RECORD = 32;

/** Byte offsets of the parts. */
export const Part = {
  header: 0,
  mounts: 4096,
  inodeMaps: 4 * M,
  handleMaps: 8 * M,
  handles: 16 * M,
  inodeIndex: 80 * M,
  handleIndex: 144 * M,
  inodes: 256 * M,
  end: 256 * M + INODE_SLOTS * INODE_RECORD,
} as const;

/** Word offsets in the header page. */
export const Header = { magic: 0, version: 1, inodes: 16, inodeIndex: 32, handleIndex: 40, handles: 48, mounts: 64 } as const;

/** The mapped block and typed views of it. */
export class Block {
  readonly fd: number;
  /** Whether the block held state when it was mapped (a process before this one made it). */
  readonly inherited: boolean;
  readonly header: Uint32Array;
  readonly #region: number;
  readonly #buffers: ArrayBuffer[] = [];

  /**
   * @param fd a memfd that an earlier process left; -1 makes a new one
   * @throws Error when there is no memory for the mapping, or the block is of another version.
   */
  constructor(fd = -1) {
    this.fd = fd >= 0 ? fd : native.memfdCreate(cString('virtiofsd-ts-state'), Part.end);
    if (this.fd < 0) throw new Error(`memfd_create: errno ${-this.fd}`);
    this.#region = native.regionMap(this.fd, 0, Part.end, 1);
    if (this.#region < 0) throw new Error(`mapping the state block: errno ${-this.#region}`);
    this.header = this.u32(Part.header, 1024);
    this.inherited = this.header[Header.magic] === MAGIC;
    if (this.inherited && this.header[Header.version] !== VERSION) {
      throw new Error(`the state block has layout version ${this.header[Header.version]}, this program knows ${VERSION}`);
    }
    this.header[Header.magic] = MAGIC;
    this.header[Header.version] = VERSION;
  }

  /** Whether this program can go on with a block that another one has made: its layout is the same, or it is empty. */
  static fits(fd: number): boolean {
    const head = native.regionMap(fd, 0, 4096, 0);
    if (head < 0) return false;
    const words = new Uint32Array(native.regionBuffer(head, 0, 4096));
    const fits = words[Header.magic] === 0 || (words[Header.magic] === MAGIC && words[Header.version] === VERSION);
    native.regionUnmap(head);
    return fits;
  }

  /** Words of a part. */
  u32(offset: number, words: number): Uint32Array {
    return new Uint32Array(this.buffer(offset, words * 4));
  }

  /** Bytes of a part. */
  buffer(offset: number, bytes: number): ArrayBuffer {
    const buffer = native.regionBuffer(this.#region, offset, bytes);
    this.#buffers.push(buffer);
    return buffer;
  }

  /** Gives pages back to the system: they read as zeros afterwards. Offset and length are multiples of 4096. */
  punch(offset: number, bytes: number): void {
    native.fallocate(this.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);
  }

  /** Unmaps the block and closes the fd: the views must not be used any more. */
  close(): void {
    for (const buffer of this.#buffers) native.regionDetach(buffer);
    native.regionUnmap(this.#region);
    native.close(this.fd);
  }
}
