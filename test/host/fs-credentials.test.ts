/** Whose files the guest makes, what it may keep, and what the thread is left with. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { test } from 'node:test';
import { arena, arenaAlloc } from 'vhost-user-ts/native';
import { root, TestFs } from '../support/fs.js';

const EPERM = -1;
const EINVAL = -22;
const needsRoot = { skip: root ? false : 'needs root' };

/** Effective ids of this thread as the kernel sees them. */
function ids(): { uid: number; gid: number; groups: string } {
  const status = fs.readFileSync('/proc/thread-self/status', 'utf8');
  const field = (name: string): string => new RegExp(`^${name}:[ \\t]*(.*)$`, 'm').exec(status)?.[1] ?? '';
  return { uid: Number(field('Uid').split('\t')[1]), gid: Number(field('Gid').split('\t')[1]), groups: field('Groups').trim() };
}

test('create-type operations make files of the caller, the others work under any ids', needsRoot, () => {
  const t = new TestFs({ xattr: true });
  const check = (name: string, uid: number, gid: number): void => {
    const stat = fs.lstatSync(t.path(name));
    assert.deepEqual([stat.uid, stat.gid], [uid, gid], name);
    assert.deepEqual([t.attr.uid, t.attr.gid], [uid, gid], `${name}, as the guest is told`);
  };
  t.as(1000, 2000);
  assert.equal(t.create(1, 'create'), 0);
  check('create', 1000, 2000);
  assert.equal(t.mkdir(1, 'mkdir', 0o700), 0);
  check('mkdir', 1000, 2000);
  const dir = t.nodeid;
  assert.equal(t.symlink(1, 'symlink', 'x'), 0);
  check('symlink', 1000, 2000);
  assert.equal(t.mknod(1, 'fifo', 0o010644), 0);
  check('fifo', 1000, 2000);
  t.as(1001, 2001);
  assert.equal(t.fs.tmpfile(1, 2, 0o600, 0), 0);
  assert.equal(t.link(t.nodeid, 1, 'tmp'), 0);
  check('tmp', 1001, 2001);
  // Still under 1001's ids: everything else is allowed all the same.
  assert.equal(ids().uid, 1001);
  fs.writeFileSync(t.path('mkdir/private'), 'x', { mode: 0o600 });
  const file = t.lookup('private', dir);
  assert.ok(file > 1);
  assert.equal(t.open(file, 2), 0);
  assert.equal(t.setattr(file, 1 | 2 | 4, { mode: 0o600, uid: 5, gid: 6 }), 0);
  assert.equal(t.setxattr(file, 'trusted.a', 'x'), 0);
  assert.equal(t.rename(dir, 'private', 1, 'moved'), 0);
  assert.equal(t.unlink(1, 'moved'), 0);
  assert.equal(t.rmdir(1, 'mkdir'), 0);
  t.as(0);
  assert.equal(t.create(1, 'root'), 0);
  check('root', 0, 0);
  assert.deepEqual([ids().uid, ids().gid], [0, 0]);
  t.as(1000);
  assert.equal(t.create(1, 'again'), 0);
  t.fs.destroy();
  assert.equal(ids().uid, 0, 'the session is over');
  t.close();
});

test('ids that do not exist are refused, not taken for "no change"', needsRoot, () => {
  const t = new TestFs();
  assert.equal(t.as(0xffffffff, 0).create(1, 'a'), EINVAL);
  assert.equal(t.as(0, 0xffffffff).create(1, 'a'), EINVAL);
  assert.deepEqual(fs.readdirSync(t.dir), []);
  t.close();
});

