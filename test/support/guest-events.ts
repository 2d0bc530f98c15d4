/** What a watcher hears in a guest, compared with one on the host: for the tests in test/guest. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { after, before, describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Guest, startDaemon } from '../../qemu/guest.js';
import { PROGRAM, Watcher } from './fsnotify.js';
import { type Setup, type SetupOptions, setUp } from './guests.js';
import { type Change, Changer } from './watch-changer.js';
import { CHANGES } from './watch-changes.js';

/** A guest with the program, its share, and a second share without events at /ref: what happens there is local alone. `folder`: for that one. */
export async function machine(folder: string, program: string, options: SetupOptions): Promise<Setup> {
  const { kind, kernel } = options;
  const ref = await startDaemon({
    shareDir: mkdtempSync(join(folder, 'ref-')),
    options: ['--fsnotify=off'],
    ...(kind === 'uml' ? { tag: 'ref' } : {}),
  });
  try {
    const setup = await setUp({
      ...options,
      memoryMiB: typeof kernel === 'string' && kernel.endsWith('debug') ? 1024 : 256,
      files: { ...options.files, [PROGRAM]: program },
      moreShares: [{ socket: ref, tag: 'ref', mount: '/ref' }],
    });
    const end = setup.end;
    return { ...setup, end: () => end().finally(() => ref.stop()) };
  } catch (error) {
    await ref.stop();
    throw error;
  }
}

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

const FANOTIFY = [
  ['fid', false],
  ['name', false],
  ['name', true],
  ['target', false],
  ['target', true],
] as const;

/** How the events of a guest's kernel differ from case to case. */
export interface Comparison {
  /** Waits until events will come to the last of the watchers, which is in the guest. `probe`: a directory on the host that it watches. */
  arm?: (watchers: readonly Watcher[], probe: string) => Promise<void>;
  /** false: this kernel refuses fanotify marks on FUSE (Linux before 6.8 without our patch). */
  fanotify?: boolean;
  /** false: the guest has no inotifywait. */
  inotifywait?: boolean;
  /** What the agent looks at with O_PATH says OPEN and CLOSE_NOWRITE (Linux before 6.10 but for newer stable ones). */
  looksAreHeard?: boolean;
  /** This kernel says that a file's name was removed before it says so of the file (Linux before 5.17 but for newer stable ones). */
  nameFirst?: boolean;
  /** A watched file that another one is renamed over says ATTRIB twice: FUSE does not end it with the rename (Linux before 5.16). */
  replacedTwice?: boolean;
}

/** Waits until the agent has found what is watched, and takes what was heard until then. */
export async function armAgent(watchers: readonly Watcher[], probe: string): Promise<void> {
  const local = watchers.at(-1) as Watcher;
  while (!local.lines.some((line) => /CREATE,ISDIR( |$)/.test(line))) {
    mkdirSync(join(probe, `probe${process.hrtime.bigint()}`));
    await sleep(50);
  }
  for (let before = -1; before !== local.lines.length; await sleep(200)) before = local.lines.length;
  for (const watcher of watchers) watcher.lines.length = 0;
}

