/** What a watcher hears in a guest, compared with one on the host: for the tests in test/guest. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import type { TestContext } from 'node:test';
import type { Guest } from '../../qemu/guest.js';
import { PROGRAM, Watcher } from './fsnotify.js';
import { type Change, Changer } from './watch-changer.js';

/** A new tree that {@link CHANGES} can be made in. */
export function makeTree(share: string): string {
  const root = mkdtempSync(join(share, 't'));
  for (const directory of ['w', 'w/s', 'o', 'sync']) mkdirSync(join(root, directory));
  writeFileSync(join(root, 'w/f'), 'f');
  writeFileSync(join(root, 'o/other'), 'o');
  return root;
}

/** What the guest does itself, in a directory that it watches. */
export const OWN = [
  'echo 1 > a',
  'echo 2 >> a',
  'cat a',
  'chmod 600 a; touch a',
  'ln a b; ln -s a c',
  'mkdir d; mv a d/a; mv d/a e; mv e b',
  'ls d',
  'rm b c',
  'rmdir d',
];

export const WATCHED = ['w', 'w/f', 'w/s', 'sync'];

/**
 * Events of one process on one object that were not read yet are one event for fanotify, with the bits of all: what repeats is delivered
 * at least once, in the place of the first.
 */
export function assertSame(guest: readonly string[], host: readonly string[], what: string): void {
  assert.deepEqual([...new Set(guest)], [...new Set(host)], what);
  for (const line of new Set(guest)) {
    // inotify makes one of equal neighbours that were not read yet: how many there are depends on who reads how fast.
    const times = (lines: readonly string[]) => lines.filter((other, i) => other === line && lines[i - 1] !== other).length;
    assert.ok(times(guest) <= times(host), `${what}: ${line} came ${times(guest)} times, on the host ${times(host)} times`);
  }
}

/**
 * What cannot be equal.
 *  - DELETE_SELF and IGNORED: the end of an inode. On the host that is when the daemon lets go of it, in the guest when it is told of the
 *    removal; the guest is tested on its own.
 */
export const withoutEnd = (lines: readonly string[]) => lines.filter((line) => !/ (DELETE_SELF|IGNORED)$/.test(line));

/**
 *  - O_TMPFILE: the file has one name after the other, between which fanotify's merging does not tell.
 */
export const unordered = (lines: readonly string[]) => [...new Set(lines)].sort();

/**
 * fanotify merges in the guest and on the host when it likes: one line a bit, each once. What a name stands for is known only of watched objects.
 *  - FAN_RENAME with one half: the guest is told of the watched half alone, which is MOVED_FROM or MOVED_TO. A whole one
 *    does not say what was renamed: the guest's kernel makes it of a dentry for the name alone.
 *  - DELETE of a watched object does not say whose name it was: the guest's inode has ended before.
 */
export const single = (lines: readonly string[]) =>
  unordered(
    lines.flatMap((line) => {
      if (/ RENAME.* > - -|^- RENAME/.test(line)) return [];
      const [, name, mask, rest] = /^(\S+) (\S+)(.*)$/.exec(line) as unknown as string[];
      const isdir = mask?.includes(',ISDIR') ? ',ISDIR' : '';
      const bits = (mask as string).split(',').filter((bit) => bit !== 'ISDIR');
      return bits.map(
        (bit) => `${name} ${bit}${isdir}${rest?.replace(bit === 'RENAME' || bit === 'DELETE' ? / child \S+$/ : / child other$/, '')}`,
      );
    }),
  );

/** inotify itself drops an event that equals the last one that was not read yet. */
export const squeezed = (lines: readonly string[]) => lines.filter((line, i) => line !== lines[i - 1]);

export const MMAP: Change & { mapped?: string } = { op: 'truncate', path: 'w/f', size: 4096, mapped: 'w/f' };

/** Makes each change on the host, and a directory in `sync` after it: what comes before that, on the host and in the guest, is the change's. */
export async function* steps(
  program: string,
  root: string,
  watchers: Watcher[],
  changes: readonly (Change & { mapped?: string })[],
  prepare?: (change: Change) => Promise<void>,
) {
  const changer = new Changer(root);
  let turn = 0;
  try {
    for (const change of changes) {
      await prepare?.(change);
      await changer.do(change);
      if (change.mapped !== undefined) execFileSync(program, ['mmap', join(root, change.mapped)]);
      const name = `${process.pid}.${turn++}.${root.length}.${Date.now()}`;
      await changer.do({ op: 'mkdir', path: `sync/${name}` });
      const lists: string[][] = [];
      for (const watcher of watchers) {
        const lines = await watcher.until(new RegExp(`^sync CREATE,ISDIR( ${name}|$)`));
        lists.push(lines.slice(0, -1));
      }
      yield { change, lists };
    }
  } finally {
    changer.close();
  }
}

/** Before a change the guest looks up what it is about. */
export const look = (local: Watcher, root: string) => async (change: Change) => {
  await local.command(`stat /mnt/${basename(root)}/${change.path}`);
  if ('to' in change) await local.command(`stat /mnt/${basename(root)}/${change.to}`);
};

export const watch = (root: string, names: readonly string[]) => names.map((name) => `${name}=${root}/${name}`);

/** Watchers of the same directories, on the host and in the guest, that end with the test. */
export async function watchers(
  t: TestContext,
  program: string,
  root: string,
  guest: Guest,
  how: string,
  names: readonly string[],
): Promise<[Watcher, Watcher]> {
  const inGuest = join('/mnt', basename(root));
  const host = Watcher.onHost(program, ...how.split(' '), ...watch(root, names));
  t.after(() => host.close());
  const local = Watcher.inGuest(guest, [PROGRAM, how, ...watch(inGuest, names)].join(' '));
  t.after(() => local.close());
  await Promise.all([host.ready(), local.ready()]);
  return [host, local];
}