test('set-group-id directories and files: as the kernel does it for such a caller', needsRoot, () => {
  const t = new TestFs();
  fs.mkdirSync(t.path('sg'));
  fs.chownSync(t.path('sg'), 0, 5000);
  fs.chmodSync(t.path('sg'), 0o2777);
  const dir = t.lookup('sg');
  const mode = (name: string): string => fs.lstatSync(t.path(`sg/${name}`)).mode.toString(8);
  t.as(1000, 1000);
  assert.equal(t.create(dir, 'outside', 2, 0o2755), 0);
  assert.equal(mode('outside'), '100755', 'the caller is not in the group');
  assert.equal(fs.lstatSync(t.path('sg/outside')).gid, 5000);
  assert.equal(t.mknod(dir, 'outside-node', 0o102755), 0);
  assert.equal(mode('outside-node'), '100755');
  t.as(1000, 5000);
  assert.equal(t.create(dir, 'inside', 2, 0o2755), 0);
  assert.equal(mode('inside'), '102755');
  t.as(1000, 1000, 5000);
  assert.equal(t.create(dir, 'supplementary', 2, 0o2755), 0);
  assert.equal(mode('supplementary'), '102755');
  assert.equal(ids().groups, '', 'the group is not kept');
  t.as(1000, 1000);
  assert.equal(t.create(dir, 'no-exec', 2, 0o2644), 0);
  assert.equal(mode('no-exec'), '102644', 'mandatory locking bit, not stripped without S_IXGRP');
  assert.equal(t.mkdir(dir, 'sub', 0o755), 0);
  assert.equal(mode('sub'), '42755');
  t.as(0);
  assert.equal(t.create(dir, 'by-root', 2, 0o2755), 0);
  assert.equal(mode('by-root'), '102755');
  // For comparison: the same by setpriv on the host.
  execFileSync('setpriv', [
    '--reuid',
    '1000',
    '--regid',
    '1000',
    '--clear-groups',
    process.execPath,
    '-e',
    "process.umask(0); fs.closeSync(fs.openSync(process.argv[1], 'w', 0o2755))",
    t.path('sg/direct'),
  ]);
  assert.equal(mode('direct'), mode('outside'));
  t.close();
});

test('umask: the guest has applied its own, or the host does and default ACLs rule', needsRoot, () => {
  const applied = new TestFs();
  assert.equal(applied.create(1, 'f', 2, 0o666, 0o077), 0);
  assert.equal(applied.attr.mode & 0o777, 0o666);
  applied.close();
  const t = new TestFs({ xattr: true }, { dontMask: true, posixAcl: true });
  assert.equal(t.create(1, 'f', 2, 0o666, 0o027), 0);
  assert.equal(t.attr.mode & 0o777, 0o640);
  assert.equal(t.mkdir(1, 'd', 0o777, 0o077), 0);
  assert.equal(t.attr.mode & 0o777, 0o700);
  const dir = t.nodeid;
  // version 2; user::rwx user:1234:rwx group::r-x mask::rwx other::r-x
  const acl = Buffer.alloc(4 + 5 * 8);
  acl.writeUInt32LE(2, 0);
  [
    [1, 7, 0xffffffff],
    [2, 7, 1234],
    [4, 5, 0xffffffff],
    [0x10, 7, 0xffffffff],
    [0x20, 5, 0xffffffff],
  ].forEach(([tag, perm, id], i) => {
    acl.writeUInt16LE(tag as number, 4 + i * 8);
    acl.writeUInt16LE(perm as number, 6 + i * 8);
    acl.writeUInt32LE(id as number, 8 + i * 8);
  });
  assert.equal(t.setxattr(dir, 'system.posix_acl_default', acl), 0);
  assert.equal(t.create(dir, 'f', 2, 0o666, 0o077), 0);
  assert.equal(t.attr.mode & 0o777, 0o664, 'where a default ACL is, the umask does not count');
  assert.ok((t.listxattr(t.nodeid) as string[]).includes('system.posix_acl_access'));
  assert.equal(t.mknod(dir, 'n', 0o100666, 0, 0o077), 0);
  assert.equal(t.attr.mode & 0o777, 0o664);
  t.fs.destroy();
  assert.equal(
    process.umask() & 0o777,
    Number.parseInt(/^Umask:\s*(\d+)/m.exec(fs.readFileSync('/proc/thread-self/status', 'utf8'))?.[1] ?? '', 8),
  );
  t.close();
});

