/**
 * What one request of each opcode costs, counted and exact: system calls, JavaScript memory, kicks, interrupts. Times are for
 * `make bench`; these numbers are the same on every machine, and a change of them is a change of speed.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import * as os from 'node:os';
import * as path from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { OPCODES, operationOf } from '../../src/fuse/opcodes.js';
import { root } from '../support/fs.js';
import type { Cost } from '../support/request-costs.js';
import { hasStrace, traceSteps } from '../support/strace.js';

/**
 * The system calls of one request, in their order, and the bytes of JavaScript objects that a batch of them makes: of 16, jobs and
 * what says so of one. 16 bytes are a number above 2^31 that goes from function to function: a file handle, an ioctl command, or a nodeid in a slot that
 * was used before. `most`: tables that grow now and then, and code that is not always compiled when it is measured.
 */
const EXPECTED: Record<string, readonly [calls: string, bytes: number | { most: number }]> = {
  LOOKUP: ['statx', 0],
  FORGET: ['', 0],
  'LOOKUP of what is to be forgotten': ['statx', 0],
  'BATCH_FORGET of 16': ['', 0],
  GETATTR: ['fstat', 0],
  STATX: ['statx', 0],
  'SETATTR, mode': ['fchmodat fstat', 0],
  ACCESS: ['fstat', 0],
  STATFS: ['fstatfs', 0],
  READLINK: ['readlinkat', 0],
  SYMLINK: ['symlinkat statx name_to_handle_at', 256],
  MKNOD: ['mknodat statx name_to_handle_at', 256],
  MKDIR: ['mkdirat statx name_to_handle_at', 512],
  LINK: ['linkat statx', 0],
  RENAME: ['renameat', 0],
  RENAME2: ['renameat2', 0],
  UNLINK: ['unlinkat', 0],
  RMDIR: ['statx open_by_handle_at unlinkat', 0],
  'UNLINK of l': ['unlinkat', 0],
  'UNLINK of n': ['unlinkat', 0],
  'FORGET of what is gone': ['', 768],
  OPEN: ['open_by_handle_at', 0],
  'GETATTR with fh': ['fstat', 256],
  READ: ['preadv2', 256],
  WRITE: ['pwritev2', 256],
  LSEEK: ['lseek', 256],
  IOCTL: ['ioctl', 512],
  FLUSH: ['', 256],
  'FSYNC, a job': ['fsync', { most: 512 }],
  'FALLOCATE, a job': ['fallocate', { most: 512 }],
  'COPY_FILE_RANGE, a job': ['copy_file_range', { most: 512 }],
  'COPY_FILE_RANGE_64, a job': ['copy_file_range', { most: 512 }],
  'SYNCFS, a job': ['open_by_handle_at syncfs close', { most: 512 }],
  RELEASE: ['close', 256],
  CREATE: ['openat statx name_to_handle_at', 768],
  TMPFILE: ['openat statx name_to_handle_at', 768],
  OPENDIR: ['open_by_handle_at', 0],
  'READDIR of 18': ['getdents64', { most: 2560 }],
  'OPENDIR again': ['open_by_handle_at', 0],
  'READDIRPLUS of 18, known': ['getdents64 statx 16', { most: 256 }],
  'FSYNCDIR, a job': ['fsync', { most: 512 }],
  RELEASEDIR: ['close', 256],
  SETXATTR: ['setxattr', 0],
  GETXATTR: ['getxattr', 0],
  LISTXATTR: ['listxattr', 0],
  REMOVEXATTR: ['removexattr', 0],
  FSNOTIFY: ['name_to_handle_at fstatfs fanotify_mark', { most: 1024 }],
  'FSNOTIFY, none': ['fanotify_mark', { most: 1024 }],
  READ_NOTIFY: ['', { most: 256 }],
  INTERRUPT: ['', 0],
  NOTIFY_REPLY: ['', 0],
  GETLK: ['', 0],
  SETLK: ['', 0],
  SETLKW: ['', 0],
  BMAP: ['', 0],
  POLL: ['', 0],
  SETUPMAPPING: ['', 0],
  REMOVEMAPPING: ['', 0],
};

