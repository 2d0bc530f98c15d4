/** The POSIX suite in real guests: a transcript of the mount equals that of the host's own file system. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { bootGuest, startDaemon } from '../../qemu/guest.js';
import { buildPosix, differences, hostTranscript, makeShare, removeShare } from '../support/posix.js';

const folder = mkdtempSync(join(tmpdir(), 'posix-'));
let program: string;
let expected: string[];

before(() => {
  program = buildPosix(folder);
  const host = join(folder, 'host');
  makeShare(host);
  expected = hostTranscript(program, host);
  removeShare(host);
});
after(() => rmSync(folder, { recursive: true, force: true }));

interface Case {
  name: string;
  kind: 'qemu' | 'uml';
  kernel: string;
  options: string[];
}

// CAP_SYS_ADMIN is for trusted attributes, which the reference has.
const ACL = ['--xattr', '--posix-acl', '--modcaps=+sys_admin'];
const cases: Case[] = [
  { name: 'UML 6.12', kind: 'uml', kernel: '6.12', options: ACL },
  { name: 'UML 6.12, cache never', kind: 'uml', kernel: '6.12', options: [...ACL, '--cache=never', '--allow-mmap'] },
  { name: 'UML 6.12, cache always and writeback', kind: 'uml', kernel: '6.12', options: [...ACL, '--cache=always', '--writeback'] },
  { name: 'UML 6.12, no file handles', kind: 'uml', kernel: '6.12', options: [...ACL, '--inode-file-handles=never'] },
  { name: 'UML 7.2', kind: 'uml', kernel: '7.2', options: ACL },
  { name: 'UML 7.2, killpriv v2', kind: 'uml', kernel: '7.2', options: [...ACL, '--killpriv-v2'] },
  { name: 'QEMU, Debian kernel 6.1', kind: 'qemu', kernel: 'debian-plain', options: ACL },
  { name: 'QEMU, Debian kernel 6.1 with modules for events', kind: 'qemu', kernel: 'debian', options: ACL },
];

describe('POSIX transcript of the mount equals that of the host', () => {
  it('the reference is whole', () => {
    assert.ok(expected.includes('end.end: end'));
    assert.ok(expected.length > 400, `${expected.length} lines`);
  });

  for (const { name, kind, kernel, options } of cases) {
    it(name, { timeout: 300_000 }, async () => {
      const share = mkdtempSync(join(folder, 'share-'));
      makeShare(share);
      const daemon = await startDaemon({ shareDir: share, options, ...(kind === 'uml' ? { tag: 'myfs' } : {}) });
      try {
        const guest = await bootGuest({ kind, kernel, shares: [{ socket: daemon }], files: { '/bin/posix': program } });
        try {
          const { stdout, stderr } = await guest.run('posix /mnt/work /mnt/small', { timeoutMs: 240_000 });
          assert.equal(stderr, '');
          assert.deepEqual(differences(expected, stdout.split('\n')), []);
          assert.doesNotMatch(await guest.dmesg(), /BUG|WARNING|Oops/);
        } finally {
          await guest.poweroff();
        }
      } finally {
        await daemon.stop();
        removeShare(share);
      }
    });
  }
});
