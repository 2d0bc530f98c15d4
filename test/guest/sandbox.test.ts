/** A guest on a daemon in each sandbox: files, and events of the host. The other tests in this folder have the default sandbox, too. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, it } from 'node:test';
import { workersOf } from '../support/daemon.js';
import { Watcher } from '../support/fsnotify.js';
import { setUp } from '../support/guests.js';

const folder = mkdtempSync(join(tmpdir(), 'sandbox-'));
after(() => rmSync(folder, { recursive: true, force: true }));

describe('a guest', () => {
  for (const mode of ['namespace', 'chroot']) {
    it(`--sandbox=${mode}`, { timeout: 120_000 }, async (t) => {
      const share = mkdtempSync(join(folder, 'share-'));
      const setup = await setUp({ kind: 'uml', kernel: '6.12', share, daemonOptions: mode === 'namespace' ? [] : [`--sandbox=${mode}`] });
      try {
        const [pid] = workersOf(setup.daemon.pid);
        if (pid === undefined) throw new Error('no worker');
        assert.notEqual(pid, setup.daemon.pid);
        for (const name of ['mnt', 'pid', 'net', 'ipc', 'uts']) {
          const shared: boolean = readlinkSync(`/proc/${pid}/ns/${name}`) === readlinkSync(`/proc/self/ns/${name}`);
          assert.equal(shared, mode !== 'namespace', name);
        }
        assert.match(readFileSync(`/proc/${pid}/status`, 'utf8'), /^Seccomp:\s+2$/m);
        const watcher = Watcher.inGuest(setup.guest, "inotifywait -m --format '%e %f' /mnt 2>&1");
        t.after(() => watcher.close());
        await watcher.until('Watches established.');
        writeFileSync(join(share, 'from-host'), 'one');
        execFileSync('mkdir', [join(share, 'end')]);
        const seen = await watcher.until('CREATE,ISDIR end');
        assert.ok(seen.includes('CREATE from-host'), seen.join('\n'));
        assert.equal((await setup.guest.run('cat /mnt/from-host; echo two > /mnt/from-guest; ln -s /etc/passwd /mnt/link')).stdout, 'one');
        assert.equal(readFileSync(join(share, 'from-guest'), 'utf8'), 'two\n');
      } finally {
        await setup.end();
      }
    });
  }
});