test('an ACL that takes the group away clears S_ISGID when the guest says so', needsRoot, () => {
  const t = new TestFs({ xattr: true }, { posixAcl: true, dontMask: true });
  t.create(1, 'f', 2, 0o755);
  fs.chmodSync(t.path('f'), 0o2755);
  const acl = Buffer.from('0200000001000700ffffffff04000500ffffffff20000500ffffffff', 'hex');
  assert.equal(t.setxattr(t.nodeid, 'system.posix_acl_access', acl, 0, 0), 0);
  assert.equal(fs.statSync(t.path('f')).mode & 0o7777, 0o2755);
  assert.equal(t.setxattr(t.nodeid, 'system.posix_acl_access', acl, 0, 1), 0);
  assert.equal(fs.statSync(t.path('f')).mode & 0o7777, 0o755);
  t.close();
});

test('killpriv_v2: set-user-id bits go with a write, a truncation, an opening that truncates, when the guest says so', needsRoot, () => {
  const KILL_WRITE = 4;
  const KILL_SETATTR = 2048;
  for (const killPrivV2 of [true, false]) {
    const t = new TestFs({}, { killPrivV2 });
    const mode = (): number => fs.statSync(t.path('f')).mode & 0o7777;
    const expected = killPrivV2 ? 0o755 : 0o6755;
    t.create(1, 'f');
    const { nodeid, fh } = t;
    const reset = (): void => fs.chmodSync(t.path('f'), 0o6755);
    reset();
    assert.equal(t.write(nodeid, fh, 0, 'x'), 1);
    assert.equal(mode(), 0o6755);
    assert.equal(t.write(nodeid, fh, 0, 'x', KILL_WRITE), 1);
    assert.equal(mode(), 0o755, 'a write says so whatever was negotiated');
    reset();
    assert.equal(t.setattr(nodeid, 8, { size: 5 }), 0);
    assert.equal(mode(), 0o6755);
    assert.equal(t.setattr(nodeid, 8 | KILL_SETATTR, { size: 6 }), 0);
    assert.equal(mode(), expected);
    reset();
    assert.equal(t.open(nodeid, 0x202, true), 0);
    assert.equal(mode(), expected);
    reset();
    assert.equal(t.write(nodeid, fh, 0, 'x'), 1);
    assert.equal(mode(), 0o6755, 'the capability is there again');
    t.close();
  }
});

test('translated ids: both ways, forbidden ones, chown', needsRoot, () => {
  const t = new TestFs({
    translateUid: ['map:0:100000:1000', 'forbid-guest:1000:1000'],
    translateGid: ['map:0:200000:1000', 'squash-host:7:9:1'],
  });
  assert.equal(t.as(5, 6).create(1, 'f'), 0);
  assert.deepEqual([t.attr.uid, t.attr.gid], [5, 6]);
  const stat = fs.statSync(t.path('f'));
  assert.deepEqual([stat.uid, stat.gid], [100005, 200006]);
  assert.equal(t.as(1000, 6).create(1, 'g'), EPERM);
  assert.equal(t.setattr(t.nodeid, 2 | 4, { uid: 0, gid: 1 }), 0);
  assert.deepEqual([t.attr.uid, t.attr.gid], [0, 1]);
  assert.equal(fs.statSync(t.path('f')).uid, 100000);
  assert.equal(t.setattr(t.nodeid, 2, { uid: 1500 }), EPERM);
  fs.chownSync(t.path('f'), 55, 7);
  t.getattr(t.nodeid);
  assert.deepEqual([t.attr.uid, t.attr.gid], [55, 9]);
  t.close();
});