/** Enough for everything to be compiled, and no longer. */
const ROUNDS = 320;
/** Opcodes that are not measured: INIT and DESTROY come once per mount, and no guest sends an unknown one. */
const NOT_MEASURED = ['UNKNOWN', 'INIT', 'DESTROY'];

const program = fileURLToPath(new URL('../support/request-costs.js', import.meta.url));

function inFolder<T>(body: (folder: string) => T): T {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'request-cost-'));
  try {
    return body(folder);
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

/** `statx` when each of the requests made one such call, `statx 3` for another number. */
function perRequest(calls: readonly string[], requests: number): string {
  const counts = new Map<string, number>();
  for (const call of calls) counts.set(call, (counts.get(call) ?? 0) + 1);
  return [...counts].map(([call, count]) => (count === requests ? call : `${call} ${count / requests}`)).join(' ');
}

test('system calls, kicks and interrupts of each opcode', {
  skip: !root ? 'needs root' : hasStrace ? false : 'strace is not installed',
}, () => {
  const inThreads = /^(fsync|fallocate|copy_file_range|syncfs)\(|^write\(\d+, "\\1\\0/;
  const { stdout, steps } = inFolder((folder) => traceSteps(program, ['9', folder], inThreads));
  const costs = JSON.parse(stdout) as Cost[];
  const counted: Record<string, string> = {};
  const expected: Record<string, string> = {};
  for (const [i, { name, requests, kicks, interrupts }] of costs.entries()) {
    const calls = (steps[i + 1] ?? []).map((line) => line.replace(/^write\(\d+, "\\1\\0.*/, 'signal').replace(/\(.*/, ''));
    const count = (call: string): number => calls.filter((each) => each === call).length;
    const own = calls.filter((call) => call !== 'epoll_wait' && call !== 'signal');
    counted[name] =
      `${perRequest(own, requests)}; a batch: ${kicks} kick, ${count('epoll_wait')} wait, ${count('signal')} signal, ${interrupts} interrupt`;
    // A job signals its end to the device's thread, which waits for it once more.
    const waits = name.endsWith(', a job') ? 2 : 1;
    const told = name === 'READ_NOTIFY' ? 0 : 1;
    expected[name] = `${EXPECTED[name]?.[0]}; a batch: 1 kick, ${waits} wait, ${waits - 1 + told} signal, ${told} interrupt`;
  }
  assert.deepEqual(counted, expected);
  const measured = new Set([...NOT_MEASURED, ...costs.map(({ opcode }) => operationOf(opcode).name)]);
  assert.deepEqual(
    OPCODES.map(({ name }) => name).filter((name) => !measured.has(name)),
    [],
    'opcodes without a number',
  );
});

test('JavaScript memory that each opcode allocates', { skip: root ? false : 'needs root' }, () => {
  // Code is compiled at once, and not when a thread of the compiler gets round to it.
  const args = ['--no-warnings', '--no-concurrent-recompilation', program, String(ROUNDS)];
  const costs = inFolder((folder) => JSON.parse(execFileSync(process.execPath, [...args, folder], { encoding: 'utf8' })) as Cost[]);
  const counted: Record<string, number | string> = {};
  const expected: Record<string, number | string> = {};
  for (const { name, heap } of costs) {
    const number = EXPECTED[name]?.[1] ?? -1;
    // Other versions of V8 compile other functions into their callers.
    const bytes = typeof number === 'number' && !process.version.startsWith('v20.') ? { most: number + 2048 } : number;
    if (typeof bytes === 'number') {
      counted[name] = heap;
      expected[name] = bytes;
    } else {
      counted[name] = heap <= bytes.most ? 'enough' : heap;
      expected[name] = 'enough';
    }
  }
  assert.deepEqual(counted, expected);
});
