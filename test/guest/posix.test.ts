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
  /** Steps that this kernel answers otherwise, and how. */
  except?: Record<string, string>;
}

// CAP_SYS_ADMIN is for trusted attributes, which the reference has.
const ACL = ['--xattr', '--posix-acl', '--modcaps=+sys_admin'];
/** Linux 5.10 has, for FUSE, no ACLs (for want of FUSE_SETXATTR_EXT), no FALLOC_FL_ZERO_RANGE and no O_TMPFILE. */
const LINUX_5_10 = Object.fromEntries(
  `
holes.zero-range: EOPNOTSUPP
holes.zeroed: 48
tmpfile.open: EOPNOTSUPP
perm-sgidgroup.sgid-x: mode 100755 nlink 1 uid 1002 gid 3000 size 0 rdev 0
acl.set: EOPNOTSUPP
acl.mode: mode 100644 nlink 1 uid 0 gid 0 size 1 rdev 0
acl.get: EOPNOTSUPP
acl-1001.read: ok
acl.get-mask: EOPNOTSUPP
acl.default: EOPNOTSUPP
acl.inherit-mode: mode 100644 nlink 1 uid 0 gid 0 size 0 rdev 0
acl.inherit-acl: EOPNOTSUPP
acl.inherit-default: EOPNOTSUPP
acl.inherit-dir-mode: mode 40755 nlink 2 uid 0 gid 0
acl.default-on-file: EOPNOTSUPP
acl.remove: EOPNOTSUPP
acl.bad: EOPNOTSUPP`
    .trim()
    .split('\n')
    .map((line) => line.split(': ') as [string, string]),
);

const cases: Case[] = [
  { name: 'UML 6.12', kind: 'uml', kernel: '6.12', options: ACL },
  { name: 'UML 6.12, cache never', kind: 'uml', kernel: '6.12', options: [...ACL, '--cache=never', '--allow-mmap'] },
  { name: 'UML 6.12, cache always and writeback', kind: 'uml', kernel: '6.12', options: [...ACL, '--cache=always', '--writeback'] },
  { name: 'UML 6.12, no file handles', kind: 'uml', kernel: '6.12', options: [...ACL, '--inode-file-handles=never'] },
  { name: 'UML 7.2', kind: 'uml', kernel: '7.2', options: ACL },
  { name: 'UML 7.2, killpriv v2', kind: 'uml', kernel: '7.2', options: [...ACL, '--killpriv-v2'] },
  { name: 'QEMU, Debian kernel 6.1', kind: 'qemu', kernel: 'debian-plain', options: ACL },
  {
    name: 'QEMU, Debian kernel 5.10',
    kind: 'qemu',
    kernel: 'debian-5.10',
    options: ['--xattr', '--modcaps=+sys_admin'],
    except: LINUX_5_10,
  },
  { name: 'QEMU, Debian kernel 6.1 with modules for events', kind: 'qemu', kernel: 'debian', options: ACL },
];

describe('POSIX transcript of the mount equals that of the host', () => {
  it('the reference is whole', () => {
    assert.ok(expected.includes('end.end: end'));
    assert.ok(expected.length > 400, `${expected.length} lines`);
  });

  for (const { name, kind, kernel, options, except } of cases) {
    it(name, { timeout: 300_000 }, async () => {
      const share = mkdtempSync(join(folder, 'share-'));
      makeShare(share);
      const daemon = await startDaemon({ shareDir: share, options, ...(kind === 'uml' ? { tag: 'myfs' } : {}) });
      try {
        const guest = await bootGuest({ kind, kernel, shares: [{ socket: daemon }], files: { '/bin/posix': program } });
        try {
          const { stdout, stderr } = await guest.run('posix /mnt/work /mnt/small', { timeoutMs: 240_000 });
          assert.equal(stderr, '');
          // Without O_TMPFILE its section ends at once.
          const steps = except ? expected.filter((line) => !/^tmpfile\.(?!open|start|end)/.test(line)) : expected;
          assert.deepEqual(differences(steps, stdout.split('\n'), except), []);
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