test('security contexts are set on new objects, and what cannot have one is taken away again', needsRoot, () => {
  const t = new TestFs({ xattr: true });
  const at = arenaAlloc(256);
  const context = (name: string, value: string): void => {
    arena.u32[at >> 2] = value.length;
    arena.u32[(at >> 2) + 1] = 0;
    arena.u8.set(Buffer.from(`${name}\0${value}`), at + 8);
    Object.assign(t.fs.caller, { securityContexts: at, securityContextCount: 1, securityContextBytes: 8 + name.length + 1 + value.length });
  };
  context('trusted.label', 'label');
  assert.equal(t.create(1, 'create'), 0);
  assert.equal(t.mkdir(1, 'mkdir'), 0);
  assert.equal(t.symlink(1, 'symlink', 'x'), 0);
  assert.equal(t.mknod(1, 'fifo', 0o010644), 0);
  for (const name of ['create', 'mkdir', 'symlink', 'fifo']) assert.equal(t.getxattr(t.lookup(name), 'trusted.label'), 'label', name);
  t.fs.destroy();
  context('nonsense', 'x');
  const size = t.fs.share.inodes.size;
  assert.equal(t.create(1, 'no-create'), -95);
  assert.equal(t.mkdir(1, 'no-mkdir'), -95);
  assert.equal(t.mknod(1, 'no-mknod', 0o100644), -95);
  assert.deepEqual(
    fs.readdirSync(t.dir).filter((name) => name.startsWith('no-')),
    [],
  );
  assert.equal(t.fs.share.inodes.size, size);
  context('trusted.label', 'label');
  for (const bytes of [0, 7, 8, 12, 22, 26]) {
    t.fs.caller.securityContextBytes = bytes;
    assert.equal(t.create(1, `short${bytes}`), EINVAL);
  }
  t.close();
});

test('file capabilities that the map keeps elsewhere go with a write, a chown and a truncation', needsRoot, () => {
  const t = new TestFs({ xattr: true, xattrmap: ':map::user.virtiofs.:' });
  t.create(1, 'f');
  const { nodeid, fh } = t;
  const name = 'security.capability';
  const set = (): void => assert.equal(t.setxattr(nodeid, name, 'caps'), 0);
  const gone = (): void => assert.equal(t.getxattr(nodeid, name), -61);
  set();
  t.write(nodeid, fh, 0, 'x');
  gone();
  set();
  t.setattr(nodeid, 2, { uid: 3 });
  gone();
  set();
  t.setattr(nodeid, 8, { size: 0 });
  gone();
  set();
  t.open(nodeid, 0x202);
  gone();
  set();
  t.setattr(nodeid, 1, { mode: 0o600 });
  assert.equal(t.getxattr(nodeid, name), 'caps');
  t.close();
});

test('an ordinary user: root and the user itself may create, others may not', needsRoot, () => {
  const script = `
    const { TestFs } = await import(process.argv[1]);
    const t = new TestFs({ root: process.argv[2] });
    const out = [t.warnings.length, t.as(0).create(1, 'root'), t.as(1234, 1234).create(1, 'self'), t.as(1235, 1234).create(1, 'uid'), t.as(1234, 1235).create(1, 'gid')];
    out.push(t.lookup('root') > 1 ? 0 : 1, t.getattr(t.lookup('self')), t.open(t.lookup('self'), 2), t.setattr(t.lookup('self'), 2, { uid: 0 }));
    t.fs.close();
    console.log(JSON.stringify(out));`;
  const dir = fs.mkdtempSync('/tmp/fs-user-');
  fs.chownSync(dir, 1234, 1234);
  const support = new URL('../support/fs.js', import.meta.url).href;
  const args = [
    '--reuid',
    '1234',
    '--regid',
    '1234',
    '--clear-groups',
    process.execPath,
    '--input-type=module',
    '-e',
    script,
    support,
    dir,
  ];
  const out = JSON.parse(execFileSync('setpriv', args, { encoding: 'utf8', env: process.env }));
  assert.deepEqual(out, [1, 0, 0, EPERM, EPERM, 0, 0, 0, EPERM]);
  fs.rmSync(dir, { recursive: true });
});
