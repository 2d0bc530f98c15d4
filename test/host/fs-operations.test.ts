/** Each operation on a real directory; results and errors compared with those of the direct system call. */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { constants } from 'node:fs';
import { after, before, test } from 'node:test';
import { arena } from 'vhost-user-ts/native';
import { NO_FH } from '../../src/fs/filesystem.js';
import { direct, openFds, root, TestFs } from '../support/fs.js';

const EPERM = -1;
const ENOENT = -2;
const EBADF = -9;
const EACCES = -13;
const EEXIST = -17;
const ENOTDIR = -20;
const EISDIR = -21;
const EINVAL = -22;
const ENOTTY = -25;
const ENOTEMPTY = -39;
const ELOOP = -40;
const ENODATA = -61;
const EOPNOTSUPP = -95;
const ENOSYS = -38;
const ENAMETOOLONG = -36;

const { O_RDONLY, O_WRONLY, O_RDWR, O_EXCL, O_TRUNC, O_APPEND } = constants;

for (const inodeFileHandles of root ? (['prefer', 'never'] as const) : (['never'] as const)) {
  const label = `[${inodeFileHandles}]`;
  let t: TestFs;
  before(() => {
    t = new TestFs({ inodeFileHandles, xattr: true });
  });
  after(() => t.close());

  test(`${label} LOOKUP finds what stat finds`, () => {
    fs.writeFileSync(t.path('file'), 'hello');
    fs.mkdirSync(t.path('dir'));
    fs.symlinkSync('file', t.path('symlink'));
    for (const name of ['file', 'dir', 'symlink']) {
      const stat = fs.lstatSync(t.path(name));
      const nodeid = t.lookup(name);
      assert.ok(nodeid > 1);
      const { mode, uid, gid, nlink, size, ino, mtime } = t.attr;
      assert.deepEqual(
        { mode, uid, gid, nlink, size, ino, mtime },
        {
          mode: stat.mode,
          uid: stat.uid,
          gid: stat.gid,
          nlink: stat.nlink,
          size: stat.size,
          ino: stat.ino,
          mtime: Math.floor(stat.mtimeMs / 1000),
        },
      );
      assert.equal(t.lookup(name), nodeid);
    }
    assert.equal(t.lookup('missing'), ENOENT);
    assert.equal(t.lookup('file/x'), ENOTDIR);
    assert.equal(t.lookup('symlink/x'), ENOTDIR);
    assert.equal(t.lookup('n'.repeat(255)), ENOENT);
    assert.equal(t.lookup('.'), 1);
    assert.equal(t.lookup('..'), 1);
    assert.equal(t.lookup('dir/..'), 1);
    assert.equal(t.lookup('dir/.'), t.lookup('dir'));
    assert.equal(t.attr.ino, fs.statSync(t.path('dir')).ino);
  });

  test(`${label} GETATTR by inode and by handle`, () => {
    fs.writeFileSync(t.path('ga'), 'x');
    const nodeid = t.lookup('ga');
    assert.equal(t.open(nodeid, O_RDWR), 0);
    const fh = t.fh;
    fs.writeFileSync(t.path('ga'), 'longer');
    assert.equal(t.getattr(nodeid), 0);
    assert.equal(t.attr.size, 6);
    fs.unlinkSync(t.path('ga'));
    assert.equal(t.getattr(nodeid, fh), 0);
    assert.equal(t.attr.nlink, 0);
    assert.equal(t.getattr(nodeid), 0, 'an open file has attributes after it lost its name');
    assert.equal(t.getattr(nodeid, fh + 1), EBADF);
    assert.equal(t.getattr(1, fh), EBADF);
    assert.equal(t.fs.release(nodeid, fh), 0);
  });

  test(`${label} SETATTR: mode, owner, size, times`, () => {
    fs.writeFileSync(t.path('sa'), 'hello world');
    const nodeid = t.lookup('sa');
    assert.equal(t.setattr(nodeid, 1, { mode: 0o100640 }), 0);
    assert.equal(t.attr.mode, 0o100640);
    assert.equal(fs.statSync(t.path('sa')).mode, 0o100640);
    assert.equal(t.setattr(nodeid, 8, { size: 5 }), 0);
    assert.equal(fs.readFileSync(t.path('sa'), 'utf8'), 'hello');
    assert.equal(t.setattr(nodeid, 8, { size: 2 ** 33 }), 0);
    assert.equal(fs.statSync(t.path('sa')).size, 2 ** 33);
    assert.equal(t.setattr(nodeid, 16 | 32, { atime: 1000, atimeNsec: 7, mtime: -5, mtimeNsec: 250000000 }), 0);
    assert.equal(t.attr.mtime, -5);
    assert.equal(t.attr.mtimeNsec, 250000000);
    assert.equal(t.attr.atime, 1000);
    const before = Date.now() / 1000 - 1;
    assert.equal(t.setattr(nodeid, 32 | 256), 0);
    assert.ok(t.attr.mtime >= Math.floor(before));
    assert.equal(t.attr.atime, 1000, 'the other time is left alone');
    if (root) {
      assert.equal(t.setattr(nodeid, 2, { uid: 12 }), 0);
      assert.equal(t.setattr(nodeid, 4, { gid: 13 }), 0);
      assert.deepEqual([t.attr.uid, t.attr.gid], [12, 13]);
    }
    assert.equal(t.open(nodeid, O_RDWR), 0);
    assert.equal(t.setattr(nodeid, 8 | 1 | 64, { fh: t.fh, size: 3, mode: 0o600 }), 0);
    assert.equal(t.attr.size, 3);
    t.fs.release(nodeid, t.fh);
    assert.equal(t.setattr(nodeid, 8, { fh: 12345, size: 3 }), EBADF);
    t.mkdir(1, 'sad');
    const dir = t.nodeid;
    assert.equal(t.setattr(dir, 8, { size: 0 }), EISDIR);
    t.symlink(1, 'sal', 'sa');
    assert.equal(t.setattr(t.nodeid, 1, { mode: 0o600 }), EOPNOTSUPP);
    assert.equal(t.setattr(t.nodeid, 32, { mtime: 99 }), 0);
    assert.equal(fs.lstatSync(t.path('sal')).mtimeMs, 99000);
    assert.notEqual(fs.statSync(t.path('sa')).mtimeMs, 99000);
    assert.equal(t.setattr(t.nodeid, 8, { size: 0 }), EINVAL);
  });

  test(`${label} MKDIR, RMDIR`, () => {
    assert.equal(t.mkdir(1, 'd', 0o1751), 0);
    const nodeid = t.nodeid;
    assert.equal(fs.statSync(t.path('d')).mode, 0o41751);
    assert.equal(t.attr.mode, 0o41751);
    assert.equal(t.mkdir(1, 'd'), EEXIST);
    assert.equal(t.mkdir(nodeid, 'n'.repeat(255)), 0);
    assert.equal(t.rmdir(1, 'd'), ENOTEMPTY);
    assert.equal(
      t.rmdir(1, 'missing'),
      direct(() => fs.rmdirSync(t.path('missing'))),
    );
    assert.equal(t.rmdir(nodeid, 'n'.repeat(255)), 0);
    assert.equal(t.rmdir(1, 'd'), 0);
    assert.equal(t.mkdir(nodeid, 'x'), ENOENT, 'a removed directory takes no more entries');
    t.create(1, 'notdir');
    assert.equal(t.rmdir(1, 'notdir'), ENOTDIR);
    assert.equal(t.mkdir(t.nodeid, 'x'), ENOTDIR);
    assert.equal(t.mkdir(1, 'n'.repeat(256)), ENAMETOOLONG);
  });

  test(`${label} MKNOD`, () => {
    assert.equal(t.mknod(1, 'plain', 0o100644), 0);
    assert.equal(t.attr.mode, 0o100644);
    assert.equal(t.mknod(1, 'fifo', 0o010600), 0);
    assert.equal(t.attr.mode, 0o010600);
    assert.equal(t.open(t.nodeid, O_RDONLY), EACCES, 'no FIFO of the host is opened');
    assert.equal(t.mknod(1, 'socket', 0o140600), 0);
    assert.equal(t.open(t.nodeid, O_RDONLY), EACCES);
    assert.equal(t.mknod(1, 'what', 0o170600), EINVAL);
    assert.equal(t.mknod(1, 'dir', 0o040600), EINVAL);
    if (root) {
      assert.equal(t.mknod(1, 'null', 0o020666, (1 << 8) | 3), 0);
      assert.equal(fs.lstatSync(t.path('null')).rdev, (1 << 8) | 3);
      assert.equal(t.open(t.nodeid, O_RDONLY), EACCES);
    }
  });

  test(`${label} SYMLINK, READLINK`, () => {
    const target = 'x'.repeat(1000);
    assert.equal(t.symlink(1, 'l', target), 0);
    assert.equal(t.readlink(t.nodeid), target);
    assert.equal(fs.readlinkSync(t.path('l')), target);
    assert.equal(t.open(t.nodeid), ELOOP);
    assert.equal(t.symlink(1, 'l', 'y'), EEXIST);
    t.create(1, 'nolink');
    assert.equal(t.readlink(t.nodeid), EINVAL);
  });

  test(`${label} LINK, UNLINK`, () => {
    fs.writeFileSync(t.path('one'), 'x');
    const one = t.lookup('one');
    assert.equal(t.link(one, 1, 'two'), 0);
    assert.equal(t.nodeid, one);
    assert.equal(t.attr.nlink, 2);
    assert.equal(t.link(one, 1, 'two'), EEXIST);
    assert.equal(t.link(t.lookup('symlink'), 1, 'symlink2'), 0);
    assert.equal(fs.readlinkSync(t.path('symlink2')), 'file');
    assert.equal(t.link(t.lookup('dir'), 1, 'dir2'), EPERM);
    assert.equal(t.unlink(1, 'one'), 0);
    assert.equal(t.unlink(1, 'one'), ENOENT);
    assert.equal(t.unlink(1, 'dir'), EISDIR);
    assert.equal(t.getattr(one), 0);
    assert.equal(t.attr.nlink, 1);
  });

  test(`${label} RENAME and its flags`, () => {
    fs.writeFileSync(t.path('r1'), '1');
    fs.writeFileSync(t.path('r2'), '2');
    fs.mkdirSync(t.path('rd'));
    const dir = t.lookup('rd');
    assert.equal(t.rename(1, 'r1', 1, 'r2', 1), EEXIST);
    assert.equal(t.rename(1, 'r1', 1, 'r2', 2), 0);
    assert.equal(fs.readFileSync(t.path('r1'), 'utf8'), '2');
    assert.equal(t.rename(1, 'r1', dir, 'r3'), 0);
    assert.equal(fs.readFileSync(t.path('rd/r3'), 'utf8'), '2');
    assert.equal(t.rename(1, 'missing', dir, 'r4'), ENOENT);
    assert.equal(
      t.rename(1, 'rd', dir, 'rd'),
      direct(() => fs.renameSync(t.path('rd'), t.path('rd/rd'))),
    );
    assert.equal(t.rename(1, 'r2', dir, 'r3', 0x100), EINVAL);
    assert.equal(t.rename(1, 'r2', 1, 'rd'), EISDIR);
    if (root) {
      assert.equal(t.rename(1, 'r2', dir, 'r5', 4), 0);
      assert.ok(fs.lstatSync(t.path('r2')).isCharacterDevice(), 'RENAME_WHITEOUT');
    }
  });

  test(`${label} OPEN, READ, WRITE, RELEASE`, () => {
    fs.writeFileSync(t.path('rw'), 'hello world');
    const nodeid = t.lookup('rw');
    assert.equal(t.open(nodeid, O_RDONLY), 0);
    const reader = t.fh;
    assert.equal(t.fs.opened.openFlags, 0);
    assert.equal(t.open(nodeid, O_RDWR), 0);
    const writer = t.fh;
    assert.equal(t.read(nodeid, reader, 0, 4096), 'hello world');
    assert.equal(t.read(nodeid, reader, 6, 3), 'wor');
    assert.equal(t.read(nodeid, reader, 6, 100, 2), 'world', 'in pieces of two bytes');
    assert.equal(t.read(nodeid, reader, 11, 100), '');
    assert.equal(t.read(nodeid, reader, 2 ** 40, 100), '');
    assert.equal(t.write(nodeid, writer, 6, 'there'), 5);
    assert.equal(t.write(nodeid, writer, 20, 'gap', 0, 1), 3);
    assert.equal(fs.readFileSync(t.path('rw'), 'utf8'), 'hello there\0\0\0\0\0\0\0\0\0gap');
    assert.equal(t.write(nodeid, writer, 0, '!', O_APPEND), 1, 'O_APPEND of the write counts, not its offset');
    assert.equal(t.write(nodeid, writer, 0, 'H', O_APPEND | 1), 1, 'but not for pages written back');
    assert.equal(fs.readFileSync(t.path('rw'), 'utf8'), 'Hello there\0\0\0\0\0\0\0\0\0gap!');
    assert.equal(t.write(nodeid, reader, 0, 'x'), EBADF);
    assert.equal(t.write(nodeid, writer, -1, 'x'), EINVAL);
    assert.equal(t.write(nodeid, writer, -1, Buffer.alloc(100000)), EINVAL);
    assert.equal(t.read(nodeid, reader, -1, 1), EINVAL);
    assert.equal(t.read(nodeid + 1, reader, 0, 1), EBADF);
    assert.equal(t.read(nodeid, 99, 0, 1), EBADF);
    assert.equal(t.fs.flush(nodeid, writer), 0);
    assert.equal(t.fs.fsync(nodeid, writer, false), 0);
    assert.equal(t.fs.fsync(nodeid, writer, true), 0);
    assert.equal(t.open(nodeid, O_RDWR | O_TRUNC), 0);
    assert.equal(fs.statSync(t.path('rw')).size, 0);
    assert.equal(t.fs.release(nodeid, t.fh), 0);
    assert.equal(t.fs.release(nodeid, t.fh), EBADF);
    assert.equal(t.fs.release(nodeid, reader), 0);
    assert.equal(t.fs.release(nodeid, writer), 0);
    assert.equal(t.open(t.lookup('dir'), O_RDONLY), EISDIR);
  });

  test(`${label} a megabyte in 256 pieces, to the end of the file and past it`, () => {
    const text = Buffer.alloc(1 << 20, 'abcdefghijklmnop');
    assert.equal(t.create(1, 'big'), 0);
    const { nodeid, fh } = t;
    assert.equal(t.write(nodeid, fh, 0, text, 0, 4096), 1 << 20);
    assert.equal(t.write(nodeid, fh, 1 << 20, 'end'), 3);
    assert.ok(fs.readFileSync(t.path('big')).equals(Buffer.concat([text, Buffer.from('end')])));
    assert.equal(t.read(nodeid, fh, 0, 1 << 20, 4096), text.toString());
    assert.equal(t.read(nodeid, fh, (1 << 20) - 4096, 65536, 4096), `${text.toString('utf8', 0, 4096)}end`);
    assert.equal(t.setattr(nodeid, 8, { size: 1 << 20 }), 0);
    assert.equal(t.readRaw(nodeid, fh, (1 << 20) - 4096, 65536), 4096, 'an end at a page border');
    t.fs.release(nodeid, fh);
  });

  test(`${label} CREATE makes or opens`, () => {
    assert.equal(t.create(1, 'c', O_RDWR, 0o640), 0);
    const { nodeid, fh } = t;
    assert.equal(t.attr.mode, 0o100640);
    assert.equal(t.write(nodeid, fh, 0, 'data'), 4);
    assert.equal(t.create(1, 'c', O_RDWR | O_EXCL), EEXIST);
    assert.equal(t.create(1, 'c', O_RDONLY), 0);
    assert.equal(t.nodeid, nodeid);
    assert.equal(t.read(nodeid, t.fh, 0, 10), 'data');
    t.fs.release(nodeid, t.fh);
    assert.equal(t.create(1, 'c', O_RDWR | O_TRUNC), 0);
    assert.equal(fs.statSync(t.path('c')).size, 0);
    t.fs.release(nodeid, t.fh);
    t.fs.release(nodeid, fh);
    assert.equal(t.create(1, 'dir', O_RDWR), EISDIR);
    assert.equal(t.create(1, 'symlink', O_RDWR), ELOOP, 'a symbolic link is not followed');
    assert.equal(t.create(1, 'fifo', O_RDWR), EACCES);
  });

  test(`${label} TMPFILE, and a name for it later`, () => {
    assert.equal(t.fs.tmpfile(1, O_RDWR, 0o600, 0), 0);
    const { nodeid, fh } = t;
    assert.equal(t.attr.nlink, 0);
    assert.equal(t.write(nodeid, fh, 0, 'tmp'), 3);
    assert.equal(t.getattr(nodeid), 0);
    assert.equal(t.link(nodeid, 1, 'linked'), 0);
    assert.equal(t.nodeid, nodeid);
    assert.equal(fs.readFileSync(t.path('linked'), 'utf8'), 'tmp');
    t.fs.release(nodeid, fh);
  });

  test(`${label} READDIR and READDIRPLUS`, () => {
    fs.mkdirSync(t.path('many'));
    const names = Array.from({ length: 3000 }, (_, i) => `file-${i}-${'x'.repeat(i % 200)}`);
    for (const name of names) fs.writeFileSync(t.path(`many/${name}`), '');
    const dir = t.lookup('many');
    const expected = ['.', '..', ...names].sort();
    for (const plus of [false, true]) {
      for (const perReply of [1, 7, 1000]) {
        const list = t.list(dir, plus, perReply);
        assert.ok(Array.isArray(list));
        assert.deepEqual(list.map((entry) => entry.name).sort(), expected, `plus ${plus}, ${perReply} a reply`);
        for (const entry of list) {
          if (entry.name === '.' || entry.name === '..') assert.equal(entry.known, false);
          else {
            assert.equal(entry.type, 8);
            assert.equal(entry.known, plus);
          }
        }
      }
    }
    const [sample] = (t.list(dir, true) as { name: string; nodeid: number; ino: number }[]).filter((entry) =>
      entry.name.startsWith('file-77-'),
    );
    assert.equal(sample?.ino, fs.statSync(t.path(`many/${sample?.name}`)).ino);
    assert.equal(sample?.nodeid, t.lookup(`many/${sample?.name}`));
  });

  test(`${label} READDIR goes on anywhere: back, forth, and from the beginning anew`, () => {
    const dir = t.lookup('many');
    assert.equal(t.fs.opendir(dir, 0), 0);
    const fh = t.fh;
    const all = t.readdir(dir, fh, 0, 0, false, 3002) as { name: string; offsetLow: number; offsetHigh: number }[];
    let list = all;
    while (list.length < 3002) {
      const last = list.at(-1) as (typeof all)[0];
      list = [...list, ...(t.readdir(dir, fh, last.offsetLow, last.offsetHigh, false, 3002) as typeof all)];
    }
    for (const i of [0, 1000, 2990, 5, 1500, 1499, 3000]) {
      const at = list[i] as (typeof all)[0];
      const some = t.readdir(dir, fh, at.offsetLow, at.offsetHigh, false, 10) as typeof all;
      assert.deepEqual(
        some.map((entry) => entry.name),
        list.slice(i + 1, i + 1 + some.length).map((entry) => entry.name),
        `from ${i}`,
      );
      assert.ok(some.length > 0);
    }
    const last = list.at(-1) as (typeof all)[0];
    assert.deepEqual(t.readdir(dir, fh, last.offsetLow, last.offsetHigh), []);
    fs.writeFileSync(t.path('many/new'), '');
    const again: string[] = [];
    let position = { offsetLow: 0, offsetHigh: 0 };
    for (;;) {
      const some = t.readdir(dir, fh, position.offsetLow, position.offsetHigh) as typeof all;
      if (some.length === 0) break;
      again.push(...some.map((entry) => entry.name));
      position = some.at(-1) as (typeof all)[0];
    }
    assert.ok(again.includes('new'));
    assert.equal(t.fs.releasedir(dir, fh), 0);
    assert.equal(t.readdir(dir, fh, 0, 0), EBADF);
  });

  test(`${label} more directories read at once than there are buffers`, () => {
    const opened: { dir: number; fh: number; names: string[]; at: { offsetLow: number; offsetHigh: number } }[] = [];
    t.mkdir(1, 'wide');
    const parent = t.nodeid;
    for (let i = 0; i < 50; i++) {
      t.mkdir(parent, `d${i}`);
      const dir = t.nodeid;
      for (let n = 0; n < 20; n++) fs.writeFileSync(t.path(`wide/d${i}/f${i}-${n}`), '');
      t.fs.opendir(dir, 0);
      opened.push({ dir, fh: t.fh, names: [], at: { offsetLow: 0, offsetHigh: 0 } });
    }
    for (let left = true; left; ) {
      left = false;
      for (const one of opened) {
        const some = t.readdir(one.dir, one.fh, one.at.offsetLow, one.at.offsetHigh, true, 3) as {
          name: string;
          offsetLow: number;
          offsetHigh: number;
        }[];
        if (some.length === 0) continue;
        left = true;
        one.names.push(...some.map((entry) => entry.name));
        one.at = some.at(-1) as (typeof some)[0];
      }
    }
    opened.forEach((one, i) => {
      assert.deepEqual(one.names.sort(), ['.', '..', ...Array.from({ length: 20 }, (_, n) => `f${i}-${n}`)].sort());
      t.fs.releasedir(one.dir, one.fh);
    });
  });

  test(`${label} a name that vanishes between reading and look-up is left out`, () => {
    t.mkdir(1, 'vanish');
    const dir = t.nodeid;
    for (const name of ['a', 'b', 'c']) fs.writeFileSync(t.path(`vanish/${name}`), '');
    t.fs.opendir(dir, 0);
    const fh = t.fh;
    const [first] = t.readdir(dir, fh, 0, 0, true, 1) as { offsetLow: number; offsetHigh: number }[];
    for (const name of ['a', 'b', 'c']) fs.unlinkSync(t.path(`vanish/${name}`));
    const rest = t.readdir(dir, fh, first?.offsetLow ?? 0, first?.offsetHigh ?? 0, true);
    assert.ok(Array.isArray(rest) && rest.every((entry) => entry.name === '.' || entry.name === '..'));
    t.fs.releasedir(dir, fh);
  });

  test(`${label} an answer without room for one entry is an error, not the end`, () => {
    t.fs.opendir(1, 0);
    assert.equal(t.readdir(1, t.fh, 0, 0, false, 0), EINVAL);
    t.fs.releasedir(1, t.fh);
  });

  test(`${label} STATFS`, () => {
    assert.equal(t.fs.statfs(1), 0);
    const stat = fs.statfsSync(t.dir);
    assert.equal(arena.u32[(t.fs.statfsBuffer + 8) >> 2], stat.bsize);
    assert.equal(arena.u32[(t.fs.statfsBuffer + 16) >> 2], stat.blocks % 2 ** 32);
  });

  test(`${label} ACCESS judges by mode bits`, () => {
    fs.writeFileSync(t.path('acc'), '', { mode: 0o640 });
    fs.chmodSync(t.path('acc'), 0o640);
    const nodeid = t.lookup('acc');
    assert.equal(t.as(0).fs.access(nodeid, 6), 0);
    assert.equal(t.fs.access(nodeid, 1), EACCES);
    assert.equal(t.as(12345).fs.access(nodeid, 0), 0);
    assert.equal(t.fs.access(nodeid, 4), EACCES);
    fs.chmodSync(t.path('acc'), 0o644);
    assert.equal(t.fs.access(nodeid, 4), 0);
    assert.equal(t.fs.access(nodeid, 2), EACCES);
    t.as(0);
  });

  test(`${label} extended attributes on files, directories, symbolic links and FIFOs`, () => {
    for (const name of ['file', 'dir']) {
      const nodeid = t.lookup(name);
      assert.equal(t.getxattr(nodeid, 'user.a'), ENODATA);
      assert.equal(t.setxattr(nodeid, 'user.a', 'value'), 0);
      assert.equal(t.setxattr(nodeid, 'user.a', 'value', 1), EEXIST);
      assert.equal(t.setxattr(nodeid, 'user.b', '', 2), ENODATA);
      assert.equal(t.getxattr(nodeid, 'user.a'), 'value');
      assert.equal(t.getxattr(nodeid, 'user.a', 0), 5);
      assert.equal(t.getxattr(nodeid, 'user.a', 4), -34);
      assert.deepEqual(
        (t.listxattr(nodeid) as string[]).filter((n) => n.startsWith('user.')),
        ['user.a'],
      );
      assert.equal(t.removexattr(nodeid, 'user.a'), 0);
      assert.equal(t.removexattr(nodeid, 'user.a'), ENODATA);
    }
    for (const name of ['symlink', 'fifo']) {
      const nodeid = t.lookup(name);
      assert.equal(t.setxattr(nodeid, 'user.a', 'x'), EPERM, name);
      if (root) {
        assert.equal(t.setxattr(nodeid, 'trusted.a', 'x'), 0, name);
        assert.equal(t.getxattr(nodeid, 'trusted.a'), 'x', name);
      }
    }
    assert.equal(t.getxattr(t.lookup('file'), 'system.posix_acl_access'), EOPNOTSUPP);
    assert.equal(t.setxattr(t.lookup('dir'), 'system.posix_acl_default', 'x'), EOPNOTSUPP);
  });

  test(`${label} FALLOCATE, LSEEK for holes, COPY_FILE_RANGE`, () => {
    assert.equal(t.create(1, 'holes'), 0);
    const { nodeid, fh } = t;
    assert.equal(t.fs.fallocate(nodeid, fh, 0, 65536, 0), 0);
    assert.equal(fs.statSync(t.path('holes')).size, 65536);
    assert.equal(t.write(nodeid, fh, 0, Buffer.alloc(65536, 'x')), 65536);
    assert.equal(t.fs.fallocate(nodeid, fh, 16384, 16384, 3), 0);
    assert.equal(t.fs.lseek(nodeid, fh, 0, 4), 16384);
    assert.equal(t.fs.lseek(nodeid, fh, 16384, 3), 32768);
    assert.equal(t.fs.lseek(nodeid, fh, 65536, 3), -6);
    assert.equal(t.fs.fallocate(nodeid, fh, 0, 0, 0), EINVAL);
    assert.equal(t.create(1, 'copy'), 0);
    assert.equal(t.fs.copyFileRange(fh, 0, t.nodeid, t.fh, 100, 65536), 65536);
    assert.equal(fs.statSync(t.path('copy')).size, 65636);
    assert.equal(t.fs.copyFileRange(fh + 1, 0, t.nodeid, t.fh, 0, 1), EBADF);
    assert.equal(t.fs.copyFileRange(fh, 0, nodeid, t.fh, 0, 1), EBADF);
    assert.equal(t.fs.syncfs(1), 0);
    assert.equal(t.fs.syncfs(nodeid), 0);
    assert.equal(t.fs.syncfs(t.lookup('symlink')), 0);
  });

  test(`${label} FSYNCDIR, IOCTL`, () => {
    t.fs.opendir(1, 0);
    const fh = t.fh;
    assert.equal(t.fs.fsyncdir(1, fh, false), 0);
    assert.equal(t.fs.fsyncdir(1, fh, true), 0);
    assert.equal(t.fs.fsync(1, fh, false), EBADF, 'a directory is no file');
    assert.equal(t.fs.release(1, fh), EBADF);
    assert.equal(t.fs.lseek(1, fh, 0, 0), EBADF);
    assert.equal(t.read(1, fh, 0, 1), EBADF);
    assert.equal(t.fs.ioctl(1, fh, 0x5401, 0, 0, 0), ENOTTY);
    assert.equal(t.fs.ioctl(1, 5, 0x5401, 0, 0, 0), EBADF);
    assert.equal(t.fs.releasedir(1, fh), 0);
  });
}

