/** The limit of open files. */
import { readFileSync } from 'node:fs';
import { native } from 'vhost-user-ts/native';
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
