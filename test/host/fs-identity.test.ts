/** Which inode a nodeid stands for: numbers used again, names replaced, what a hostile guest may send, the border of the share. */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import * as path from 'node:path';
import { test } from 'node:test';
import { arena, arenaAlloc, cString } from 'vhost-user-ts/native';
import { Flag, Inode, SHIFT } from '../../src/fs/inodes.js';
import { openFds, root, SESSION, TestFs } from '../support/fs.js';

const ENOENT = -2;
const EBADF = -9;
const ESTALE = -116;
const NFILE = -23;

const arena32 = arenaAlloc(64) >> 2;

const sleep = (ms: number): Promise<void> => new Promise((done) => setTimeout(done, ms));
const handlesOnly = { skip: root ? false : 'file handles need CAP_DAC_READ_SEARCH' };

test('an inode number used again is a new inode, whoever made the file', handlesOnly, () => {
  const t = new TestFs();
  let reused = 0;
  for (let i = 0; i < 200; i++) {
    const byGuest = i % 2 === 0;
    fs.writeFileSync(t.path('old'), 'old');
    const old = t.lookup('old');
    const ino = t.attr.ino;
    fs.unlinkSync(t.path('old'));
    if (byGuest) {
      assert.equal(t.create(1, 'new'), 0);
      assert.equal(t.write(t.nodeid, t.fh, 0, 'new'), 3);
      t.fs.release(t.nodeid, t.fh);
    } else {
      fs.writeFileSync(t.path('new'), 'new');
    }
    const fresh = t.lookup('new');
    assert.ok(fresh > 1);
    assert.notEqual(fresh, old);
    if (t.attr.ino === ino) {
      reused++;
      assert.equal(t.getattr(old), ESTALE);
      assert.equal(t.open(old), ESTALE);
      assert.equal(t.getattr(fresh), 0);
      assert.equal(t.attr.size, 3);
    }
    assert.equal(t.lookup('new'), fresh);
    fs.unlinkSync(t.path('new'));
    t.fs.forget(old, 1);
    t.fs.forget(fresh, 2 + (byGuest ? 1 : 0));
  }
  assert.equal(t.fs.share.inodes.size, 1);
  if (reused === 0) console.log('this file system does not use inode numbers again at once');
  t.close();
});

test('an inode kept by its descriptor is still there after its name is gone', () => {
  const t = new TestFs({ inodeFileHandles: 'never' });
  fs.writeFileSync(t.path('f'), 'text');
  const nodeid = t.lookup('f');
  fs.unlinkSync(t.path('f'));
  fs.writeFileSync(t.path('f'), 'other');
  assert.notEqual(t.lookup('f'), nodeid);
  assert.equal(t.getattr(nodeid), 0);
  assert.equal(t.attr.nlink, 0);
  assert.equal(t.open(nodeid), 0);
  assert.equal(t.read(nodeid, t.fh, 0, 10), 'text');
  t.close();
});

test('an inode that is gone is stale, and its name can be looked up again', handlesOnly, () => {
  const t = new TestFs();
  fs.writeFileSync(t.path('f'), 'text');
  const nodeid = t.lookup('f');
  fs.unlinkSync(t.path('f'));
  assert.equal(t.getattr(nodeid), ESTALE);
  assert.equal(t.setattr(nodeid, 1, { mode: 0 }), ESTALE);
  fs.writeFileSync(t.path('f'), 'again');
  assert.notEqual(t.lookup('f'), nodeid);
  t.fs.forget(nodeid, 1);
  t.close();
});

test('young inodes are compared by handle once', handlesOnly, async () => {
  const t = new TestFs();
  fs.writeFileSync(t.path('f'), '');
  const nodeid = t.lookup('f');
  const { inodes } = t.fs.share;
  const flags = (): number => inodes.u32[(inodes.find(nodeid) << SHIFT) + Inode.flags] as number;
  assert.ok(flags() & Flag.young);
  await sleep(70);
  assert.equal(t.lookup('f'), nodeid);
  assert.equal(flags() & Flag.young, 0);
  t.close();
});

