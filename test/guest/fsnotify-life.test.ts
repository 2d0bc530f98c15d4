/** Watches through the life of guests and daemons: after each turn events are there again. */
import assert from 'node:assert/strict';
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it, type TestContext } from 'node:test';
import { bootGuest, startDaemon } from '../../qemu/guest.js';
import { buildFsnotify, PROGRAM, Watcher } from '../support/fsnotify.js';
import { COMPLAINTS, pause, type Setup, setUp } from '../support/guests.js';

const folder = mkdtempSync(join(tmpdir(), 'life-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => rmSync(folder, { recursive: true, force: true }));

let turn = 0;

/** Starts a watcher in the guest and shows that it hears the host. */
async function hears(t: TestContext, { guest, share }: Pick<Setup, 'guest' | 'share'>): Promise<Watcher> {
  const watcher = Watcher.inGuest(guest, 'fsnotify inotify root=/mnt w=/mnt/w');
  t.after(() => watcher.close());
  await watcher.ready();
  await goesOn(watcher, share);
  return watcher;
}

/** A watcher hears the host, each change once. */
async function goesOn(watcher: Watcher, share: string): Promise<void> {
  const name = `turn${turn++}`;
  mkdirSync(join(share, 'w', name));
  mkdirSync(join(share, name));
  const lines = await watcher.until(`root CREATE,ISDIR ${name}`);
  assert.deepEqual(
    lines.filter((line) => line.includes(name)),
    [`w CREATE,ISDIR ${name}`, `root CREATE,ISDIR ${name}`],
  );
}

const MACHINES: [kind: 'uml' | 'qemu', kernel: string][] = [
  ['uml', '6.12'],
  ['uml', '7.2'],
  ['qemu', 'debian'],
];
// Locking and memory checked by the guest's kernel; it takes its time to build: make test-guest FSNOTIFY_DEBUG=1
if (process.env['FSNOTIFY_DEBUG']) MACHINES.push(['uml', '6.12-debug']);

for (const [kind, kernel] of MACHINES) {
  describe(`watches through the life of a guest: ${kind} ${kernel}`, () => {
    let setup: Setup;
    before(async () => {
      const share = mkdtempSync(join(folder, 'share-'));
      mkdirSync(join(share, 'w'));
      setup = await setUp({ kind, kernel, share, files: { [PROGRAM]: program }, memoryMiB: kernel.endsWith('debug') ? 1024 : 256 });
    });
    after(() => setup.end());

    it('unmount and mount, with watches and without', { timeout: 120_000 }, async (t) => {
      for (let i = 0; i < 3; i++) {
        const watcher = await hears(t, setup);
        const begun = Date.now();
        await setup.guest.unmount('/mnt');
        // The guest's kernel gives up on lent buffers after 5 s.
        assert.ok(Date.now() - begun < 3000, `unmounting took ${Date.now() - begun} ms`);
        const end = await watcher.until(/ IGNORED$/);
        end.push(...(await watcher.until(/ IGNORED$/)));
        assert.deepEqual(end.sort(), ['root IGNORED', 'root UNMOUNT,ISDIR', 'w IGNORED', 'w UNMOUNT,ISDIR']);
        // Changes while nobody is mounted are nobody's.
        mkdirSync(join(setup.share, `unmounted${i}`));
        await setup.guest.mount('myfs', '/mnt');
        watcher.close();
      }
      const watcher = await hears(t, setup);
      assert.ok(watcher.lines.every((line) => !line.includes('unmounted')));
      watcher.close();
      await setup.guest.run('umount -l /mnt'); // also with files open
      await setup.guest.mount('myfs', '/mnt');
      await hears(t, setup);
    });

    it('a mount with a watch is unmounted under a storm', { timeout: 120_000 }, async (t) => {
      for (let i = 0; i < 3; i++) {
        const watcher = await hears(t, setup);
        let over = false;
        const storm = (async () => {
          for (let j = 0; !over; j++) {
            writeFileSync(join(setup.share, 'w', `storm${j % 50}`), `${j}`);
            if (j % 20 === 0) await new Promise((resolve) => setImmediate(resolve));
          }
        })();
        await watcher.until(/ storm9$/);
        await setup.guest.unmount('/mnt');
        over = true;
        await storm;
        await setup.guest.mount('myfs', '/mnt');
        watcher.close();
      }
      await hears(t, setup);
    });

    if (kind === 'qemu') {
      it('the modules are unloaded and loaded', { timeout: 120_000 }, async (t) => {
        for (let i = 0; i < 3; i++) {
          const watcher = await hears(t, setup);
          await setup.guest.unmount('/mnt');
          watcher.close();
          const { status, stderr } = await setup.guest.run(
            'rmmod virtiofs && rmmod fuse && insmod /lib/modules/fuse.ko && insmod /lib/modules/virtiofs.ko',
          );
          assert.equal(status, 0, stderr);
          await setup.guest.mount('myfs', '/mnt');
        }
        await hears(t, setup);
      });
    }

    it('the guest stands still and goes on', { timeout: 120_000 }, async (t) => {
      const watcher = await hears(t, setup);
      for (let i = 0; i < 5; i++) {
        await pause(setup, true);
        const names = Array.from({ length: 100 }, (_, j) => `still${i}.${j}`);
        for (const name of names) mkdirSync(join(setup.share, 'w', name));
        await pause(setup, false);
        const lines = await watcher.until(`w CREATE,ISDIR ${names.at(-1)}`);
        assert.deepEqual(
          lines,
          names.map((name) => `w CREATE,ISDIR ${name}`),
        );
        await goesOn(watcher, setup.share);
      }
    });

    it('the guest restarts', { timeout: 240_000 }, async (t) => {
      for (const hard of kind === 'qemu' ? [false, true] : [false]) {
        await hears(t, setup);
        const dmesg = await setup.guest.dmesg();
        assert.doesNotMatch(dmesg, COMPLAINTS);
        await setup.guest.reboot({ hard });
        await hears(t, setup);
      }
    });
  });
}

describe('the end of daemons and guests with watches', () => {
  for (const [kind, kernel] of [
    ['uml', '6.12'],
    ['qemu', 'debian'],
  ] as const) {
    it(`${kind} ${kernel}`, { timeout: 240_000 }, async (t) => {
      const share = mkdtempSync(join(folder, 'share-'));
      mkdirSync(join(share, 'w'));
      const daemon = await startDaemon({ shareDir: share, ...(kind === 'uml' ? { tag: 'myfs' } : {}) });
      t.after(() => daemon.stop());
      const boot = () => bootGuest({ kind, kernel, shares: [{ socket: daemon }], files: { [PROGRAM]: program } });
      // A guest whose plug is pulled, and another one with the same daemon.
      const first = await boot();
      await hears(t, { guest: first, share });
      await first.kill();
      mkdirSync(join(share, 'nobody'));
      const guest = await boot();
      t.after(() => guest.kill());
      const watcher = await hears(t, { guest, share });
      assert.ok(watcher.lines.every((line) => !line.includes('nobody')));
      // The daemon ends though there are watches and buffers of the guest.
      const begun = Date.now();
      const end = await daemon.stop();
      assert.equal(end.status, 0, daemon.log.join('\n'));
      assert.ok(Date.now() - begun < 2000, `it took ${Date.now() - begun} ms`);
      assert.ok(!existsSync(daemon.socketPath));
      for (let i = 0; i < 100; i++) writeFileSync(join(share, 'w', `late${i}`), '');
    });
  }
});
