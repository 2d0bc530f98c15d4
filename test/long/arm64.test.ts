/** A guest of another machine: Debian 12's kernel for arm64 in QEMU's translator, with our daemon's share, and the agent built for arm64. */
import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { repository } from '../../qemu/guest/daemon.js';
import { startAgent, withAgent } from '../support/agent.js';
import { buildFsnotify } from '../support/fsnotify.js';
import { armAgent, compareEvents, machine } from '../support/guest-events.js';
import { setUp } from '../support/guests.js';
import { buildPosix, differences, hostTranscript, makeShare, removeShare } from '../support/posix.js';

const folder = mkdtempSync(join(tmpdir(), 'arm64-'));
const COMPILER = 'aarch64-linux-gnu-gcc';
const GUEST = { kind: 'qemu', kernel: 'debian-arm64' } as const;
let here: string;
let there: string;
before(() => {
  there = join(folder, 'there');
  mkdirSync(there);
  here = buildFsnotify(folder);
});
after(() => rmSync(folder, { recursive: true, force: true }));

compareEvents(
  'events by the replay agent: arm64',
  () => here,
  async () => {
    const agent = withAgent(folder);
    const files = { ...agent.files, '/bin/virtiofsd-ts-agent': join(repository, 'build/virtiofsd-ts-agent-arm64') };
    const setup = await machine(folder, buildFsnotify(there, COMPILER), { ...GUEST, ...agent, files });
    assert.equal((await setup.guest.run('uname -m')).stdout, 'aarch64\n');
    await startAgent(setup);
    return setup;
  },
  { arm: armAgent, fanotify: false, inotifywait: false },
);

describe('the mount', () => {
  it('POSIX transcript of the mount equals that of the host', { timeout: 300_000 }, async (t) => {
    const host = join(folder, 'host');
    makeShare(host);
    const expected = hostTranscript(buildPosix(folder), host);
    removeShare(host);
    const share = join(folder, 'share');
    makeShare(share);
    t.after(() => removeShare(share));
    const daemonOptions = ['--xattr', '--posix-acl', '--modcaps=+sys_admin'];
    const setup = await setUp({ ...GUEST, share, daemonOptions, files: { '/bin/posix': buildPosix(there, COMPILER) } });
    try {
      const { stdout, stderr } = await setup.guest.run('posix /mnt/work /mnt/small', { timeoutMs: 240_000 });
      assert.equal(stderr, '');
      assert.deepEqual(differences(expected, stdout.split('\n')), []);
    } finally {
      await setup.end();
    }
  });
});