/** The whole comparison, for one kind of guest. */
export function compareEvents(title: string, program: () => string, machine: () => Promise<Setup>, options: Comparison = {}): void {
  const { arm = async () => undefined, fanotify = true, looksAreHeard = false, nameFirst = false, replacedTwice = false } = options;
  describe(title, () => {
    let setup: Setup;
    let guest: Guest;
    const isLook = (line: string) => /\b(OPEN|CLOSE_NOWRITE)\b/.test(line);
    const withoutLooks = (lines: readonly string[]) => (looksAreHeard ? lines.filter((line) => !isLook(line)) : lines);
    before(async () => {
      setup = await machine();
      guest = setup.guest;
    });
    after(() => setup.end());

    for (const known of [false, true]) {
      it(`inotify, files that the guest ${known ? 'knows' : 'never looked up'}`, { timeout: 60_000 }, async (t) => {
        const root = makeTree(setup.share);
        const [host, local] = await watchers(t, program(), root, guest, 'inotify', WATCHED);
        await arm([host, local], join(root, 'sync'));
        const ends: string[] = [];
        let looks = 0;
        for await (const { change, lists } of steps(
          program(),
          root,
          [host, local],
          [MMAP, ...CHANGES],
          known ? look(local, root) : undefined,
        )) {
          const [onHost, seen] = lists.map(withoutEnd).map(withoutLooks) as [string[], string[]];
          const what = JSON.stringify(change);
          const [looksOnHost, looksSeen] = lists.map((lines) => lines.filter(isLook).length) as [number, number];
          looks += looksSeen - looksOnHost;
          if (change.op === 'tmpfile' || nameFirst) assert.deepEqual(unordered(seen), unordered(onHost), what);
          else assertSame(seen, onHost, what);
          ends.push(...(lists[1] as string[]).filter((line) => / (DELETE_SELF|IGNORED|DELETE,ISDIR s2|DELETE moved)/.test(line)));
        }
        if (looksAreHeard) assert.ok(looks > 0, 'the looks of the agent are heard: to be documented no longer');
        // As a local watcher hears it: the object's end, then the name's.
        const expected = ['w/s DELETE_SELF', 'w/s IGNORED', 'w DELETE,ISDIR s2', 'w/f DELETE_SELF', 'w/f IGNORED', 'w DELETE moved'];
        assert.deepEqual(nameFirst ? unordered(ends) : ends, nameFirst ? unordered(expected) : expected);
      });
    }

    for (const [report, known] of fanotify ? FANOTIFY : []) {
      it(`fanotify, reporting ${report}, files that the guest ${known ? 'knows' : 'never looked up'}`, { timeout: 60_000 }, async (t) => {
        const root = makeTree(setup.share);
        const [host, local] = await watchers(t, program(), root, guest, `fanotify ${report}`, WATCHED);
        await arm([host, local], join(root, 'sync'));
        for await (const { change, lists } of steps(program(), root, [host, local], CHANGES, known ? look(local, root) : undefined)) {
          const [onHost, seen] = lists.map(single) as [string[], string[]];
          assert.deepEqual(seen, onHost, JSON.stringify(change));
        }
      });
    }

    it('the end of what is watched, whatever its name was', { timeout: 60_000 }, async (t) => {
      const root = makeTree(setup.share);
      for (const name of ['replaced', 'removed', 'linked', 'open']) writeFileSync(join(root, 'o', name), 'x');
      for (const name of ['moved', 'directory', 'directory/inside']) mkdirSync(join(root, 'o', name));
      // The directory that they are in is not watched.
      const names = ['replaced', 'removed', 'linked', 'open', 'moved', 'directory', 'directory/inside'].map((name) => `o/${name}`);
      const [, local] = await watchers(t, program(), root, guest, 'inotify', [...names, 'sync']);
      await arm([local], join(root, 'sync'));
      // A directory that is moved to where the guest has never been is not heard of again.
      await local.command(`stat /mnt/${basename(root)}/w`);
      const open = guest.spawn(`exec 3</mnt/${basename(root)}/o/open; echo open; read line; exec 3<&-; echo closed; read line`);
      await open.waitForLine('open');
      const changes: Change[] = [
        { op: 'write', path: 'o/new' },
        { op: 'rename', path: 'o/new', to: 'o/replaced' },
        { op: 'unlink', path: 'o/removed' },
        { op: 'link', path: 'o/linked', to: 'w/link' },
        { op: 'unlink', path: 'o/linked' },
        { op: 'unlink', path: 'w/link' },
        { op: 'unlink', path: 'o/open' },
        { op: 'rename', path: 'o/moved', to: 'w/elsewhere' },
        { op: 'rmdir', path: 'w/elsewhere' },
        { op: 'rmtree', path: 'o/directory' },
      ];
      const seen: string[] = [];
      for await (const { lists } of steps(program(), root, [local], changes))
        seen.push(...(lists[0] as string[]).filter((line) => !/ISDIR/.test(line)));
      const end = (name: string) => [`o/${name} DELETE_SELF`, `o/${name} IGNORED`];
      assert.deepEqual(
        seen.filter((line) => !/ (OPEN|CLOSE_NOWRITE)$/.test(line)),
        [
          ...['o/replaced ATTRIB', ...(replacedTwice ? ['o/replaced ATTRIB'] : []), ...end('replaced')],
          ...['o/removed ATTRIB', ...end('removed')],
          ...['o/linked ATTRIB', 'o/linked ATTRIB', 'o/linked ATTRIB', ...end('linked')],
          'o/open ATTRIB',
          ...['o/moved MOVE_SELF', ...end('moved')],
          ...end('directory/inside'),
          ...end('directory'),
        ],
      );
      // As on a local file system, what is open ends when it is closed.
      void open.write('\n');
      await open.waitForLine('closed');
      assert.deepEqual((await local.until('o/open IGNORED')).slice(-2), end('open'));
      open.endInput();
    });

    const maybe = options.inotifywait === false ? () => undefined : it;
    maybe('inotifywait', { timeout: 60_000 }, async (t) => {
      const root = makeTree(setup.share);
      const host = Watcher.onHost('inotifywait', '-m', '--format', '%e %f', join(root, 'w'));
      t.after(() => host.close());
      const local = Watcher.inGuest(guest, `inotifywait -m --format '%e %f' /mnt/${basename(root)}/w 2>&1`);
      t.after(() => local.close());
      await local.until('Watches established.');
      // The one on the host says so to the terminal.
      for (let turn = 0; host.lines.length === 0; turn++) {
        mkdirSync(join(root, `w/first${turn}`));
        await sleep(20);
      }
      await arm([host, local], join(root, 'w'));
      execFileSync('sh', ['-c', 'echo 1 > a; mv a b; chmod 600 b; rm b; mkdir d; rmdir d; mkdir end'], { cwd: join(root, 'w') });
      const [onHost, seen] = await Promise.all([host, local].map((watcher) => watcher.until('CREATE,ISDIR end')));
      const some = (lines: readonly string[] = []) => withoutLooks(lines).filter((line) => !line.includes('first'));
      assertSame(some(seen), some(onHost), 'inotifywait');
    });

    it('what the guest does itself is heard once', { timeout: 60_000 }, async (t) => {
      const root = mkdtempSync(join(setup.share, 't'));
      const own = Watcher.inGuest(guest, `fsnotify inotify w=/mnt/${basename(root)}`);
      const ref = Watcher.inGuest(guest, 'fsnotify inotify w=/ref');
      t.after(() => own.close());
      t.after(() => ref.close());
      await Promise.all([own.ready(), ref.ready()]);
      await arm([own], root);
      await ok(guest, `cd /ref; ${OWN.join('; ')}; mkdir end end2`);
      await ok(guest, `cd /mnt/${basename(root)}; ${OWN.join('; ')}`);
      // What the daemon did is echoed before this, or never; its RELEASE requests may come later.
      mkdirSync(join(root, 'end'));
      const seen = await own.until('w CREATE,ISDIR end');
      await guest.run('ls /ref');
      mkdirSync(join(root, 'end2'));
      seen.push(...(await own.until('w CREATE,ISDIR end2')));
      const expected = await ref.until('w CREATE,ISDIR end2');
      assert.deepEqual(squeezed(seen), squeezed(expected));
    });
  });
}

