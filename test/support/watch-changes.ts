/** The changes that watchers are compared over; as a program, the comparison for whoever runs it. */
import assert from 'node:assert/strict';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { isDeepStrictEqual } from 'node:util';
import { FS_EVENT_ON_CHILD } from '../../src/watch/mask.js';
import { IN_ALL, merged, Share } from './watch-bench.js';
import type { Change } from './watch-changer.js';

const ALL = (IN_ALL | FS_EVENT_ON_CHILD) >>> 0;

const LONG = 'n'.repeat(255);
const UTF8 = 'Grüße 日本 ☃ \u001b[31m';

/** Changes in directory w (watched, with f watched by itself and directory s watched), o is not watched. */
export const CHANGES: readonly Change[] = [
  { op: 'write', path: 'w/new' },
  { op: 'append', path: 'w/new' },
  { op: 'write', path: 'w/new', data: 'other' },
  { op: 'read', path: 'w/new' },
  { op: 'chmod', path: 'w/new', mode: 0o600 },
  { op: 'touch', path: 'w/new' },
  { op: 'setxattr', path: 'w/new', name: 'user.test', value: 'v' },
  { op: 'truncate', path: 'w/new', size: 1 },
  { op: 'append', path: 'w/f' },
  { op: 'chmod', path: 'w/f', mode: 0o600 },
  { op: 'mkdir', path: 'w/d' },
  { op: 'chmod', path: 'w/d', mode: 0o700 },
  { op: 'touch', path: 'w/d' },
  { op: 'list', path: 'w/d' },
  { op: 'list', path: 'w' },
  { op: 'chmod', path: 'w', mode: 0o755 },
  { op: 'list', path: 'w/s' },
  { op: 'chmod', path: 'w/s', mode: 0o755 },
  { op: 'write', path: 'w/s/in' },
  { op: 'link', path: 'w/new', to: 'w/hard' },
  { op: 'link', path: 'w/f', to: 'w/fhard' },
  { op: 'unlink', path: 'w/fhard' },
  { op: 'symlink', path: 'new', to: 'w/soft' },
  { op: 'mkfifo', path: 'w/fifo' },
  { op: 'rename', path: 'w/new', to: 'w/name' },
  { op: 'rename', path: 'w/name', to: 'w/s/into' },
  { op: 'rename', path: 'w/s/into', to: 'o/out' },
  { op: 'rename', path: 'o/out', to: 'w/back' },
  { op: 'rename', path: 'w/back', to: 'w/hard' },
  { op: 'unlink', path: 'w/back' },
  { op: 'rename', path: 'w/hard', to: 'w/over' },
  { op: 'write', path: 'w/target' },
  { op: 'rename', path: 'w/over', to: 'w/target' },
  { op: 'rename', path: 'w/d', to: 'w/d2' },
  { op: 'rename', path: 'w/d2', to: 'o/d2' },
  { op: 'rename', path: 'o/d2', to: 'w/d3' },
  { op: 'exchange', path: 'w/target', to: 'w/soft' },
  { op: 'exchange', path: 'w/target', to: 'o/other' },
  { op: 'rmdir', path: 'w/d3' },
  { op: 'unlink', path: 'w/soft' },
  { op: 'write', path: `w/${LONG}` },
  { op: 'rename', path: `w/${LONG}`, to: `w/${UTF8}` },
  { op: 'unlink', path: `w/${UTF8}` },
  { op: 'tmpfile', path: 'w/linked' },
  { op: 'rename', path: 'w/f', to: 'w/moved' },
  { op: 'append', path: 'w/moved' },
  { op: 'rename', path: 'w/s', to: 'w/s2' },
  { op: 'write', path: 'w/s2/later' },
  { op: 'rmtree', path: 'w/s2' },
  { op: 'unlink', path: 'w/moved' },
];

/** Two names of one inode: rename(2) does nothing. */
const NOTHING: Change = { op: 'rename', path: 'w/back', to: 'w/hard' };

/** Reads of directories by the search that replaces handles: a local watcher sees them, for ours they are echoes. */
function withoutReads(lines: readonly string[]): string[] {
  return lines.filter((line) => !/ (OPEN|ACCESS|CLOSE_NOWRITE),ISDIR$/.test(line));
}

/** An unlinked file has no name that two watchers would agree on: O_TMPFILE's is "#" and its inode number. */
function withoutTemporary(lines: readonly string[]): string[] {
  return lines.filter((line) => !/^w #\d+ /.test(line) && !/^w {2}/.test(line));
}

/** Makes every change in a new share below `base`, and compares what the guest hears with what a local watcher does. */
export async function compare(base: string, handles: boolean, pairs = true): Promise<void> {
  const share = new Share(base, { handles });
  try {
    mkdirSync(join(share.root, 'w'));
    mkdirSync(join(share.root, 'w/s'));
    mkdirSync(join(share.root, 'o'));
    writeFileSync(join(share.root, 'w/f'), 'f');
    writeFileSync(join(share.root, 'o/other'), 'o');
    share.watch('w', ALL);
    share.watch('w/f', IN_ALL);
    share.watch('w/s', ALL);
    share.seen();
    for (const change of CHANGES) {
      // tmpfs has no user attributes before Linux 6.6.
      try {
        await share.changer.do(change);
      } catch (error) {
        if (change.op !== 'setxattr') throw error;
      }
      const { guest, local } = share.seen();
      const same = (lines: string[]) => {
        const joined = change.op === 'tmpfile' ? withoutTemporary(lines) : lines;
        const some = pairs ? joined : joined.map((line) => line.replace(/ [→←]$/, ''));
        // Without FAN_RENAME the halves of both renames are merged by name.
        if (!pairs && change.op === 'exchange') some.sort();
        return handles ? some : withoutReads(some);
      };
      assert.deepEqual(same(guest), merged(same(local)), JSON.stringify(change));
      if (change.op === 'setxattr' || !change.path.startsWith('w') || isDeepStrictEqual(change, NOTHING)) continue;
      assert.ok(guest.length > 0, JSON.stringify(change));
    }
  } finally {
    share.close();
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  await compare(process.argv[2] as string, process.argv[3] === 'handles');
  process.stdout.write(`uid ${process.getuid?.()}: the same\n`);
}
