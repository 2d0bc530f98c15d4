/** Events in real guests are those of a watcher on the host: inotify and fanotify, made by others, by the guest itself, by another guest. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Daemon, type Guest, startDaemon } from '../../qemu/guest.js';
import { buildFsnotify, PROGRAM, Watcher } from '../support/fsnotify.js';
import {
  assertSame,
  look,
  MMAP,
  makeTree,
  OWN,
  single,
  squeezed,
  steps,
  unordered,
  WATCHED,
  watch,
  watchers,
  withoutEnd,
} from '../support/guest-events.js';
import { type Setup, setUp } from '../support/guests.js';
import type { Change } from '../support/watch-changer.js';
import { CHANGES } from '../support/watch-changes.js';

const folder = mkdtempSync(join(tmpdir(), 'events-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => rmSync(folder, { recursive: true, force: true }));

/** Notification queue (UML), lent buffers (QEMU). */
const MACHINES: ['uml' | 'qemu', string][] = [
  ['uml', '6.12'],
  ['uml', '7.2'],
  ['qemu', 'debian'],
];
if (process.env['FSNOTIFY_DEBUG']) MACHINES.push(['uml', '6.12-debug']);

/** A guest with the program, its share, and a second share without events at /ref: what happens there is local alone. */
async function machine(kind: 'uml' | 'qemu', kernel: string, share?: string): Promise<Setup & { ref: Daemon }> {
  const ref = await startDaemon({
    shareDir: mkdtempSync(join(folder, 'ref-')),
    options: ['--fsnotify=off'],
    ...(kind === 'uml' ? { tag: 'ref' } : {}),
  });
  try {
    const setup = await setUp({
      kind,
      kernel,
      memoryMiB: kernel.endsWith('debug') ? 1024 : 256,
      files: { [PROGRAM]: program },
      moreShares: [{ socket: ref, tag: 'ref', mount: '/ref' }],
      ...(share === undefined ? {} : { share }),
    });
    const end = setup.end;
    return { ...setup, ref, end: () => end().finally(() => ref.stop()) };
  } catch (error) {
    await ref.stop();
    throw error;
  }
}

for (const [kind, kernel] of MACHINES) {
  describe(`events of the host in a guest: ${kind} ${kernel}`, () => {
    let setup: Setup;
    let guest: Guest;
    before(async () => {
      setup = await machine(kind, kernel);
      guest = setup.guest;
    });
    after(() => setup.end());

    for (const known of [false, true]) {
      it(`inotify, files that the guest ${known ? 'knows' : 'never looked up'}`, { timeout: 60_000 }, async (t) => {
        const root = makeTree(setup.share);
        const [host, local] = await watchers(t, program, root, guest, 'inotify', WATCHED);
        const ends: string[] = [];
        for await (const { change, lists } of steps(
          program,
          root,
          [host, local],
          [MMAP, ...CHANGES],
          known ? look(local, root) : undefined,
        )) {
          const [onHost, seen] = lists.map(withoutEnd) as [string[], string[]];
          const what = JSON.stringify(change);
          if (change.op === 'tmpfile') assert.deepEqual(unordered(seen), unordered(onHost), what);
          else assertSame(seen, onHost, what);
          ends.push(...(lists[1] as string[]).filter((line) => / (DELETE_SELF|IGNORED|DELETE,ISDIR s2|DELETE moved)/.test(line)));
        }
        // As a local watcher hears it: the object's end, then the name's.
        assert.deepEqual(ends, ['w/s DELETE_SELF', 'w/s IGNORED', 'w DELETE,ISDIR s2', 'w/f DELETE_SELF', 'w/f IGNORED', 'w DELETE moved']);
      });
    }

    for (const [report, known] of [
      ['fid', false],
      ['name', false],
      ['name', true],
      ['target', false],
      ['target', true],
    ] as const) {
      it(`fanotify, reporting ${report}, files that the guest ${known ? 'knows' : 'never looked up'}`, { timeout: 60_000 }, async (t) => {
        const root = makeTree(setup.share);
        const [host, local] = await watchers(t, program, root, guest, `fanotify ${report}`, WATCHED);
        for await (const { change, lists } of steps(program, root, [host, local], CHANGES, known ? look(local, root) : undefined)) {
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
      const [, local] = await watchers(t, program, root, guest, 'inotify', [...names, 'sync']);
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
      for await (const { lists } of steps(program, root, [local], changes))
        seen.push(...(lists[0] as string[]).filter((line) => !/ISDIR/.test(line)));
      const end = (name: string) => [`o/${name} DELETE_SELF`, `o/${name} IGNORED`];
      assert.deepEqual(
        seen.filter((line) => !/ (OPEN|CLOSE_NOWRITE)$/.test(line)),
        [
          ...['o/replaced ATTRIB', ...end('replaced')],
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

    it('inotifywait', { timeout: 60_000 }, async (t) => {
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
      execFileSync('sh', ['-c', 'echo 1 > a; mv a b; chmod 600 b; rm b; mkdir d; rmdir d; mkdir end'], { cwd: join(root, 'w') });
      const [onHost, seen] = await Promise.all([host, local].map((watcher) => watcher.until('CREATE,ISDIR end')));
      const some = (lines: readonly string[] = []) => lines.filter((line) => !line.includes('first'));
      assertSame(some(seen), some(onHost), 'inotifywait');
    });

    it('what the guest does itself is heard once', { timeout: 60_000 }, async (t) => {
      const root = mkdtempSync(join(setup.share, 't'));
      const own = Watcher.inGuest(guest, `fsnotify inotify w=/mnt/${basename(root)}`);
      const ref = Watcher.inGuest(guest, 'fsnotify inotify w=/ref');
      t.after(() => own.close());
      t.after(() => ref.close());
      await Promise.all([own.ready(), ref.ready()]);
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

describe('two guests on one share', () => {
  it('each hears the other once, and itself once', { timeout: 120_000 }, async (t) => {
    const share = mkdtempSync(join(folder, 'two-'));
    for (const name of ['w', 'sync']) mkdirSync(join(share, name));
    const [one, two] = await Promise.all([machine('uml', '6.12', share), machine('qemu', 'debian', share)]);
    t.after(() => Promise.all([one.end(), two.end()]));
    for (const [actor, other] of [
      [one, two],
      [two, one],
    ] as const) {
      const host = Watcher.onHost(program, 'inotify', ...watch(share, ['w', 'sync']));
      const ref = Watcher.inGuest(actor.guest, `fsnotify inotify w=/ref`);
      const seen = [actor, other].map(({ guest }) => Watcher.inGuest(guest, `fsnotify inotify ${watch('/mnt', ['w', 'sync']).join(' ')}`));
      const all = [host, ref, ...seen];
      const close = () => {
        for (const watcher of all) watcher.close();
      };
      t.after(close);
      await Promise.all(all.map((watcher) => watcher.ready()));
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
});

/** Waits until every file that was opened on the host has been closed: a guest's last RELEASE may come late. */
async function closed(host: Watcher): Promise<void> {
  const count = (what: RegExp) => host.lines.filter((line) => what.test(line)).length;
  while (count(/ OPEN\b/) !== count(/ CLOSE_/)) await sleep(2);
}

async function ok(guest: Guest, command: string): Promise<void> {
  const { status, stderr } = await guest.run(command);
  assert.equal(status, 0, `${command}: ${stderr}`);
}