test('cache policies answer with their flags', () => {
  const DIRECT_IO = 1;
  const KEEP = 2;
  const CACHE_DIR = 8;
  const expected = {
    auto: [0, 0],
    never: [DIRECT_IO, 0],
    metadata: [DIRECT_IO, CACHE_DIR | KEEP],
    always: [KEEP, CACHE_DIR | KEEP],
  } as const;
  for (const [cache, [file, directory]] of Object.entries(expected)) {
    const t = new TestFs({ cache: cache as 'auto' });
    t.create(1, 'f');
    assert.equal(t.fs.opened.openFlags, file, cache);
    t.open(t.nodeid);
    assert.equal(t.fs.opened.openFlags, file, cache);
    t.fs.opendir(1, 0);
    assert.equal(t.fs.opened.openFlags, directory, cache);
    t.close();
  }
});

test('without xattr its requests are not implemented', () => {
  const t = new TestFs();
  assert.equal(t.getxattr(1, 'user.a'), ENOSYS);
  assert.equal(t.setxattr(1, 'user.a', 'x'), ENOSYS);
  assert.equal(t.listxattr(1), ENOSYS);
  assert.equal(t.removexattr(1, 'user.a'), ENOSYS);
  t.close();
});

test('xattrmap: names differ on both sides; bad, unsupported', () => {
  const t = new TestFs({
    xattr: true,
    xattrmap:
      '/prefix/all/trusted./user.virtiofs./ /bad/server//trusted./ /bad/client/user.virtiofs.// /unsupported/client/security.evil// /ok/all///',
  });
  fs.writeFileSync(t.path('f'), '');
  const nodeid = t.lookup('f');
  assert.equal(t.setxattr(nodeid, 'trusted.x', 'v'), 0);
  const plain = new TestFs({ root: t.dir, xattr: true });
  assert.equal(plain.getxattr(plain.lookup('f'), 'user.virtiofs.trusted.x'), 'v');
  plain.fs.close();
  assert.equal(t.getxattr(nodeid, 'trusted.x'), 'v');
  assert.deepEqual(t.listxattr(nodeid), ['trusted.x']);
  assert.equal(t.setxattr(nodeid, 'user.virtiofs.y', 'v'), EPERM);
  assert.equal(t.getxattr(nodeid, 'user.virtiofs.trusted.x'), ENODATA);
  assert.equal(t.setxattr(nodeid, 'security.evil', 'v'), EOPNOTSUPP);
  assert.equal(t.removexattr(nodeid, 'trusted.x'), 0);
  t.close();
});

