/**
 * How many system calls each operation costs: counted by strace in a child process. The numbers are exact; a change of them is
 * a change of behaviour. Those with a bound in the comment have it from the budget that the project has set itself.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { root } from '../support/fs.js';
import { hasStrace, traceSteps } from '../support/strace.js';

/** Calls of each step with file handles as root, and with descriptors. */
const EXPECTED: Record<string, readonly [prefer: number, never: number]> = {
  'LOOKUP, unknown inode': [2, 3],
  'LOOKUP, known inode': [1, 1], // at most 1
  'LOOKUP, missing name': [1, 1], // at most 1
  'GETATTR, first': [2, 1],
  GETATTR: [1, 1], // at most 1
  OPEN: [1, 1], // at most 1
  'GETATTR with fh': [1, 1],
  READ: [1, 1], // at most 1
  'READ over the end of the file': [2, 2], // the end is at a page border: one more call tells it from a cold page
  WRITE: [1, 1], // at most 1
  'WRITE, O_APPEND': [1, 1],
  FLUSH: [0, 0],
  RELEASE: [1, 1], // at most 1
  OPENDIR: [1, 1],
  'READDIRPLUS of 10 (8 new)': [1 + 2 + 8 * 2, 1 + 2 + 8 * 3], // at most 2 + 2 n, the last one being the end
  'READDIRPLUS, the end': [1, 1],
  'READDIRPLUS of 10 known': [11, 11], // at most 2 + n
  'READDIR in 3 answers': [1, 1],
  RELEASEDIR: [1, 1],
  'CREATE as another uid': [5, 5], // at most 5
  'CREATE as the same uid': [3, 3],
  'MKDIR as the same uid': [3, 4],
  'MKNOD as the same uid': [3, 4],
  'CREATE, only the uid changes': [4, 4],
  'SYMLINK as root': [3, 4],
  UNLINK: [1, 1], // at most 2
  RENAME2: [1, 1], // at most 1
  RMDIR: [3, 2], // the removed directory can be a working directory: it keeps a descriptor
  LINK: [2, 2],
  'SETATTR, mode': [2, 2],
  'SETATTR, owner': [2, 2],
  'SETATTR, times': [2, 2],
  'SETATTR, size': [4, 4],
  GETXATTR: [1, 1],
  SETXATTR: [1, 1],
  LISTXATTR: [1, 1],
  REMOVEXATTR: [1, 1],
  STATFS: [1, 1],
  'READLINK, first': [2, 1],
  READLINK: [1, 1],
  'LOOKUP ".."': [1, 1],
  FORGET: [0, 1], // at most 1
  'FORGET with a descriptor': [1, 1],
};

for (const [column, mode] of (['prefer', 'never'] as const).entries()) {
  const skip = !root ? 'needs root' : hasStrace ? false : 'strace is not installed';
  test(`[${mode}] system calls of each operation`, { skip }, () => {
    const { stdout, steps } = traceSteps(fileURLToPath(new URL('../support/fs-calls.js', import.meta.url)), [mode]);
    const names: string[] = JSON.parse(stdout);
    const counted = Object.fromEntries(names.map((name, i) => [name, steps[i + 1]?.length]));
    const expected = Object.fromEntries(Object.entries(EXPECTED).map(([name, numbers]) => [name, numbers[column]]));
    for (const [i, name] of names.entries()) if (counted[name] !== expected[name]) console.log(`${name}:\n  ${steps[i + 1]?.join('\n  ')}`);
    assert.deepEqual(counted, expected);
  });
}
