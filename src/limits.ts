/** The limits of open files and of the size of files. */
import { readFileSync } from 'node:fs';
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import { Part } from './fs/block.js';
import { StartError } from './starterror.js';

/** virtiofsd's limit, unless the kernel's own is lower. */
const DEFAULT_OPEN_FILES = 1_000_000;

/** RLIMIT_NOFILE as virtiofsd sets it; 0 leaves it. The file system takes what is in force. */
export function setOpenFilesLimit(wanted: number | undefined): void {
  if (wanted === 0) return;
  const kernel = Number(readFileSync('/proc/sys/fs/nr_open', 'utf8'));
  const limit = wanted ?? Math.min(DEFAULT_OPEN_FILES, kernel);
  const reached = native.setOpenFilesLimit(limit);
  if (reached < 0) throw new StartError(`--rlimit-nofile=${limit}: the limit of open files cannot be set (errno ${-reached})`);
  if (wanted !== undefined && reached < wanted) {
    throw new StartError(`--rlimit-nofile=${wanted}: only ${reached} are allowed here: choose a smaller limit`);
  }
}

/** RLIMIT_FSIZE; -1: no limit. */
export interface FileSizeLimit {
  readonly soft: number;
  readonly hard: number;
}

/**
 * Lifts the limit of file sizes, which is meant for what guests write: our own memory, shared with the processes after this one, is files,
 * too, of gigabytes that are never written.
 * @throws StartError when it cannot be lifted far enough
 * @returns what it was, for {@link restoreFileSizeLimit}; undefined: there was none
 */
export function liftFileSizeLimit(): FileSizeLimit | undefined {
  const at = arenaAlloc(16);
  if (native.fileSizeLimit(at) < 0) return undefined;
  const [soft = -1, hard = -1] = [arena.f64[at >> 3], arena.f64[(at >> 3) + 1]];
  if (soft < 0) return undefined;
  if (native.setFileSizeLimit(-1, -1) === 0) return { soft, hard };
  // Who may not go beyond the hard limit goes up to that.
  native.setFileSizeLimit(hard, hard);
  if (hard >= 0 && hard < Part.end)
    throw new StartError(
      `the limit of file sizes (ulimit -H -f) is ${Math.floor(hard / 1024)} KiB: the daemon's own memory needs ${Part.end / 1024} (it is not written to a disk): raise it, or start with CAP_SYS_RESOURCE`,
    );
  return { soft, hard };
}

/** From now on a guest that writes beyond it gets EFBIG. (Node ignores SIGXFSZ.) */
export function restoreFileSizeLimit(was: FileSizeLimit | undefined): void {
  if (was !== undefined) native.setFileSizeLimit(was.soft, was.hard);
}