test('readonly: nothing is modified', () => {
  const t = new TestFs({ readonly: true, xattr: true });
  fs.writeFileSync(t.path('f'), 'text');
  const EROFS = -30;
  const f = t.lookup('f');
  const results = {
    setattr: t.setattr(f, 1, { mode: 0 }),
    symlink: t.symlink(1, 's', 'x'),
    mknod: t.mknod(1, 'n', 0o100644),
    mkdir: t.mkdir(1, 'd'),
    unlink: t.unlink(1, 'f'),
    rmdir: t.rmdir(1, 'd'),
    rename: t.rename(1, 'f', 1, 'g'),
    link: t.link(f, 1, 'g'),
    openWrite: t.open(f, O_WRONLY),
    openReadWrite: t.open(f, O_RDWR),
    create: t.create(1, 'new', O_RDONLY),
    createWrite: t.create(1, 'f', O_RDWR),
    tmpfile: t.fs.tmpfile(1, O_RDWR, 0o600, 0),
    setxattr: t.setxattr(f, 'user.a', 'x'),
    removexattr: t.removexattr(f, 'user.a'),
    access: t.fs.access(f, 2),
  };
  for (const [name, result] of Object.entries(results)) assert.equal(result, EROFS, name);
  assert.equal(t.open(f, O_RDONLY | O_TRUNC), EINVAL);
  assert.equal(t.create(1, 'f', O_RDONLY), 0);
  assert.equal(t.read(f, t.fh, 0, 10), 'text');
  assert.equal(t.write(f, t.fh, 0, 'x'), EROFS);
  assert.equal(t.fs.fallocate(f, t.fh, 0, 10, 0), EROFS);
  assert.equal(t.fs.copyFileRange(t.fh, 0, f, t.fh, 0, 10), EROFS);
  assert.equal(fs.readFileSync(t.path('f'), 'utf8'), 'text');
  assert.deepEqual(fs.readdirSync(t.dir), ['f']);
  t.close();
});

