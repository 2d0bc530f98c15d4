/** Guests and daemons that come and go: restarts, stops, second clients, several guests on one share. */
import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, it } from 'node:test';
import { bootGuest, startDaemon } from '../../qemu/guest.js';
import { setUp } from '../support/guests.js';

const folder = mkdtempSync(join(tmpdir(), 'life-'));
after(() => rmSync(folder, { recursive: true, force: true }));

for (const [kind, kernel] of [
  ['uml', '6.12'],
  ['uml', 'debian'],
  ['qemu', 'debian'],
] as const) {
  describe(`life of a guest: ${kind} ${kernel}`, () => {
    it('restart, remount, the daemon serves the next guest', { timeout: 240_000 }, async () => {
      const share = mkdtempSync(join(folder, 'share-'));
      const setup = await setUp({ kind, kernel, share });
      try {
        writeFileSync(join(share, 'from-host'), 'one');
        assert.equal((await setup.guest.run('cat /mnt/from-host')).stdout, 'one');
        await setup.guest.run('echo two > /mnt/from-guest');
        assert.equal(readFileSync(join(share, 'from-guest'), 'utf8'), 'two\n');
        for (let i = 0; i < 3; i++) {
          await setup.guest.unmount('/mnt');
          await setup.guest.mount('myfs', '/mnt');
        }
        assert.equal((await setup.guest.run('cat /mnt/from-guest')).stdout, 'two\n');
        await setup.guest.reboot();
        assert.equal((await setup.guest.run('cat /mnt/from-guest')).stdout, 'two\n');
        if (kind === 'qemu') {
          // The reset button, with files open and requests under way.
          setup.guest.spawn('while :; do dd if=/dev/zero of=/mnt/busy bs=64k count=50; done');
          await setup.guest.run('sleep 1');
          await setup.guest.reboot({ hard: true });
          assert.equal((await setup.guest.run('cat /mnt/from-guest')).stdout, 'two\n');
          const counting = setup.guest.run('for i in $(seq 200); do cat /mnt/from-host; done | wc -c');
          for (let i = 0; i < 5; i++) {
            await setup.guest.qmp('stop');
            await setup.guest.qmp('cont');
          }
          assert.equal((await counting).stdout.trim(), '600');
        }
        await setup.guest.poweroff();
        // The same daemon, another guest.
        const next = await bootGuest({ kind, kernel, shares: [{ socket: setup.daemon }] });
        assert.equal((await next.run('cat /mnt/from-guest')).stdout, 'two\n');
        await next.poweroff();
        assert.deepEqual(
          setup.daemon.log.filter((line) => /ERROR/.test(line)),
          [],
        );
      } finally {
        await setup.end();
      }
      assert.ok(!existsSync(setup.daemon.socketPath), 'the socket is removed');
    });
  });
}

describe('several guests', () => {
  it('two guests on one share see each other', { timeout: 240_000 }, async () => {
    const share = mkdtempSync(join(folder, 'two-'));
    const one = await setUp({ kind: 'uml', kernel: '6.12', share, daemonOptions: ['--cache=never'] });
    const two = await setUp({ kind: 'uml', kernel: '6.12', share, daemonOptions: ['--cache=never'] });
    try {
      await one.guest.run('echo first > /mnt/a; mkdir /mnt/d');
      assert.equal((await two.guest.run('cat /mnt/a')).stdout, 'first\n');
      await two.guest.run('mv /mnt/a /mnt/d/b; echo second >> /mnt/d/b');
      assert.equal((await one.guest.run('cat /mnt/d/b; ls /mnt')).stdout, 'first\nsecond\nd\n');
      // Appends of both interleave, and none is lost.
      const loop = 'for i in $(seq 300); do echo $i >> /mnt/log; done';
      await Promise.all([one.guest.run(loop), two.guest.run(loop)]);
      assert.equal(readFileSync(join(share, 'log'), 'utf8').trim().split('\n').length, 600);
    } finally {
      await one.end();
      await two.end();
    }
  });

  it('one daemon refuses a second guest and goes on with the first', { timeout: 120_000 }, async () => {
    const setup = await setUp({ kind: 'uml', kernel: '6.12' });
    try {
      await assert.rejects(bootGuest({ kind: 'uml', kernel: '6.12', shares: [{ socket: setup.daemon.socketPath }], timeoutMs: 20_000 }));
      assert.equal((await setup.guest.run('ls /mnt')).status, 0);
    } finally {
      await setup.end();
    }
  });

  it('several request queues (QEMU, 2 processors)', { timeout: 240_000 }, async () => {
    const share = mkdtempSync(join(folder, 'queues-'));
    const daemon = await startDaemon({ shareDir: share });
    try {
      const guest = await bootGuest({ kind: 'qemu', cpus: 2, shares: [{ socket: daemon, queues: 4 }] });
      await guest.run('for i in 1 2 3 4; do (for j in $(seq 50); do echo $j > /mnt/f$i.$j; done) & done; wait');
      assert.equal((await guest.run('ls /mnt | wc -l')).stdout.trim(), '200');
      await guest.poweroff();
    } finally {
      await daemon.stop();
    }
  });
});