test('FORGET: exactly what was counted, more than that, the root, strangers', () => {
  const t = new TestFs();
  fs.writeFileSync(t.path('f'), '');
  const nodeid = t.lookup('f');
  for (let i = 0; i < 9; i++) t.lookup('f');
  t.fs.forget(nodeid, 9);
  assert.equal(t.getattr(nodeid), 0);
  t.fs.forget(nodeid, 1);
  assert.equal(t.getattr(nodeid), ENOENT);
  t.fs.forget(nodeid, 1);
  assert.notEqual(t.lookup('f'), nodeid);
  t.fs.forget(t.nodeid, 2 ** 53);
  t.fs.forget(1, 2 ** 53);
  t.fs.forget(0, 1);
  t.fs.forget(2 ** 53, 1);
  t.fs.forget(17, 1);
  assert.equal(t.getattr(1), 0);
  assert.equal(t.fs.share.inodes.size, 1);
  t.close();
});

test('nodeids and handles that were never given out', () => {
  const t = new TestFs();
  fs.writeFileSync(t.path('f'), 'x');
  const nodeid = t.lookup('f');
  t.open(nodeid);
  const file = t.fh;
  t.fs.opendir(1, 0);
  const dir = t.fh;
  const { fs: f } = t;
  const name = cString('n');
  for (const stranger of [0, 12, 2 ** 24, 2 ** 24 * 77 + 5, Number.MAX_SAFE_INTEGER, 2 ** 64]) {
    // ENOENT of a LOOKUP would be about the name.
    assert.equal(f.lookup(stranger, name, 1), ESTALE);
    const results = [
      f.getattr(stranger, -1, 0, 0),
      t.setattr(stranger, 1),
      f.readlink(stranger, 64, 64),
      f.symlink(stranger, name, name),
      f.mknod(stranger, name, 0o100644, 0, 0),
      f.mkdir(stranger, name, 0, 0),
      f.unlink(stranger, name),
      f.rmdir(stranger, name),
      f.rename(stranger, name, 1, name, 0),
      f.rename(1, name, stranger, name, 0),
      f.link(stranger, 1, name),
      f.link(nodeid, stranger, name),
      f.open(stranger, 0, false),
      f.create(stranger, name, 2, 0, 0, false),
      f.tmpfile(stranger, 2, 0, 0),
      f.opendir(stranger, 0),
      f.statfs(stranger),
      f.access(stranger, 0),
      f.syncfs(stranger),
    ];
    for (const [i, result] of results.entries()) assert.equal(result, ENOENT, `operation ${i}, nodeid ${stranger}`);
  }
  assert.equal(f.getattr(nodeid + 2 ** 24, -1, 0, 0), ESTALE);
  for (const fh of [0, 1, file + 1, dir + 2 ** 20, 2 ** 53, 2 ** 64, -1]) {
    const results = [
      t.read(nodeid, fh, 0, 1),
      t.write(nodeid, fh, 0, 'x'),
      f.flush(nodeid, fh),
      f.release(nodeid, fh),
      f.fsync(nodeid, fh, false),
      f.releasedir(1, fh),
      f.fsyncdir(1, fh, false),
      f.fallocate(nodeid, fh, 0, 1, 0),
      f.lseek(nodeid, fh, 0, 0),
      f.copyFileRange(fh, 0, nodeid, file, 0, 1),
      f.copyFileRange(file, 0, nodeid, fh, 0, 1),
      f.ioctl(nodeid, fh, 0, 0, 0, 0),
      f.readdir(1, fh, 0, 0, 100, { add: () => true, fits: () => true, addPlus: () => true }, true),
    ];
    for (const [i, result] of results.entries()) assert.equal(result, EBADF, `operation ${i}, fh ${fh}`);
  }
  assert.equal(t.read(1, file, 0, 1), EBADF, "another inode's handle");
  assert.equal(t.read(1, dir, 0, 1), EBADF);
  assert.equal(f.releasedir(nodeid, file), EBADF);
  t.close();
});

test('operations of directories on others, and the other way round', () => {
  const t = new TestFs();
  fs.writeFileSync(t.path('f'), '');
  const file = t.lookup('f');
  const ENOTDIR = -20;
  const name = cString('n');
  assert.equal(t.fs.lookup(file, name, 1), ENOTDIR);
  assert.equal(t.fs.mkdir(file, name, 0, 0), ENOTDIR);
  assert.equal(t.fs.opendir(file, 0), ENOTDIR);
  assert.equal(t.fs.rename(file, name, 1, name, 0), ENOTDIR);
  assert.equal(t.fs.lookup(file, cString('..'), 2), ENOTDIR);
  assert.equal(t.fs.readlink(1, 64, 64), -22);
  t.close();
});