/** Two guests of one shared directory, with the directories w and sync: each hears the other once, and itself once. */
export function compareTwo(program: () => string, start: (share: string) => Promise<[Setup, Setup]>, options: Comparison = {}): void {
  const { arm = async () => undefined } = options;
  it('each hears the other once, and itself once', { timeout: 120_000 }, async (t) => {
    const share = mkdtempSync(join(tmpdir(), 'two-'));
    t.after(() => rmSync(share, { recursive: true, force: true }));
    for (const name of ['w', 'sync']) mkdirSync(join(share, name));
    const [one, two] = await start(share);
    t.after(() => Promise.all([one.end(), two.end()]));
    for (const [actor, other] of [
      [one, two],
      [two, one],
    ] as const) {
      const host = Watcher.onHost(program(), 'inotify', ...watch(share, ['w', 'sync']));
      const ref = Watcher.inGuest(actor.guest, `fsnotify inotify w=/ref`);
      const seen = [actor, other].map(({ guest }) => Watcher.inGuest(guest, `fsnotify inotify ${watch('/mnt', ['w', 'sync']).join(' ')}`));
      const all = [host, ref, ...seen];
      const close = () => {
        for (const watcher of all) watcher.close();
      };
      t.after(close);
      await Promise.all(all.map((watcher) => watcher.ready()));
      for (const watcher of seen) await arm([host, watcher], join(share, 'sync'));
      for (const watcher of seen) watcher.lines.length = 0;
      const lists: string[][] = all.map(() => []);
      for (const [turn, command] of OWN.entries()) {
        await ok(actor.guest, `cd /mnt/w; ${command}`);
        await ok(actor.guest, `cd /ref; ${command}; mkdir turn${turn}`);
        await closed(host);
        const name = `${actor.guest.pid}.${turn}`;
        mkdirSync(join(share, 'sync', name));
        for (const [i, watcher] of all.entries()) {
          const lines = await watcher.until(watcher === ref ? `w CREATE,ISDIR turn${turn}` : `sync CREATE,ISDIR ${name}`);
          (lists[i] as string[]).push(...lines.slice(0, -1));
        }
      }
      const [onHost, local, own, others] = lists as [string[], string[], string[], string[]];
      assert.deepEqual(squeezed(own), squeezed(local), 'its own changes');
      assertSame(others, onHost, 'of the other guest');
      close();
    }
  });
}

/** Waits until every file that was opened on the host has been closed: a guest's last RELEASE may come late. */
async function closed(host: Watcher): Promise<void> {
  const count = (what: RegExp) => host.lines.filter((line) => what.test(line)).length;
  while (count(/ OPEN\b/) !== count(/ CLOSE_/)) await sleep(2);
}

async function ok(guest: Guest, command: string): Promise<void> {
  const { status, stderr } = await guest.run(command);
  assert.equal(status, 0, `${command}: ${stderr}`);
}
