/** overlayfs in a guest, with shares as its lower and upper layers. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, lstatSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, it } from 'node:test';
import type { Guest } from '../../qemu/guest.js';
import { setUp } from '../support/guests.js';

const folder = mkdtempSync(join(tmpdir(), 'overlay-'));
after(() => rmSync(folder, { recursive: true, force: true }));

function makeLower(share: string): void {
  for (const name of ['lower/dir/sub', 'upper', 'work']) mkdirSync(join(share, name), { recursive: true });
  writeFileSync(join(share, 'lower/file'), 'lower');
  writeFileSync(join(share, 'lower/gone'), 'lower');
  writeFileSync(join(share, 'lower/dir/inner'), 'inner');
  writeFileSync(join(share, 'lower/dir/sub/deep'), 'deep');
  symlinkSync('file', join(share, 'lower/link'));
}

/** What one does with a tree: copies up, whiteouts, opaque and renamed directories. */
const CHANGES = `set -e; cd /merged
cat file link dir/inner dir/sub/deep; echo
echo more >> file; echo new > new; rm gone
rm -r dir/sub; mkdir dir/sub; echo other > dir/sub/fresh
mkdir made; mv made moved; mv new dir/renamed; ln file hard; chmod 600 dir/inner
ln -sf elsewhere link; mv file file2; mknod null c 1 3
ls -A . dir dir/sub`;

async function run(guest: Guest, command: string): Promise<string> {
  const { status, stdout, stderr } = await guest.run(command);
  assert.equal(status, 0, `${command}: ${stderr}\n${(await guest.dmesg()).split('\n').slice(-5).join('\n')}`);
  return stdout;
}

const LISTING = ['.:', 'dir', 'file2', 'hard', 'link', 'moved', 'null', '', 'dir:', 'inner', 'renamed', 'sub', '', 'dir/sub:', 'fresh', ''];

/** The host's view of an overlay's attribute. */
function attribute(path: string, name: string): string {
  return execFileSync('python3', ['-c', 'import os,sys; print(os.getxattr(sys.argv[1], sys.argv[2]).decode())', path, name], {
    encoding: 'utf8',
  }).trim();
}

for (const kernel of ['6.12', '7.2']) {
  describe(`overlayfs in a guest (UML ${kernel})`, () => {
    it('the share as lower layer, memory as upper', { timeout: 120_000 }, async () => {
      const setup = await setUp({ kind: 'uml', kernel });
      try {
        makeLower(setup.share);
        await run(setup.guest, 'mkdir -p /ram /merged; mount -t tmpfs ram /ram; mkdir /ram/upper /ram/work');
        await run(setup.guest, 'mount -t overlay overlay -o lowerdir=/mnt/lower,upperdir=/ram/upper,workdir=/ram/work /merged');
        assert.deepEqual((await run(setup.guest, CHANGES)).split('\n').slice(1), LISTING);
        assert.equal(readFileSync(join(setup.share, 'lower/file'), 'utf8'), 'lower');
        assert.ok(existsSync(join(setup.share, 'lower/dir/sub/deep')));
        await run(setup.guest, 'umount /merged /ram');
      } finally {
        await setup.end();
      }
    });

    for (const [how, options, mount, prefix] of [
      ['trusted attributes', ['--xattr', '--modcaps=+sys_admin'], '', 'trusted'],
      ['user attributes', ['--xattr'], ',userxattr', 'user'],
      ['user attributes, writeback cache', ['--xattr', '--cache=always', '--writeback'], ',userxattr', 'user'],
      ['mapped attributes', ['--xattrmap=:map::user.virtiofs.:'], '', 'user.virtiofs.trusted'],
    ] as const) {
      it(`the share as lower and upper layer: ${how}`, { timeout: 120_000 }, async () => {
        const setup = await setUp({ kind: 'uml', kernel, daemonOptions: [...options] });
        const { guest, share } = setup;
        const overlay = `mount -t overlay overlay -o lowerdir=/mnt/lower,upperdir=/mnt/upper,workdir=/mnt/work${mount} /merged`;
        try {
          makeLower(share);
          await run(guest, `mkdir -p /merged; ${overlay}`);
          assert.doesNotMatch(await guest.dmesg(), /overlayfs: .*(missing|not supported|falling back|does not)/);
          assert.deepEqual((await run(guest, CHANGES)).split('\n').slice(1), LISTING);
          // On the host: whiteouts are devices 0:0, replaced directories are marked, the lower layer is as it was.
          const whiteout = lstatSync(join(share, 'upper/gone'));
          assert.ok(whiteout.isCharacterDevice() && whiteout.rdev === 0);
          assert.ok(lstatSync(join(share, 'upper/file')).isCharacterDevice());
          assert.equal(attribute(join(share, 'upper/dir/sub'), `${prefix}.overlay.opaque`), 'y');
          assert.equal(readFileSync(join(share, 'upper/file2'), 'utf8'), 'lowermore\n');
          assert.equal(readFileSync(join(share, 'lower/file'), 'utf8'), 'lower');
          assert.equal(lstatSync(join(share, 'upper/null')).rdev, 0x103);
          // Mounted once more, and in the kernel's own words a whole tree.
          await run(guest, `umount /merged; echo 3 > /proc/sys/vm/drop_caches; ${overlay}`);
          assert.deepEqual((await run(guest, 'cd /merged; ls -A . dir dir/sub')).split('\n'), LISTING);
          assert.equal(await run(guest, 'cat /merged/file2 /merged/dir/sub/fresh; readlink /merged/link'), 'lowermore\nother\nelsewhere\n');
          await run(
            guest,
            'cd /merged; for i in $(seq 50); do mkdir d$i; echo $i > d$i/f; done; rm -r d[1-4]*; [ $(ls -d d* | wc -l) = 7 ]',
          );
          await run(guest, 'umount /merged');
        } finally {
          await setup.end();
        }
      });
    }
  });
}