test("writeback: files opened for writing can be read, O_APPEND is the guest's", () => {
  const t = new TestFs({}, { writebackCache: true });
  t.create(1, 'w', O_WRONLY | O_APPEND);
  assert.equal(t.write(t.nodeid, t.fh, 0, 'text', 1), 4);
  assert.equal(t.read(t.nodeid, t.fh, 0, 10), 'text');
  t.open(t.nodeid, O_WRONLY);
  assert.equal(t.read(t.nodeid, t.fh, 0, 10), 'text');
  t.close();
});

test('O_DIRECT and O_NOATIME reach the host only when allowed', () => {
  const O_DIRECT = constants.O_DIRECT;
  const O_NOATIME = constants.O_NOATIME;
  for (const allowed of [false, true]) {
    const t = new TestFs({ allowDirectIo: allowed, preserveNoatime: allowed });
    fs.writeFileSync(t.path('f'), Buffer.alloc(8192, 'x'));
    const nodeid = t.lookup('f');
    assert.equal(t.open(nodeid, O_RDONLY | O_DIRECT | O_NOATIME), 0);
    const fd = t.fs.share.handles.fd(t.fs.share.handles.find(t.fh, nodeid, 1));
    const flags = Number.parseInt(/flags:\s+(\d+)/.exec(fs.readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8'))?.[1] ?? '', 8);
    assert.equal((flags & O_DIRECT) !== 0, allowed);
    assert.equal((flags & O_NOATIME) !== 0, allowed);
    t.close();
  }
});

test('destroy and close leave nothing open', () => {
  const before = openFds();
  const t = new TestFs();
  for (let i = 0; i < 20; i++) {
    t.create(1, `f${i}`);
    t.mkdir(1, `d${i}`);
    t.fs.opendir(t.nodeid, 0);
    t.getattr(t.nodeid);
  }
  t.fs.destroy();
  assert.equal(t.fs.share.inodes.size, 1);
  assert.equal(t.fs.share.handles.open, 0);
  assert.equal(t.fs.share.descriptors, 1);
  assert.ok(t.lookup('f1') > 1, 'the root is still there');
  assert.equal(t.getattr(1, NO_FH), 0);
  t.close();
  assert.equal(openFds(), before);
});