test('".." does not leave the share, though the directory was moved out of it', () => {
  const t = new TestFs();
  const outside = fs.mkdtempSync(path.join(path.dirname(t.dir), 'outside-'));
  fs.mkdirSync(t.path('a/b'), { recursive: true });
  const b = t.lookup('a/b');
  const a = t.lookup('a');
  assert.equal(t.lookup('..', b), a);
  assert.equal(t.lookup('..', a), 1);
  assert.equal(t.lookup('..', 1), 1);
  fs.renameSync(t.path('a'), path.join(outside, 'a'));
  assert.equal(t.lookup('..', b), ESTALE);
  assert.equal(t.lookup('..', a), ESTALE);
  fs.renameSync(path.join(outside, 'a'), t.path('a'));
  assert.equal(t.lookup('..', b), a);
  fs.rmSync(outside, { recursive: true });
  t.close();
});

test('symbolic links are never followed by the host', () => {
  const t = new TestFs({ xattr: true });
  const secret = fs.mkdtempSync(path.join(path.dirname(t.dir), 'secret-'));
  fs.writeFileSync(path.join(secret, 'file'), 'secret');
  fs.symlinkSync(secret, t.path('l'));
  fs.symlinkSync(path.join(secret, 'file'), t.path('lf'));
  const l = t.lookup('l');
  assert.equal(t.lookup('file', l), -20);
  assert.equal(t.create(l, 'x'), -20);
  assert.equal(t.fs.opendir(l, 0), -20);
  assert.equal(t.open(t.lookup('lf')), -40);
  assert.equal(t.setattr(t.lookup('lf'), 2, { uid: 77 }), 0);
  assert.notEqual(fs.statSync(path.join(secret, 'file')).uid, 77);
  // A name that becomes a link while the guest knows what was there: handle or descriptor keep to the old object.
  fs.mkdirSync(t.path('d'));
  const d = t.lookup('d');
  fs.rmdirSync(t.path('d'));
  fs.symlinkSync(secret, t.path('d'));
  assert.ok(t.create(d, 'x') < 0);
  assert.deepEqual(fs.readdirSync(secret), ['file']);
  fs.rmSync(secret, { recursive: true });
  t.close();
});

test('a host process that exchanges names in a loop: each answer is one of the objects, whole', handlesOnly, async () => {
  const t = new TestFs();
  fs.writeFileSync(t.path('a'), 'a');
  fs.writeFileSync(t.path('b'), 'bb');
  const { spawn } = await import('node:child_process');
  const script = `const fs = require('fs'); const d = process.argv[1]; console.log('go');
    for (;;) { fs.renameSync(d + '/a', d + '/c'); fs.renameSync(d + '/b', d + '/a'); fs.renameSync(d + '/c', d + '/b'); }`;
  const child = spawn(process.execPath, ['-e', script, t.dir], { stdio: ['ignore', 'pipe', 'ignore'] });
  await new Promise((done) => child.stdout.once('data', done));
  const sizes = new Map<number, number>();
  try {
    for (const end = Date.now() + 1500; Date.now() < end; ) {
      const nodeid = t.lookup('a');
      if (nodeid === ENOENT || nodeid === ESTALE) continue;
      assert.ok(nodeid > 1, String(nodeid));
      const size = t.attr.size;
      assert.equal(sizes.get(nodeid) ?? size, size);
      sizes.set(nodeid, size);
      assert.equal(t.getattr(nodeid), 0);
      assert.equal(t.attr.size, size, 'the handle is of the same object as the attributes');
      if (Math.random() < 0.3) {
        t.fs.forget(nodeid, 2 ** 40);
        sizes.delete(nodeid);
      }
    }
  } finally {
    child.kill('SIGKILL');
    await new Promise((done) => child.once('exit', done));
    t.close();
  }
});

