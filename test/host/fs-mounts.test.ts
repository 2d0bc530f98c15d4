/** Mounts below the share: numbers that meet, handles per mount, file systems without handles or birth times. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import * as fs from 'node:fs';
import { test } from 'node:test';
import { MountFlag } from '../../src/fs/mounts.js';
import { root, TestFs } from '../support/fs.js';

const SUBMOUNT = 1;

function mount(...args: string[]): boolean {
  try {
    execFileSync('mount', args, { stdio: 'ignore' });
    return true;
  } catch {
    return false;
  }
}

const umount = (path: string): void => {
  execFileSync('umount', ['-l', path], { stdio: 'ignore' });
};

/** Whether a file system can be mounted: not in most containers, root or not. */
function tryMount(): boolean {
  const probe = fs.mkdtempSync('/tmp/fs-mount-');
  const can = root && mount('-t', 'tmpfs', 'none', probe);
  if (can) umount(probe);
  fs.rmdirSync(probe);
  return can;
}

const canMount = tryMount();
const needsMount = { skip: canMount ? false : 'mounting is not permitted' };

for (const inodeFileHandles of ['prefer', 'never'] as const) {
  test(`[${inodeFileHandles}] a tmpfs below the share`, needsMount, () => {
    const t = new TestFs({ inodeFileHandles });
    fs.mkdirSync(t.path('m'));
    assert.ok(mount('-t', 'tmpfs', 'none', t.path('m')));
    try {
      fs.mkdirSync(t.path('m/d'));
      fs.writeFileSync(t.path('m/f'), 'on tmpfs');
      fs.mkdirSync(t.path('plain'));
      const m = t.lookup('m');
      assert.equal(t.fs.entry.attrFlags, SUBMOUNT);
      t.lookup('plain');
      assert.equal(t.fs.entry.attrFlags, 0);
      t.lookup('d', m);
      assert.equal(t.fs.entry.attrFlags, 0);
      const f = t.lookup('f', m);
      assert.equal(t.open(f, 2), 0);
      assert.equal(t.read(f, t.fh, 0, 100), 'on tmpfs');
      assert.equal(t.write(f, t.fh, 0, 'ON'), 2);
      assert.equal(t.getattr(f), 0);
      assert.equal(t.lookup('..', m), 1);
      assert.equal(t.lookup('..', t.lookup('d', m)), m);
      assert.equal(t.rename(1, 'plain', m, 'plain'), -18);
      const listed = t.list(1, true) as { name: string; nodeid: number }[];
      assert.equal(listed.find((entry) => entry.name === 'm')?.nodeid, m);
      assert.equal(t.create(m, 'new'), 0);
      assert.equal(fs.readFileSync(t.path('m/f'), 'utf8'), 'ON tmpfs');
    } finally {
      t.fs.destroy();
      umount(t.path('m'));
      t.close();
    }
  });
}

test('a mount of which the guest has forgotten everything can be unmounted, and another one is met in its place', needsMount, () => {
  const t = new TestFs();
  fs.mkdirSync(t.path('m'));
  const busy = () => spawnSync('umount', [t.path('m')], { stdio: 'ignore' }).status !== 0;
  for (const size of ['1m', '2m']) {
    assert.ok(mount('-t', 'tmpfs', '-o', `size=${size}`, 'none', t.path('m')));
    fs.writeFileSync(t.path('m/f'), size);
    const m = t.lookup('m');
    const f = t.lookup('f', m);
    assert.equal(t.open(f, 0), 0);
    assert.equal(t.read(f, t.fh, 0, 10), size);
    assert.equal(t.fs.release(f, t.fh), 0);
    assert.ok(busy());
    t.fs.forget(f, 1);
    assert.ok(busy());
    t.fs.forget(m, 1);
    assert.ok(!busy());
  }
  t.lookup('m');
  t.close();
});

test('the guest comes back: after an unmount, a reboot', needsMount, () => {
  const t = new TestFs();
  fs.mkdirSync(t.path('m'));
  assert.ok(mount('-t', 'tmpfs', 'none', t.path('m')));
  fs.writeFileSync(t.path('m/f'), 'text');
  for (let session = 0; session < 3; session++) {
    const f = t.lookup('m/f');
    assert.equal(t.open(f, 0), 0);
    assert.equal(t.read(f, t.fh, 0, 10), 'text');
    t.fs.destroy();
  }
  umount(t.path('m'));
  t.close();
});

test('without announcing, submounts work all the same', needsMount, () => {
  const t = new TestFs({}, { submounts: false });
  fs.mkdirSync(t.path('m'));
  mount('-t', 'tmpfs', 'none', t.path('m'));
  t.lookup('m');
  assert.equal(t.fs.entry.attrFlags, 0);
  t.fs.destroy();
  umount(t.path('m'));
  t.close();
});

