/** What a guest keeps, by the requests that its kernel sends: --entry-timeout, --attr-timeout, --negative-timeout, symbolic links. */
import assert from 'node:assert/strict';
import { mkdtempSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, it } from 'node:test';
import type { Guest } from '../../qemu/guest.js';
import { setUp } from '../support/guests.js';
import { readMetrics } from '../support/metrics.js';

const folder = mkdtempSync(join(tmpdir(), 'cache-'));
after(() => rmSync(folder, { recursive: true, force: true }));

/** Runs `test` in a guest; `count` says how many requests of a kind a command costs. */
async function inGuest(
  options: string[],
  test: (share: string, guest: Guest, count: (request: string, command: string) => Promise<number>) => Promise<void>,
): Promise<void> {
  const share = mkdtempSync(join(folder, 'share-'));
  const socket = join(share, '..', 'metrics');
  const setup = await setUp({ kind: 'uml', kernel: '6.12', share, daemonOptions: [...options, `--metrics=unix:${socket}`] });
  const requests = async (request: string) =>
    (await readMetrics(socket)).get(`virtiofsd_requests_total{opcode="${request.toUpperCase()}"}`) ?? 0;
  try {
    await test(share, setup.guest, async (request, command) => {
      const before = await requests(request);
      assert.equal((await setup.guest.run(command)).status, 0, command);
      return (await requests(request)) - before;
    });
  } finally {
    await setup.end();
  }
}

// Each `stat` is a process of its own, so what is kept is what the kernel keeps.
const TEN_TIMES = 'for i in 1 2 3 4 5 6 7 8 9 10; do';

describe('what a guest keeps', () => {
  it('names: asked for once within --entry-timeout, each time without one', { timeout: 120_000 }, async () => {
    await inGuest(['--entry-timeout=600', '--attr-timeout=600'], async (share, _guest, count) => {
      writeFileSync(join(share, 'file'), 'x');
      assert.equal(await count('lookup', `${TEN_TIMES} stat -c %s /mnt/file; done`), 1);
      assert.equal(await count('getattr', `${TEN_TIMES} stat -c %s /mnt/file; done`), 0);
    });
    await inGuest(['--entry-timeout=0', '--attr-timeout=600'], async (share, _guest, count) => {
      writeFileSync(join(share, 'file'), 'x');
      assert.ok((await count('lookup', `${TEN_TIMES} stat -c %s /mnt/file; done`)) >= 10);
    });
  });

  it('attributes: asked for each time with --attr-timeout=0, whatever --cache says', { timeout: 120_000 }, async () => {
    await inGuest(['--cache=always', '--attr-timeout=0'], async (share, _guest, count) => {
      writeFileSync(join(share, 'file'), 'x');
      const command = `exec 3</mnt/file; ${TEN_TIMES} stat -L -c %s /proc/self/fd/3 <&3; done`;
      assert.ok((await count('getattr', command)) >= 10);
      assert.ok((await count('lookup', `${TEN_TIMES} stat -c %s /mnt/file; done`)) <= 1);
    });
  });

  it('names that are not there: within --negative-timeout, and no longer', { timeout: 120_000 }, async () => {
    await inGuest([], async (_share, _guest, count) => {
      assert.ok((await count('lookup', `${TEN_TIMES} ! stat /mnt/none 2>/dev/null || exit 1; done`)) >= 10);
    });
    await inGuest(['--negative-timeout=3'], async (share, guest, count) => {
      assert.equal(await count('lookup', `${TEN_TIMES} ! stat /mnt/none 2>/dev/null || exit 1; done`), 1);
      // Made on the host meanwhile: unseen until the time is over.
      writeFileSync(join(share, 'none'), 'there');
      assert.equal(
        (await guest.run('for i in $(seq 100); do cat /mnt/none 2>/dev/null && exit 0; sleep 0.1; done; exit 1')).stdout,
        'there',
      );
    });
  });

  it('where a symbolic link leads to: read once, and a new link is read anew', { timeout: 120_000 }, async () => {
    await inGuest(['--entry-timeout=0.1', '--attr-timeout=0.1'], async (share, guest, count) => {
      symlinkSync('first', join(share, 'link'));
      assert.equal(await count('readlink', `${TEN_TIMES} [ $(readlink /mnt/link) = first ] || exit 1; done`), 1);
      symlinkSync('another target', join(share, 'new'));
      renameSync(join(share, 'new'), join(share, 'link'));
      const leadsTo = (target: string) =>
        `for i in $(seq 200); do [ "$(readlink /mnt/link)" = "${target}" ] && exit 0; sleep 0.05; done; exit 1`;
      assert.equal((await guest.run(leadsTo('another target'))).status, 0);
      // The host's file system gives the number of the removed link to another one.
      for (let i = 0; i < 20; i++) {
        rmSync(join(share, 'link'));
        symlinkSync(`target ${i}`, join(share, 'link'));
        assert.equal((await guest.run(leadsTo(`target ${i}`))).status, 0);
      }
    });
    await inGuest(['--cache=never'], async (share, _guest, count) => {
      symlinkSync('first', join(share, 'link'));
      assert.equal(await count('readlink', `${TEN_TIMES} readlink /mnt/link; done`), 10);
    });
  });
});