test('100 000 inodes looked up and forgotten leave no descriptor and no memory', { timeout: 120000 }, () => {
  const N = 100000;
  const t = new TestFs();
  const resident = (): number => {
    const smaps = fs.readFileSync('/proc/self/smaps', 'utf8');
    const at = smaps.indexOf('memfd:virtiofsd-ts-state');
    return Number(/Rss:\s+(\d+) kB/.exec(smaps.slice(at))?.[1]);
  };
  for (let d = 0; d < 100; d++) {
    fs.mkdirSync(t.path(`d${d}`));
    for (let i = 0; i < N / 100; i++) fs.closeSync(fs.openSync(t.path(`d${d}/f${i}`), 'w'));
  }
  const fds = openFds();
  const before = resident();
  const nodeids: number[] = [];
  for (let d = 0; d < 100; d++) {
    const dir = t.lookup(`d${d}`);
    nodeids.push(dir);
    for (const entry of t.list(dir, true) as { nodeid: number }[]) if (entry.nodeid !== 0) nodeids.push(entry.nodeid);
  }
  assert.equal(t.fs.share.inodes.size, N + 101);
  const peak = resident();
  assert.ok(openFds() <= fds + 101);
  for (const nodeid of nodeids) t.fs.forget(nodeid, 1);
  assert.equal(t.fs.share.inodes.size, 1);
  assert.equal(openFds(), fds);
  const after = resident();
  console.log(`state resident: ${before} KiB before, ${peak} KiB with ${N} inodes, ${after} KiB after`);
  assert.ok(after - before < 2048, `${after - before} KiB stay`);
  t.close();
});

test('descriptors stay within their limit, and what is needed is opened again', handlesOnly, () => {
  const t = new TestFs({ maxDescriptors: 64 });
  const nodeids: number[] = [];
  for (let i = 0; i < 300; i++) {
    fs.mkdirSync(t.path(`d${i}`));
    fs.writeFileSync(t.path(`d${i}/f`), String(i));
    nodeids.push(t.lookup(`d${i}`));
  }
  for (let round = 0; round < 3; round++) {
    nodeids.forEach((nodeid, i) => {
      assert.ok(t.lookup('f', nodeid) > 1);
      assert.equal(t.attr.size, String(i).length);
      assert.ok(t.fs.share.descriptors <= 64);
    });
  }
  for (let i = 0; i < 299; i += 2) {
    assert.equal(t.rename(nodeids[i] as number, 'f', nodeids[i + 1] as number, 'g'), 0);
    assert.ok(t.fs.share.descriptors <= 64);
  }
  const open: number[] = [];
  for (;;) {
    const result = t.create(1, `file${open.length}`);
    if (result < 0) {
      assert.equal(result, NFILE);
      break;
    }
    open.push(t.nodeid, t.fh);
  }
  assert.ok(open.length / 2 >= 60 && open.length / 2 <= 64);
  assert.ok(t.getattr(1) === 0 && t.lookup('d1') > 1, 'the root answers still');
  for (let i = 0; i < open.length; i += 2) assert.equal(t.fs.release(open[i] as number, open[i + 1] as number), 0);
  assert.equal(t.create(1, 'last'), 0);
  t.close();
});

test('without handles the limit is told to the guest', () => {
  const t = new TestFs({ inodeFileHandles: 'never', maxDescriptors: 64 });
  for (let i = 0; i < 80; i++) fs.writeFileSync(t.path(`f${i}`), '');
  let last = 0;
  for (let i = 0; i < 80 && last >= 0; i++) last = t.lookup(`f${i}`);
  assert.equal(last, NFILE);
  t.close();
});

test('birth time, type and number decide; a change of any is another inode', handlesOnly, () => {
  const t = new TestFs();
  fs.writeFileSync(t.path('f'), '');
  const nodeid = t.lookup('f');
  const { inodes } = t.fs.share;
  const at = inodes.find(nodeid) << SHIFT;
  inodes.u32[at + Inode.flags] = (inodes.u32[at + Inode.flags] as number) & ~Flag.young;
  inodes.u32[at + Inode.btimeNsec] = ((inodes.u32[at + Inode.btimeNsec] as number) + 1) % 1e9;
  assert.notEqual(t.lookup('f'), nodeid);
  t.close();
});

test('mandatory handles', handlesOnly, () => {
  const t = new TestFs({ inodeFileHandles: 'mandatory' });
  fs.writeFileSync(t.path('f'), '');
  assert.ok(t.lookup('f') > 1);
  t.close();
});

