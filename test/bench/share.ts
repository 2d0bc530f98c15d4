/** The directory that level a works on: made once, kept in the cache, the same for every daemon. */
import { execFileSync } from 'node:child_process';
import { chmodSync, closeSync, existsSync, fsyncSync, mkdirSync, openSync, rmSync, statfsSync, writeSync } from 'node:fs';
import path from 'node:path';
import { cacheFolder } from '../../qemu/guest.js';

const MIB = 1 << 20;
const PAGE = 4096;

/** Raised whenever the content changes. */
const LAYOUT = 2;

/** Directories of files f0000000, f0000001 and so on. */
const directories: readonly { name: string; files: number; pages: number }[] = [
  { name: 'names-1k', files: 1000, pages: 1 },
  { name: 'forget-1k', files: 1000, pages: 0 },
  { name: 'list-1k', files: 1000, pages: 0 },
  { name: 'list-100k', files: 100_000, pages: 0 },
];
/** The million takes half a minute to make, so it is made only when it is used. */
const many = { full: { name: 'names-1m', files: 1_000_000, pages: 0 }, quick: { name: 'names-100k', files: 100_000, pages: 0 } };

export interface Share {
  root: string;
  /** The directory with many names, and how many they are. */
  many: { name: string; files: number };
}

/**
 * Makes what is missing. All daemons work on the same files, one at a time: two files of equal size need not be equally
 * fast, because of how the page cache holds them.
 */
export function makeShare(quick: boolean): Share {
  const root = path.join(cacheFolder, `bench/share-${LAYOUT}`);
  mkdirSync(root, { recursive: true });
  const { bavail, bsize } = statfsSync(root);
  if (!existsSync(path.join(root, 'cold')) && bavail * bsize < 8 * 1024 * MIB) throw new Error(`${root} needs 8 GiB of free disk`);
  const names = quick ? many.quick : many.full;
  for (const directory of [...directories, names]) complete(path.join(root, directory.name), (at) => makeNames(at, directory));
  complete(path.join(root, 'read'), (at) => makeFile(at, 256 * MIB));
  complete(path.join(root, 'cold'), (at) => makeFile(at, 2048 * MIB));
  complete(path.join(root, 'write'), (at) => makeFile(at, 64 * MIB));
  complete(path.join(root, 'fsync'), (at) => {
    mkdirSync(at);
    for (let i = 0; i < 64; i++) makeFile(path.join(at, `fsync-${i}`), PAGE);
  });
  const made = path.join(root, 'made');
  rmSync(made, { recursive: true, force: true });
  mkdirSync(made);
  // Guest users make files in it.
  chmodSync(made, 0o777);
  return { root, many: names };
}

/** A file or directory that is there is complete. */
export function complete(target: string, make: (at: string) => void): void {
  if (existsSync(target)) return;
  const partial = `${target}.partial`;
  rmSync(partial, { recursive: true, force: true });
  make(partial);
  execFileSync('mv', ['-T', partial, target]);
}

function makeNames(at: string, { files, pages }: { files: number; pages: number }): void {
  if (files > 100_000) process.stderr.write(`bench: making ${files} files, once\n`);
  mkdirSync(at);
  const content = pagesFrom(0, pages);
  for (let i = 0; i < files; i++) {
    const fd = openSync(path.join(at, `f${String(i).padStart(7, '0')}`), 'wx');
    if (pages > 0) writeSync(fd, content);
    closeSync(fd);
  }
}

/** Filled with its own offsets, which the client checks. */
export function makeFile(at: string, bytes: number): void {
  const fd = openSync(at, 'wx');
  const step = Math.min(bytes, 4 * MIB);
  for (let offset = 0; offset < bytes; offset += step) writeSync(fd, pagesFrom(offset, step / PAGE));
  // What is still to be written back could not be dropped from the cache.
  fsyncSync(fd);
  closeSync(fd);
}

function pagesFrom(offset: number, count: number): Uint8Array {
  // Offsets stay below 2^32: the upper half of each u64 is zero.
  const words = new Uint32Array((count * PAGE) / 4);
  for (let i = 0; i < words.length; i += 2) words[i] = offset + i * 4;
  return new Uint8Array(words.buffer);
}
