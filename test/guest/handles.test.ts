/** File handles in guests (--export-support): they outlive the guest's caches and the file's name. And chattr, lsattr. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, symlinkSync, unlinkSync, writeFileSync } from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import { setUp } from '../support/guests.js';

const { ESTALE } = constants.errno;
const folder = mkdtempSync(join(tmpdir(), 'handles-'));
const program = join(folder, 'handle');
before(() => {
  const source = fileURLToPath(new URL('../../../../test/guest/handle.c', import.meta.url));
  execFileSync('gcc', ['-O1', '-static', '-Wall', '-o', program, source]);
});
after(() => rmSync(folder, { recursive: true, force: true }));

describe('file handles in a guest', () => {
  for (const kernel of ['6.12', '7.2']) {
    it(`survive its caches, and renames on the host (UML ${kernel})`, { timeout: 120_000 }, async () => {
      const setup = await setUp({ kind: 'uml', kernel, files: { '/bin/handle': program }, daemonOptions: ['--export-support'] });
      const { guest, share } = setup;
      try {
        const opens = async (name: string, expected: string) => {
          const { status, stdout, stderr } = await guest.run(`handle open /mnt /tmp/${name} > /tmp/out && sort /tmp/out`);
          assert.deepEqual([status, stdout], [0, `${expected}\n`], `${name}: ${stderr}`);
        };
        const forget = () => guest.run('echo 3 > /proc/sys/vm/drop_caches');
        mkdirSync(join(share, 'dir/deep/below'), { recursive: true });
        writeFileSync(join(share, 'dir/deep/file'), 'text');
        symlinkSync('somewhere', join(share, 'dir/link'));
        await guest.run('mkdir -p /tmp');
        for (const [name, path] of Object.entries({ file: 'dir/deep/file', dir: 'dir/deep', link: 'dir/link', below: 'dir/deep/below' }))
          assert.equal((await guest.run(`handle save /mnt/${path} /tmp/${name}`)).status, 0, path);
        for (let i = 0; i < 3; i++) {
          await forget();
          await opens('file', 'text');
          await forget();
          await opens('dir', 'below\nfile');
          await forget();
          await opens('link', 'somewhere');
        }
        await forget();
        renameSync(join(share, 'dir/deep/file'), join(share, 'renamed'));
        renameSync(join(share, 'dir/deep'), join(share, 'moved'));
        await opens('file', 'text');
        await opens('dir', 'below');
        await forget();
        unlinkSync(join(share, 'renamed'));
        assert.equal((await guest.run('handle open /mnt /tmp/file')).status, ESTALE);
        // Another file that gets its inode number is not mistaken for it.
        for (let i = 0; i < 20; i++) writeFileSync(join(share, `new${i}`), 'new');
        await guest.run('cat /mnt/new*');
        assert.equal((await guest.run('handle open /mnt /tmp/file')).status, ESTALE);
        await guest.unmount('/mnt');
        await guest.mount('myfs', '/mnt');
        assert.equal((await guest.run('handle open /mnt /tmp/dir')).status, ESTALE, 'another session');
      } finally {
        await setup.end();
      }
    });
  }

  it('without --export-support they last as long as the guest knows the file', { timeout: 120_000 }, async () => {
    const setup = await setUp({ kind: 'uml', kernel: '6.12', files: { '/bin/handle': program } });
    try {
      writeFileSync(join(setup.share, 'file'), 'text');
      const { status } = await setup.guest.run(
        'mkdir -p /tmp; handle save /mnt/file /tmp/file; echo 3 > /proc/sys/vm/drop_caches; handle open /mnt /tmp/file',
      );
      assert.equal(status, ESTALE);
    } finally {
      await setup.end();
    }
  });
});

describe('chattr and lsattr in a guest', () => {
  it('show and change what the host has', { timeout: 120_000 }, async () => {
    const setup = await setUp({ kind: 'uml', kernel: '6.12', hostRoot: true, daemonOptions: ['--modcaps=+linux_immutable'] });
    const { guest, share } = setup;
    const letters = (text: string) => (text.split(' ')[0] as string).replaceAll('-', '').replace('e', '');
    const onHost = (name: string) => letters(execFileSync('lsattr', ['-d', join(share, name)], { encoding: 'utf8' }));
    const inGuest = async (name: string) => letters((await guest.run(`lsattr -d /mnt/${name}`)).stdout);
    try {
      writeFileSync(join(share, 'file'), 'text');
      mkdirSync(join(share, 'dir'));
      for (const name of ['file', 'dir']) {
        assert.equal((await guest.run(`chattr +d +A /mnt/${name}`)).status, 0);
        assert.equal(onHost(name), 'dA');
        assert.equal(await inGuest(name), 'dA');
        execFileSync('chattr', ['-A', join(share, name)]);
        assert.equal(await inGuest(name), 'd');
      }
      assert.equal((await guest.run('chattr +i /mnt/file')).status, 0);
      assert.equal(onHost('file'), 'id');
      assert.notEqual((await guest.run('echo other > /mnt/file')).status, 0);
      assert.notEqual((await guest.run('rm -f /mnt/file')).status, 0);
      assert.equal(readFileSync(join(share, 'file'), 'utf8'), 'text');
      assert.equal((await guest.run('chattr -i /mnt/file; echo other > /mnt/file')).status, 0);
      assert.match((await guest.run('chattr +j /mnt/file')).stderr, /not supported/i);
      assert.equal(onHost('file'), 'd');
      // lsattr -p asks by FS_IOC_FSGETXATTR.
      assert.match((await guest.run('lsattr -p /mnt/file')).stdout, /^ +0 -+d-/);
    } finally {
      await setup.end();
    }
  });
});