test('export support: a nodeid that was forgotten is found again', handlesOnly, () => {
  const t = new TestFs({}, { exportSupport: true });
  fs.writeFileSync(t.path('file'), 'text');
  fs.symlinkSync('file', t.path('link'));
  fs.mkdirSync(t.path('dir/below'), { recursive: true });
  for (const name of ['file', 'link', 'dir', 'dir/below']) {
    const nodeid = t.lookup(name);
    const { ino } = t.attr;
    const fds = openFds();
    t.fs.forget(nodeid, 1);
    assert.ok(openFds() <= fds);
    assert.equal(t.lookup('.', nodeid), nodeid, name);
    assert.equal(t.attr.ino, ino);
    // By its name it is the same inode, and it is forgotten once more.
    assert.equal(t.lookup(name), nodeid);
    t.fs.forget(nodeid, 1);
    assert.equal(t.getattr(nodeid), 0);
    t.fs.forget(nodeid, 1);
    t.fs.forget(nodeid, 1);
    assert.equal(t.lookup('.', nodeid), nodeid);
    t.fs.forget(nodeid, 1);
  }
  const file = t.lookup('file');
  t.fs.forget(file, 1);
  fs.renameSync(t.path('file'), t.path('dir/moved'));
  assert.equal(t.lookup('.', file), file, 'whatever its name is now');
  assert.equal(t.open(file), 0);
  assert.equal(t.read(file, t.fh, 0, 10), 'text');
  t.fs.release(file, t.fh);
  t.fs.forget(file, 1);
  fs.unlinkSync(t.path('dir/moved'));
  assert.equal(t.lookup('.', file), ESTALE);

  const below = t.lookup('dir/below');
  t.fs.forget(below, 1);
  t.lookup('.', below);
  assert.equal(t.lookup('..', below), t.lookup('dir'));
  t.fs.init({ ...SESSION, exportSupport: true });
  assert.equal(t.lookup('.', below), ESTALE, 'another session knows nothing of it');
  assert.equal(t.fs.share.inodes.size, 1);
  t.close();
});

test('export support: the oldest of very many forgotten inodes go', handlesOnly, () => {
  const t = new TestFs({}, { exportSupport: true });
  const { inodes } = t.fs.share;
  const rss = process.memoryUsage().rss;
  // Inodes as LOOKUP makes them, of files that are not there: so many of them would take a minute to create.
  const forget = (ino: number): number => {
    const slot = inodes.insert(ino, 7, 0, 0x8000);
    arena.u32.set([8, 1, ino, 77], arena32);
    inodes.setHandle(slot, arena32 * 4);
    inodes.f64[((slot << SHIFT) + Inode.nlookup) >> 1] = 1;
    const nodeid = inodes.nodeid(slot);
    t.fs.forget(nodeid, 1);
    return nodeid;
  };
  const first = forget(1);
  const again = forget(2);
  for (let ino = 3; ino <= 1 << 18; ino++) forget(ino);
  assert.equal(inodes.size, (1 << 18) + 1);
  assert.ok(inodes.find(first) > 0);
  // One of them is known again: it does not go.
  inodes.f64[((inodes.find(again) << SHIFT) + Inode.nlookup) >> 1] = 1;
  forget((1 << 18) + 1);
  forget((1 << 18) + 2);
  assert.ok(inodes.find(first) < 0);
  assert.ok(inodes.find(again) > 0);
  assert.ok(inodes.size <= (1 << 18) + 2);
  for (let ino = 1 << 19; ino < (1 << 19) + 300_000; ino++) forget(ino);
  assert.ok(inodes.size <= (1 << 18) + 2);
  assert.ok(process.memoryUsage().rss - rss < 64 << 20, `${(process.memoryUsage().rss - rss) >> 20} MiB`);
  t.close();
});

test('without export support what is forgotten is gone', handlesOnly, () => {
  const t = new TestFs();
  fs.writeFileSync(t.path('file'), 'text');
  const nodeid = t.lookup('file');
  assert.equal(t.lookup('.', nodeid), nodeid);
  t.fs.forget(nodeid, 2);
  assert.equal(t.lookup('.', nodeid), ESTALE);
  assert.equal(t.fs.share.inodes.size, 1);
  t.close();
});
