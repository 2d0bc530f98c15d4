/** The program that fs-syscalls.test.ts runs under strace: each step between two markers. */
import * as fs from 'node:fs';
import { cString } from 'vhost-user-ts/native';
import { TestFs } from './fs.js';
import { stepBegins, stepEnds } from './strace.js';

const mode = process.argv[2] as 'prefer' | 'never';
const t = new TestFs({ inodeFileHandles: mode, xattr: true });
const text = Buffer.alloc(4096, 'x');
const names: string[] = [];

/** Marks what `step` calls, as `name`. */
function count(name: string, step: () => void): void {
  names.push(name);
  stepBegins(names.length);
  step();
  stepEnds();
}

function expect(result: number): void {
  if (result < 0) throw new Error(`${names.at(-1)}: errno ${-result}`);
}

const old = new Date(Date.now() - 10000);
fs.mkdirSync(t.path('dir'));
fs.mkdirSync(t.path('dir2'));
for (let i = 0; i < 10; i++) fs.writeFileSync(t.path(`dir/f${i}`), text);
fs.writeFileSync(t.path('small'), 'small');
fs.symlinkSync('target', t.path('link'));
fs.utimesSync(t.path('small'), old, old);
// Files younger than a clock tick are compared by handle; these measure the rest.
Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 120);
const dir = t.lookup('dir');
const dir2 = t.lookup('dir2');
t.lookup('missing', dir);
t.lookup('missing', dir2);
const warm = t.lookup('dir/f9');
t.getattr(warm);
t.getxattr(warm, 'user.a');
t.as(0).create(dir, 'warm');
t.unlink(dir, 'warm');

count('LOOKUP, unknown inode', () => expect(t.lookup('f0', dir)));
count('LOOKUP, known inode', () => expect(t.lookup('f0', dir)));
const f0 = t.nodeid;
count('LOOKUP, missing name', () => void t.lookup('missing', dir));
count('GETATTR, first', () => expect(t.getattr(f0)));
count('GETATTR', () => expect(t.getattr(f0)));
count('OPEN', () => expect(t.open(f0, 2)));
const fh = t.fh;
count('GETATTR with fh', () => expect(t.getattr(f0, fh)));
count('READ', () => void t.read(f0, fh, 0, 4096));
count('READ over the end of the file', () => void t.read(f0, fh, 100, 8192));
count('WRITE', () => expect(t.write(f0, fh, 0, text)));
count('WRITE, O_APPEND', () => expect(t.write(f0, fh, 0, 'x', 0x400)));
count('FLUSH', () => expect(t.fs.flush(f0, fh)));
count('RELEASE', () => expect(t.fs.release(f0, fh)));
count('OPENDIR', () => expect(t.fs.opendir(dir, 0)));
const dirFh = t.fh;
const start = { offsetLow: 0, offsetHigh: 0 };
const listed = (low: number, high: number, plus: boolean): { offsetLow: number; offsetHigh: number; nodeid: number }[] =>
  t.readdir(dir, dirFh, low, high, plus) as { offsetLow: number; offsetHigh: number; nodeid: number }[];
let last = start;
count('READDIRPLUS of 10 (8 new)', () => {
  last = listed(0, 0, true).at(-1) ?? start;
});
count('READDIRPLUS, the end', () => void listed(last.offsetLow, last.offsetHigh, true));
t.fs.releasedir(dir, dirFh);
t.fs.opendir(dir, 0);
const again = t.fh;
count('READDIRPLUS of 10 known', () => void t.readdir(dir, again, 0, 0, true));
t.fs.releasedir(dir, again);
t.fs.opendir(dir, 0);
const plain = t.fh;
count('READDIR in 3 answers', () => {
  let at = start;
  for (let i = 0; i < 3; i++) at = (t.readdir(dir, plain, at.offsetLow, at.offsetHigh, false, 3) as (typeof start)[]).at(-1) ?? at;
});
count('RELEASEDIR', () => expect(t.fs.releasedir(dir, plain)));
t.as(1000);
count('CREATE as another uid', () => expect(t.create(dir, 'new1')));
count('CREATE as the same uid', () => expect(t.create(dir, 'new2')));
count('MKDIR as the same uid', () => expect(t.mkdir(dir, 'newdir')));
count('MKNOD as the same uid', () => expect(t.mknod(dir, 'node', 0o100644)));
t.as(1001, 1000);
count('CREATE, only the uid changes', () => expect(t.create(dir, 'new3')));
t.as(0);
t.create(dir, 'by-root');
count('SYMLINK as root', () => expect(t.symlink(dir, 'sym', 'x')));
count('UNLINK', () => expect(t.unlink(dir, 'new1')));
count('RENAME2', () => expect(t.rename(dir, 'new2', dir2, 'new2', 1)));
count('RMDIR', () => expect(t.rmdir(dir, 'newdir')));
count('LINK', () => expect(t.link(f0, dir2, 'hard')));
count('SETATTR, mode', () => expect(t.setattr(f0, 1, { mode: 0o600 })));
count('SETATTR, owner', () => expect(t.setattr(f0, 6, { uid: 1, gid: 1 })));
count('SETATTR, times', () => expect(t.setattr(f0, 48, { atime: 1, mtime: 1 })));
count('SETATTR, size', () => expect(t.setattr(f0, 8, { size: 10 })));
count('GETXATTR', () => void t.getxattr(f0, 'user.a'));
count('SETXATTR', () => expect(t.setxattr(f0, 'user.a', 'x')));
count('LISTXATTR', () => void t.listxattr(f0));
count('REMOVEXATTR', () => expect(t.removexattr(f0, 'user.a')));
count('STATFS', () => expect(t.fs.statfs(1)));
const link = t.lookup('link');
count('READLINK, first', () => void t.readlink(link));
count('READLINK', () => void t.readlink(link));
count('LOOKUP ".."', () => expect(t.fs.lookup(1, cString('..'), 2)));
const f1 = t.lookup('f1', dir);
count('FORGET', () => t.fs.forget(f1, 10));
count('FORGET with a descriptor', () => t.fs.forget(f0, 10));
console.log(JSON.stringify(names));
t.close();