test('one inode by two mounts is two, and a file mounted on a file', needsMount, () => {
  const t = new TestFs();
  fs.mkdirSync(t.path('a'));
  fs.mkdirSync(t.path('b'));
  fs.writeFileSync(t.path('a/f'), 'text');
  fs.writeFileSync(t.path('single'), '');
  mount('--bind', t.path('a'), t.path('b'));
  mount('--bind', t.path('a/f'), t.path('single'));
  try {
    const nodeids = [t.lookup('a/f'), t.lookup('b/f'), t.lookup('single')];
    assert.equal(new Set(nodeids).size, 3);
    for (const nodeid of nodeids) {
      assert.equal(t.open(nodeid), 0);
      assert.equal(t.read(nodeid, t.fh, 0, 10), 'text');
      t.fs.release(nodeid, t.fh);
      assert.equal(t.getattr(nodeid), 0);
    }
    assert.equal(t.lookup('..', t.lookup('b')), 1);
  } finally {
    t.fs.destroy();
    umount(t.path('b'));
    umount(t.path('single'));
    t.close();
  }
});

test('a file system without birth times: an inode number used again is told by the handle', needsMount, () => {
  const t = new TestFs();
  fs.mkdirSync(t.path('m'));
  fs.writeFileSync(t.path('image'), '');
  fs.truncateSync(t.path('image'), 8 << 20);
  execFileSync('mkfs.ext4', ['-q', '-F', '-I', '128', t.path('image')], { stdio: 'ignore' });
  if (!mount('-o', 'loop', t.path('image'), t.path('m'))) return t.close();
  try {
    fs.chmodSync(t.path('m'), 0o777);
    const m = t.lookup('m');
    const index = t.fs.share.mountOf(t.fs.share.inodes.find(m));
    assert.equal(t.fs.share.mounts.flags(index) & (MountFlag.birthTime | MountFlag.noHandles), 0);
    let reused = 0;
    for (let i = 0; i < 20; i++) {
      assert.equal(t.create(m, 'f'), 0);
      const first = t.nodeid;
      const ino = t.attr.ino;
      assert.equal(t.lookup('f', m), first);
      t.fs.release(first, t.fh);
      assert.equal(t.unlink(m, 'f'), 0);
      fs.writeFileSync(t.path('m/f'), 'x');
      assert.notEqual(t.lookup('f', m), first);
      if (t.attr.ino === ino) reused++;
      fs.unlinkSync(t.path('m/f'));
    }
    assert.ok(reused > 0);
  } finally {
    t.fs.destroy();
    umount(t.path('m'));
    t.close();
  }
});

test('a file system without handles keeps descriptors', needsMount, () => {
  const t = new TestFs();
  fs.mkdirSync(t.path('proc'));
  if (!mount('-t', 'proc', 'proc', t.path('proc'))) return t.close();
  try {
    const proc = t.lookup('proc');
    assert.ok(proc > 1);
    const index = t.fs.share.mountOf(t.fs.share.inodes.find(proc));
    assert.ok(t.fs.share.mounts.flags(index) & MountFlag.noHandles);
    assert.equal(t.warnings.length, 1);
    const uptime = t.lookup('uptime', proc);
    assert.equal(t.lookup('uptime', proc), uptime);
    assert.equal(t.open(uptime), 0);
    assert.match(String(t.read(uptime, t.fh, 0, 100)), /^\d+\.\d+ /);
  } finally {
    t.fs.destroy();
    umount(t.path('proc'));
    t.close();
  }
});

test('mandatory handles refuse what has none', needsMount, () => {
  const t = new TestFs({ inodeFileHandles: 'mandatory' });
  fs.mkdirSync(t.path('proc'));
  if (!mount('-t', 'proc', 'proc', t.path('proc'))) return t.close();
  assert.equal(t.lookup('proc'), -95);
  t.fs.destroy();
  umount(t.path('proc'));
  t.close();
});

test("ENOSPC and EDQUOT reach the guest; root's reserve is there for writes under any ids", needsMount, () => {
  const t = new TestFs();
  fs.mkdirSync(t.path('m'));
  const image = t.path('image');
  fs.writeFileSync(image, '');
  fs.truncateSync(image, 16 << 20);
  execFileSync('mkfs.ext4', ['-q', '-F', '-m', '30', '-O', '^has_journal', image]);
  if (!mount('-o', 'loop', image, t.path('m'))) return t.close();
  try {
    const m = t.lookup('m');
    fs.chmodSync(t.path('m'), 0o777);
    const asUser = execFileSync(
      'setpriv',
      [
        '--reuid',
        '1000',
        '--regid',
        '1000',
        '--clear-groups',
        process.execPath,
        '-e',
        `
      const fd = fs.openSync(process.argv[1], 'w'); let n = 0;
      try { for (;;) n += fs.writeSync(fd, Buffer.alloc(65536)); } catch (e) { console.log(e.code, n >> 10); }`,
        t.path('m/user'),
      ],
      { encoding: 'utf8' },
    );
    assert.match(asUser, /^ENOSPC/);
    assert.equal(t.as(1000).create(m, 'f'), 0);
    assert.equal(t.fs.share.credentials.switched, true);
    let n = 0;
    let last = 1;
    while (last > 0) {
      last = t.write(t.nodeid, t.fh, n, Buffer.alloc(32768));
      n += Math.max(last, 0);
    }
    assert.equal(last, -28);
    assert.ok(n > 1 << 20, `${n} bytes of the reserve`);
    assert.equal(t.fs.share.credentials.switched, false);
  } finally {
    t.fs.destroy();
    umount(t.path('m'));
    t.close();
  }
});
