/**
 * A whole session with the real daemon over its socket: every request on a real directory, and the same system call made
 * directly on a directory beside it. Results and errors must be the same, and in the end the two directories.
 */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { Feature, features } from 'vhost-user-ts';
import { arena, arenaAlloc, arenaString, cString, native } from 'vhost-user-ts/native';
import { Opcode } from '../../src/fuse/abi.js';
import { OPCODES } from '../../src/fuse/opcodes.js';
import { needsRoot, scrape, TestDaemon } from '../support/daemon.js';
import { type ClientOptions, errnoOf, type FuseClient, type SetAttributes, Struct } from '../support/fuse-client.js';

const { ENOENT, EACCES, EINVAL, EIO, ENOSYS, EPROTO } = constants.errno;
const { O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_APPEND, O_DIRECTORY, O_NOFOLLOW } = fs.constants;
const O_PATH = 0x200000;
const O_TMPFILE = 0x400000 | O_DIRECTORY;
const CWD = -100;
const AT_REMOVEDIR = 0x200;
const AT_SYMLINK_NOFOLLOW = 0x100;
const UTIME_OMIT = 0x3ffffffe;
const RENAME_NOREPLACE = 1;
const RENAME_EXCHANGE = 2;
const RENAME_WHITEOUT = 4;
const FALLOC_FL_KEEP_SIZE = 1;
const FALLOC_FL_PUNCH_HOLE = 2;
const SEEK_DATA = 3;
const SEEK_HOLE = 4;
const XATTR_CREATE = 1;
const XATTR_REPLACE = 2;
const NO_NAME = 'n'.repeat(256);
const LONG_NAME = 'n'.repeat(255);

const nameA = arenaAlloc(8192);
const nameB = arenaAlloc(8192);
const nameC = arenaAlloc(1024);
const data = arenaAlloc(1 << 18);
const iov = arenaAlloc(64);
const words = new BigUint64Array(arena.u8.buffer);
const procfd = native.openat(CWD, cString('/proc/self/fd'), O_PATH | O_DIRECTORY, 0);
native.umask(0);

/** System calls on a directory, by paths in it. A failed one is -errno. */
class Direct {
  readonly dir: string;
  constructor(dir: string) {
    this.dir = dir;
  }
  #at(path: string, buffer = nameA): number {
    return cString(path === '' ? this.dir : `${this.dir}/${path}`, buffer);
  }
  open(path: string, flags = O_RDONLY, mode = 0): number {
    return native.openat(CWD, this.#at(path), flags | O_NOFOLLOW, mode);
  }
  stat(path: string): number {
    return native.statx(CWD, this.#at(path), AT_SYMLINK_NOFOLLOW, 0x7ff, data);
  }
  chmod(path: string, mode: number): number {
    return this.#on(path, O_PATH, (fd) => native.chmodProc(procfd, fd, mode));
  }
  chown(path: string, uid: number, gid: number): number {
    return native.fchownat(CWD, this.#at(path), uid, gid, AT_SYMLINK_NOFOLLOW);
  }
  truncate(path: string, size: number): number {
    return this.#on(path, O_WRONLY, (fd) => native.ftruncate(fd, size));
  }
  utimes(path: string, atime: [number, number] | null, mtime: [number, number]): number {
    [atime, mtime].forEach((time, i) => {
      words[(data >> 3) + 2 * i] = BigInt(time?.[0] ?? 0);
      words[(data >> 3) + 2 * i + 1] = BigInt(time?.[1] ?? UTIME_OMIT);
    });
    return this.#on(path, O_PATH, (fd) => native.utimensProc(procfd, fd, data));
  }
  symlink(path: string, target: string): number {
    return native.symlinkat(cString(target, nameB), CWD, this.#at(path));
  }
  readlink(path: string): string | number {
    const n = native.readlinkat(CWD, this.#at(path), data, 4096);
    return n < 0 ? n : arenaString(data, n);
  }
  mknod(path: string, mode: number, rdev = 0): number {
    return native.mknodat(CWD, this.#at(path), mode, rdev);
  }
  mkdir(path: string, mode = 0o755): number {
    return native.mkdirat(CWD, this.#at(path), mode);
  }
  unlink(path: string): number {
    return native.unlinkat(CWD, this.#at(path), 0);
  }
  rmdir(path: string): number {
    return native.unlinkat(CWD, this.#at(path), AT_REMOVEDIR);
  }
  rename(path: string, newPath: string, flags = 0): number {
    return native.renameat2(CWD, this.#at(path), CWD, this.#at(newPath, nameB), flags);
  }
  link(path: string, newPath: string): number {
    return native.linkat(CWD, this.#at(path), CWD, this.#at(newPath, nameB), 0);
  }
  read(fd: number, offset: number, size: number): string | number {
    const n = native.preadv2(fd, this.#buffer(size), 1, 0, size, offset, 0);
    return n < 0 ? n : arenaString(data, n);
  }
  write(fd: number, offset: number, text: string): number {
    const length = Buffer.byteLength(text);
    arena.buffer.write(text, data);
    return native.pwritev2(fd, this.#buffer(length), 1, 0, length, offset, 0);
  }
  setxattr(path: string, name: string, value: string | Buffer, flags = 0): number {
    const bytes = Buffer.from(value);
    arena.u8.set(bytes, data);
    return this.#on(path, O_PATH, (fd) => native.setxattr(procfd, fd, cString(name, nameC), data, bytes.length, flags));
  }
  getxattr(path: string, name: string, size = 65536): string | number {
    const n = this.#on(path, O_PATH, (fd) => native.getxattr(procfd, fd, cString(name, nameC), data, size));
    return n < 0 || size === 0 ? n : arenaString(data, n);
  }
  listxattr(path: string, size = 65536): string[] | number {
    const n = this.#on(path, O_PATH, (fd) => native.listxattr(procfd, fd, data, size));
    return n < 0 || size === 0 ? n : arenaString(data, n).split('\0').slice(0, -1);
  }
  removexattr(path: string, name: string): number {
    return this.#on(path, O_PATH, (fd) => native.removexattr(procfd, fd, cString(name, nameC)));
  }
  #on(path: string, flags: number, call: (fd: number) => number): number {
    const fd = this.open(path, flags);
    if (fd < 0) return fd;
    const result = call(fd);
    native.close(fd);
    return result;
  }
  #buffer(length: number): number {
    words[iov >> 3] = BigInt(native.arenaAddress() + data);
    words[(iov >> 3) + 1] = BigInt(length);
    return iov;
  }
}

/** Guest and host side by side. */
class Both {
  readonly client: FuseClient;
  readonly host: Direct;
  readonly #ids = new Map<string, number>([['', 1]]);

  constructor(client: FuseClient, host: Direct) {
    this.client = client;
    this.host = host;
  }

  /** The same result on both sides: what is returned, or the errno. */
  same<T>(what: string, guest: () => T, direct: () => unknown): T | undefined {
    let got: unknown;
    const errno = errnoOf(() => {
      got = guest();
    });
    const wanted = direct();
    const result = errno > 0 ? -errno : got;
    // Where only success counts the guest's side returns an object of its own.
    if (typeof wanted === 'number' && (wanted < 0 || typeof result === 'object' || result === undefined)) {
      assert.equal(errno > 0 ? -errno : 0, Math.min(wanted, 0), what);
    } else {
      assert.deepEqual(result, wanted, what);
    }
    return errno > 0 ? undefined : (got as T);
  }

  /** The nodeid of a path; looked up once. */
  id(path: string): number {
    const known = this.#ids.get(path);
    if (known !== undefined) return known;
    const slash = path.lastIndexOf('/');
    const { nodeid } = this.client.lookup(this.id(slash < 0 ? '' : path.slice(0, slash)), path.slice(slash + 1));
    this.#ids.set(path, nodeid);
    return nodeid;
  }

  /** Forgets what was looked up by names that other things have now. */
  refresh(): void {
    for (const path of [...this.#ids.keys()]) if (path !== '') this.#ids.delete(path);
  }
}

/** Everything of a tree that both sides must have alike. */
function describe(dir: string): Record<string, unknown> {
  const tree: Record<string, unknown> = {};
  const visit = (path: string): void => {
    const at = join(dir, path);
    const { mode, nlink, uid, gid, size, rdev } = fs.lstatSync(at);
    const type = mode & fs.constants.S_IFMT;
    tree[path] = {
      ...{ mode: mode.toString(8), nlink, uid, gid, rdev },
      ...(type === fs.constants.S_IFREG ? { size, text: size < 1 << 20 ? fs.readFileSync(at, 'latin1') : undefined } : {}),
      ...(type === fs.constants.S_IFLNK ? { target: fs.readlinkSync(at) } : {}),
    };
    if (type === fs.constants.S_IFDIR) for (const name of fs.readdirSync(at).sort()) visit(join(path, name));
  };
  visit('');
  return tree;
}

function prepare(dir: string): void {
  fs.mkdirSync(dir, { recursive: true });
  for (const name of ['dir', 'full', 'full/sub', 'empty', 'other']) fs.mkdirSync(join(dir, name));
  fs.writeFileSync(join(dir, 'file'), 'hello');
  fs.writeFileSync(join(dir, 'second'), 'second file');
  fs.writeFileSync(join(dir, 'full/x'), 'x');
  fs.symlinkSync('file', join(dir, 'symlink'));
}

interface Variant {
  name: string;
  options: string[];
  client: ClientOptions;
  requestQueue?: number;
  pageSize?: number;
}

const ALL = Feature.VERSION_1;
const VARIANTS: readonly Variant[] = [
  { name: 'as Linux on QEMU', options: [], client: {} },
  {
    name: 'descriptors of 512 bytes without EVENT_IDX and INDIRECT, O_PATH descriptors',
    options: ['--inode-file-handles=never'],
    client: { features: features(ALL, Feature.PROTOCOL_FEATURES), queueSize: 1024 },
    pageSize: 512,
  },
  {
    name: 'as User Mode Linux, third request queue, no threads',
    options: ['--tag=share', '--thread-pool-size=0', '--cache=always'],
    client: { order: 'uml', queues: 4 },
    requestQueue: 2,
  },
];

for (const variant of VARIANTS) {
  test(`a session: ${variant.name}`, needsRoot, async () => {
    // The direct calls have CAP_SYS_ADMIN, too: it is for trusted attributes.
    await using daemon = await TestDaemon.start(['--xattr', '--modcaps=+sys_admin', '--metrics=unix:{folder}/metrics', ...variant.options]);
    const mirror = join(daemon.folder, 'mirror');
    prepare(daemon.share);
    prepare(mirror);
    const client = daemon.connect(variant.client);
    client.requestQueue = variant.requestQueue ?? 0;
    client.pageSize = variant.pageSize ?? 0;

    // Nothing works before INIT, and INIT can be repeated.
    assert.equal(
      errnoOf(() => client.getattr(1)),
      EIO,
    );
    assert.equal(
      errnoOf(() => client.init({ major: 6 })),
      EPROTO,
    );
    assert.equal(client.init({ minor: 45 }).minor, 45);
    client.init();

    const both = new Both(client, new Direct(mirror));
    names(both);
    attributes(both, daemon.share, mirror);
    files(both, daemon.share);
    space(both);
    directories(both, daemon.share);
    xattrs(both);
    withoutCall(client);
    assert.deepEqual(describe(daemon.share), describe(mirror));

    client.forget(both.id('file'), 1);
    client.batchForget([
      { nodeid: both.id('second'), nlookup: 1 },
      { nodeid: both.id('dir'), nlookup: 1 },
    ]);
    client.destroy();
    assert.equal(
      errnoOf(() => client.getattr(1)),
      EIO,
    );
    client.init();
    assert.equal(client.getattr(1).attr.ino, fs.statSync(daemon.share, { bigint: true }).ino);
    assert.equal(
      errnoOf(() => client.getattr(both.id('file'))),
      ENOENT,
      'nodeids end with their session',
    );

    // No request was left out.
    const counted = await scrape({ socketPath: join(daemon.folder, 'metrics') });
    for (const { name } of OPCODES)
      assert.ok((counted.get(`virtiofsd_requests_total{opcode="${name}"}`) ?? 0) > 0, `${name} was never sent`);
    assert.deepEqual(
      daemon.lines.filter((line) => / (WARN|ERROR) /.test(line)),
      [],
    );
  });
}

/** LOOKUP, SYMLINK, READLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, RENAME2, LINK. */
function names(both: Both): void {
  const { client, host } = both;
  const { id } = { id: (path: string) => both.id(path) };
  both.same(
    'LOOKUP',
    () => client.lookup(1, 'file'),
    () => host.stat('file'),
  );
  both.same(
    'LOOKUP of nothing',
    () => client.lookup(1, 'nothing'),
    () => host.stat('nothing'),
  );
  both.same(
    'LOOKUP in a file',
    () => client.lookup(id('file'), 'x'),
    () => host.stat('file/x'),
  );
  both.same(
    'LOOKUP of a name too long',
    () => client.lookup(1, NO_NAME),
    () => host.stat(NO_NAME),
  );
  both.same(
    'LOOKUP of bytes that are no UTF-8',
    () => client.lookup(1, Buffer.from([0xff, 0xfe])),
    () => host.stat('no such'),
  );

  both.same(
    'SYMLINK',
    () => client.symlink(1, 'new-symlink', '../some/where'),
    () => host.symlink('new-symlink', '../some/where'),
  );
  both.same(
    'SYMLINK, name taken',
    () => client.symlink(1, 'file', 'x'),
    () => host.symlink('file', 'x'),
  );
  both.same(
    'SYMLINK in a file',
    () => client.symlink(id('file'), 'x', 'x'),
    () => host.symlink('file/x', 'x'),
  );
  both.same(
    'SYMLINK, name too long',
    () => client.symlink(1, NO_NAME, 'x'),
    () => host.symlink(NO_NAME, 'x'),
  );
  both.same(
    'SYMLINK, longest target',
    () => client.symlink(1, 'far', 't'.repeat(4095)),
    () => host.symlink('far', 't'.repeat(4095)),
  );
  both.same(
    'READLINK',
    () => client.readlink(id('new-symlink')),
    () => host.readlink('new-symlink'),
  );
  both.same(
    'READLINK, longest target',
    () => client.readlink(id('far')),
    () => host.readlink('far'),
  );
  both.same(
    'READLINK of a file',
    () => client.readlink(id('file')),
    () => host.readlink('file'),
  );

  for (const [name, mode, rdev] of [
    ['node-file', 0o100640, 0],
    ['node-fifo', 0o010600, 0],
    ['node-socket', 0o140755, 0],
    ['node-null', 0o020666, (1 << 8) | 3],
    ['node-block', 0o060600, (7 << 8) | 0xff | (0x123 << 20)],
    [LONG_NAME, 0o100000, 0],
  ] as const) {
    both.same(
      `MKNOD ${name}`,
      () => client.mknod(1, name, mode, rdev),
      () => host.mknod(name, mode, rdev),
    );
    both.same(
      `MKNOD ${name} again`,
      () => client.mknod(1, name, mode, rdev),
      () => host.mknod(name, mode, rdev),
    );
  }
  both.same(
    'MKNOD in a file',
    () => client.mknod(id('file'), 'x', 0o100644),
    () => host.mknod('file/x', 0o100644),
  );

  both.same(
    'MKDIR',
    () => client.mkdir(1, 'made', 0o1751),
    () => host.mkdir('made', 0o1751),
  );
  both.same(
    'MKDIR, name taken',
    () => client.mkdir(1, 'dir'),
    () => host.mkdir('dir'),
  );
  both.same(
    'MKDIR in a file',
    () => client.mkdir(id('file'), 'x'),
    () => host.mkdir('file/x'),
  );
  both.same(
    'MKDIR, name too long',
    () => client.mkdir(1, NO_NAME),
    () => host.mkdir(NO_NAME),
  );

  both.same(
    'LINK',
    () => client.link(id('file'), id('dir'), 'hard'),
    () => host.link('file', 'dir/hard'),
  );
  both.same(
    'LINK of a symbolic link',
    () => client.link(id('symlink'), 1, 'hard-symlink'),
    () => host.link('symlink', 'hard-symlink'),
  );
  both.same(
    'LINK, name taken',
    () => client.link(id('file'), 1, 'second'),
    () => host.link('file', 'second'),
  );
  both.same(
    'LINK of a directory',
    () => client.link(id('dir'), 1, 'x'),
    () => host.link('dir', 'x'),
  );
  both.same(
    'LINK in a file',
    () => client.link(id('file'), id('second'), 'x'),
    () => host.link('file', 'second/x'),
  );
  both.same(
    'LINK, name too long',
    () => client.link(id('file'), 1, NO_NAME),
    () => host.link('file', NO_NAME),
  );

  both.same(
    'RENAME',
    () => client.rename(1, 'node-file', id('dir'), 'renamed'),
    () => host.rename('node-file', 'dir/renamed'),
  );
  both.same(
    'RENAME over a file',
    () => client.rename(1, 'node-fifo', id('dir'), 'renamed'),
    () => host.rename('node-fifo', 'dir/renamed'),
  );
  both.same(
    'RENAME of nothing',
    () => client.rename(1, 'nothing', 1, 'x'),
    () => host.rename('nothing', 'x'),
  );
  both.same(
    'RENAME over a full directory',
    () => client.rename(1, 'empty', 1, 'full'),
    () => host.rename('empty', 'full'),
  );
  both.same(
    'RENAME of a file over a directory',
    () => client.rename(1, 'file', 1, 'empty'),
    () => host.rename('file', 'empty'),
  );
  both.same(
    'RENAME of a directory over a file',
    () => client.rename(1, 'empty', 1, 'file'),
    () => host.rename('empty', 'file'),
  );
  both.same(
    'RENAME of a directory into itself',
    () => client.rename(1, 'full', id('full/sub'), 'x'),
    () => host.rename('full', 'full/sub/x'),
  );
  both.same(
    'RENAME into a file',
    () => client.rename(1, 'second', id('file'), 'x'),
    () => host.rename('second', 'file/x'),
  );
  both.same(
    'RENAME to a name too long',
    () => client.rename(1, 'second', 1, NO_NAME),
    () => host.rename('second', NO_NAME),
  );
  const flagged = (what: string, from: string, to: string, flags: number): unknown =>
    both.same(
      `RENAME2 ${what}`,
      () => client.rename2(1, from, 1, to, flags),
      () => host.rename(from, to, flags),
    );
  flagged('NOREPLACE', 'node-null', 'renamed-null', RENAME_NOREPLACE);
  flagged('NOREPLACE, name taken', 'renamed-null', 'file', RENAME_NOREPLACE);
  flagged('EXCHANGE', 'renamed-null', 'full', RENAME_EXCHANGE);
  flagged('EXCHANGE with nothing', 'file', 'nothing', RENAME_EXCHANGE);
  flagged('EXCHANGE back', 'renamed-null', 'full', RENAME_EXCHANGE);
  flagged('WHITEOUT', 'node-socket', 'moved-socket', RENAME_WHITEOUT);
  flagged('NOREPLACE and EXCHANGE', 'file', 'second', RENAME_NOREPLACE | RENAME_EXCHANGE);
  flagged('with unknown flags', 'file', 'second', 1 << 20);

  both.same(
    'UNLINK',
    () => client.unlink(1, 'moved-socket'),
    () => host.unlink('moved-socket'),
  );
  both.same(
    'UNLINK of nothing',
    () => client.unlink(1, 'moved-socket'),
    () => host.unlink('moved-socket'),
  );
  both.same(
    'UNLINK of a directory',
    () => client.unlink(1, 'empty'),
    () => host.unlink('empty'),
  );
  both.same(
    'UNLINK in a file',
    () => client.unlink(id('file'), 'x'),
    () => host.unlink('file/x'),
  );
  both.same(
    'RMDIR',
    () => client.rmdir(1, 'empty'),
    () => host.rmdir('empty'),
  );
  both.same(
    'RMDIR of nothing',
    () => client.rmdir(1, 'empty'),
    () => host.rmdir('empty'),
  );
  both.same(
    'RMDIR of a full directory',
    () => client.rmdir(1, 'full'),
    () => host.rmdir('full'),
  );
  both.same(
    'RMDIR of a file',
    () => client.rmdir(1, 'file'),
    () => host.rmdir('file'),
  );
  both.same(
    'RMDIR of a symbolic link',
    () => client.rmdir(1, 'symlink'),
    () => host.rmdir('symlink'),
  );
}

/** GETATTR, STATX, SETATTR, ACCESS, STATFS. */
function attributes(both: Both, share: string, mirror: string): void {
  const { client, host } = both;
  for (const path of ['', 'file', 'dir', 'symlink', 'node-block', 'renamed-null']) {
    const stat = fs.lstatSync(join(share, path), { bigint: true });
    const { attr } = client.getattr(both.id(path));
    const time = ({ sec, nsec }: { sec: bigint; nsec: number }): bigint => sec * 1_000_000_000n + BigInt(nsec);
    assert.deepEqual(
      {
        ...{ ino: attr.ino, size: BigInt(attr.size), blocks: BigInt(attr.blocks), mode: BigInt(attr.mode), nlink: BigInt(attr.nlink) },
        ...{ uid: BigInt(attr.uid), gid: BigInt(attr.gid), rdev: BigInt(attr.rdev), blksize: BigInt(attr.blksize) },
        ...{ atimeNs: time(attr.atime), mtimeNs: time(attr.mtime), ctimeNs: time(attr.ctime) },
      },
      {
        ...{ ino: stat.ino, size: stat.size, blocks: stat.blocks, mode: stat.mode, nlink: stat.nlink },
        ...{ uid: stat.uid, gid: stat.gid, rdev: stat.rdev, blksize: stat.blksize },
        ...{ atimeNs: stat.atimeNs, mtimeNs: stat.mtimeNs, ctimeNs: stat.ctimeNs },
      },
      path,
    );
    const statx = client.statx(both.id(path));
    assert.deepEqual(
      { ino: statx.ino, mode: BigInt(statx.mode), size: statx.size, birthtimeNs: time(statx.btime), mtimeNs: time(statx.mtime) },
      { ino: stat.ino, mode: stat.mode, size: stat.size, birthtimeNs: stat.birthtimeNs, mtimeNs: stat.mtimeNs },
      path,
    );
  }
  assert.equal(
    errnoOf(() => client.getattr(123456)),
    ENOENT,
  );
  assert.equal(
    errnoOf(() => client.statx(123456)),
    ENOENT,
  );

  const set = (what: string, path: string, change: SetAttributes, direct: () => number): unknown =>
    both.same(`SETATTR ${what}`, () => client.setattr(both.id(path), change), direct);
  set('mode', 'file', { mode: 0o4751 }, () => host.chmod('file', 0o4751));
  set('mode of a directory', 'dir', { mode: 0o2770 }, () => host.chmod('dir', 0o2770));
  set('owner', 'file', { uid: 12, gid: 34 }, () => host.chown('file', 12, 34));
  set('group alone', 'dir', { gid: 56 }, () => host.chown('dir', 0xffffffff, 56));
  set('owner of a symbolic link', 'symlink', { uid: 7 }, () => host.chown('symlink', 7, 0xffffffff));
  set('size, shorter', 'second', { size: 3 }, () => host.truncate('second', 3));
  set('size, longer', 'second', { size: 10_000 }, () => host.truncate('second', 10_000));
  set('size of a directory', 'dir', { size: 0 }, () => host.truncate('dir', 0));
  set('size beyond the file system', 'second', { size: 2n ** 52n }, () => host.truncate('second', 2 ** 52));
  set('negative size', 'second', { size: -1 }, () => -EINVAL);
  set('times', 'second', { atime: { sec: 5n, nsec: 6 }, mtime: { sec: -7n, nsec: 999_999_999 } }, () =>
    host.utimes('second', [5, 6], [-7, 999_999_999]),
  );
  set('mtime alone', 'dir', { mtime: { sec: 1_000_000_000n, nsec: 1 } }, () => host.utimes('dir', null, [1_000_000_000, 1]));
  set('a time that is none', 'dir', { mtime: { sec: 1n, nsec: 1_000_000_000 } }, () => host.utimes('dir', null, [1, 1_000_000_000]));
  for (const path of ['second', 'dir']) {
    const [ours, theirs] = [share, mirror].map((dir) => fs.statSync(join(dir, path), { bigint: true }));
    assert.equal(ours?.mtimeNs, theirs?.mtimeNs);
    if (path === 'second') assert.equal(ours?.atimeNs, theirs?.atimeNs);
  }
  client.setattr(both.id('second'), { mtime: 'now' });
  assert.ok(Math.abs(fs.statSync(join(share, 'second')).mtimeMs - Date.now()) < 60_000);
  assert.equal(
    errnoOf(() => client.setattr(123456, { mode: 0 })),
    ENOENT,
  );

  fs.chmodSync(join(share, 'full/x'), 0o640);
  fs.chmodSync(join(mirror, 'full/x'), 0o640);
  for (const [uid, mask] of [
    [0, 6],
    [0, 1],
    [1000, 4],
    [1000, 2],
    [1000, 0],
  ] as const) {
    client.as(uid, uid, () =>
      both.same(
        `ACCESS ${mask} as ${uid}`,
        () => client.access(both.id('full/x'), mask),
        () => (uid === 0 ? (mask === 1 ? -EACCES : 0) : accessAs(uid, join(mirror, 'full/x'), mask)),
      ),
    );
  }

  const statfs = client.statfs();
  const direct = fs.statfsSync(share);
  assert.deepEqual(
    { bsize: statfs.bsize, blocks: Number(statfs.blocks), files: Number(statfs.files), namelen: statfs.namelen },
    { bsize: direct.bsize, blocks: direct.blocks, files: direct.files, namelen: 255 },
  );
  assert.equal(
    errnoOf(() => client.statfs(123456)),
    ENOENT,
  );
}

/** Whether a user may: by opening (the calls of this thread alone are made as that user). */
function accessAs(uid: number, path: string, mask: number): number {
  native.setEffectiveUid(uid);
  const fd = mask === 0 ? 0 : native.openat(CWD, cString(path, nameA), mask === 2 ? O_WRONLY : O_RDONLY, 0);
  native.setEffectiveUid(0);
  if (fd > 0) native.close(fd);
  return Math.min(fd, 0);
}

/** OPEN, CREATE, TMPFILE, READ, WRITE, FLUSH, RELEASE, FSYNC, LSEEK. */
function files(both: Both, share: string): void {
  const { client, host } = both;
  const opened = (what: string, path: string, flags: number): { fh: number; fd: number; nodeid: number } => {
    let fd = -1;
    const reply = both.same(
      `OPEN ${what}`,
      () => client.open(both.id(path), flags),
      () => {
        fd = host.open(path, flags);
        return fd;
      },
    );
    return { fh: reply?.fh ?? -1, fd, nodeid: both.id(path) };
  };
  opened('of a directory for writing', 'dir', O_WRONLY);
  opened('of a symbolic link', 'symlink', O_RDONLY);
  assert.equal(
    errnoOf(() => client.open(123456)),
    ENOENT,
  );

  const ro = opened('for reading', 'file', O_RDONLY);
  const wo = opened('for writing', 'file', O_WRONLY);
  const rw = opened('for both', 'second', O_RDWR);
  const read = (what: string, file: typeof ro, offset: number, size: number): unknown =>
    both.same(
      `READ ${what}`,
      () => client.read(file.nodeid, file.fh, offset, size).toString(),
      () => host.read(file.fd, offset, size),
    );
  const write = (what: string, file: typeof ro, offset: number, text: string): unknown =>
    both.same(
      `WRITE ${what}`,
      () => client.write(file.nodeid, file.fh, offset, text),
      () => host.write(file.fd, offset, text),
    );
  read('all', ro, 0, 4096);
  read('a part', ro, 1, 3);
  read('behind the end', ro, 100, 10);
  read('of nothing', ro, 0, 0);
  read('of a hole', rw, 2, 9000);
  read('of a file open for writing', wo, 0, 10);
  write('', wo, 2, 'LL');
  write('behind the end', wo, 5000, 'far');
  write('of nothing', wo, 0, '');
  write('to a file open for reading', ro, 0, 'x');
  write('of much', rw, 4096, 'much '.repeat(40_000));
  write('beyond the file system', wo, 2 ** 50, 'x');
  read('of much', rw, 4000, 200_000);
  // O_APPEND comes with each write.
  const append = host.open('file', O_WRONLY | O_APPEND);
  both.same(
    'WRITE with O_APPEND',
    () => client.write(wo.nodeid, wo.fh, 0, 'end', { flags: O_APPEND }),
    () => host.write(append, 0, 'end'),
  );
  native.close(append);

  for (const [whence, offset] of [
    [SEEK_DATA, 6],
    [SEEK_HOLE, 0],
    [SEEK_DATA, 1e9],
    [SEEK_HOLE, 1e9],
    [17, 0],
  ] as const)
    both.same(
      `LSEEK ${whence} ${offset}`,
      () => Number(client.lseek(wo.nodeid, wo.fh, offset, whence)),
      () => native.lseek(wo.fd, offset, whence),
    );

  both.same(
    'FSYNC',
    () => client.fsync(wo.nodeid, wo.fh),
    () => native.fsync(wo.fd, 0),
  );
  both.same(
    'FSYNC of the data',
    () => client.fsync(wo.nodeid, wo.fh, true),
    () => native.fsync(wo.fd, 1),
  );
  both.same(
    'FLUSH',
    () => client.flush(wo.nodeid, wo.fh),
    () => 0,
  );
  for (const file of [ro, wo, rw]) {
    both.same(
      'RELEASE',
      () => client.release(file.nodeid, file.fh),
      () => native.close(file.fd),
    );
    both.same(
      'RELEASE again',
      () => client.release(file.nodeid, file.fh),
      () => native.close(file.fd),
    );
    both.same(
      'FLUSH of a closed file',
      () => client.flush(file.nodeid, file.fh),
      () => native.close(file.fd),
    );
    both.same(
      'FSYNC of a closed file',
      () => client.fsync(file.nodeid, file.fh),
      () => native.fsync(file.fd, 0),
    );
    read('of a closed file', file, 0, 1);
    write('to a closed file', file, 0, 'x');
  }

  const created = (what: string, path: string, flags: number, mode = 0o640): void => {
    let fd = -1;
    const slash = path.lastIndexOf('/');
    const parent = both.id(slash < 0 ? '' : path.slice(0, slash));
    const reply = both.same(
      `CREATE ${what}`,
      () => client.create(parent, path.slice(slash + 1), flags, mode),
      () => {
        fd = host.open(path, flags | O_CREAT, mode);
        return fd;
      },
    );
    if (reply === undefined) return;
    const file = { nodeid: reply.entry.nodeid, fh: reply.open.fh, fd };
    write(what, file, 0, what);
    both.same(
      'RELEASE',
      () => client.release(file.nodeid, file.fh),
      () => native.close(fd),
    );
  };
  created('', 'created', O_RDWR);
  created('a read-only file', 'created-readonly', O_WRONLY | O_EXCL, 0o400);
  created('one that is there', 'created', O_WRONLY);
  created('one that is there, O_EXCL', 'created', O_WRONLY | O_EXCL);
  created('one that is there, O_TRUNC', 'created', O_WRONLY | O_TRUNC);
  created('a directory that is there', 'dir', O_WRONLY);
  created('a symbolic link that is there', 'symlink', O_WRONLY);
  created('in a file', 'file/x', O_WRONLY);
  created('with a name too long', NO_NAME, O_WRONLY);
  client.as(1000, 1001, () => assert.equal(client.create(1, 'of-1000', O_WRONLY).entry.attr.uid, 1000));
  const stat = fs.statSync(join(share, 'of-1000'));
  assert.deepEqual([stat.uid, stat.gid], [1000, 1001]);
  both.client.unlink(1, 'of-1000');

  let fd = -1;
  const tmpfile = both.same(
    'TMPFILE',
    () => client.tmpfile(both.id('dir'), O_RDWR, 0o604),
    () => {
      fd = host.open('dir', O_TMPFILE | O_RDWR, 0o604);
      return fd;
    },
  );
  assert.ok(tmpfile !== undefined && tmpfile.entry.attr.nlink === 0);
  write('to a file without a name', { nodeid: tmpfile.entry.nodeid, fh: tmpfile.open.fh, fd }, 0, 'unnamed');
  both.same(
    'LINK of a file without a name',
    () => client.link(tmpfile.entry.nodeid, 1, 'named'),
    () => native.linkProc(procfd, fd, CWD, cString(`${host.dir}/named`, nameA)),
  );
  both.same(
    'RELEASE',
    () => client.release(tmpfile.entry.nodeid, tmpfile.open.fh),
    () => native.close(fd),
  );
  both.same(
    'TMPFILE in a file',
    () => client.tmpfile(both.id('file'), O_RDWR),
    () => host.open('file', O_TMPFILE | O_RDWR, 0o600),
  );

  // An open file whose name is gone; and a node whose file is gone.
  both.same(
    'OPEN',
    () => client.create(1, 'gone', O_RDWR),
    () => (fd = host.open('gone', O_CREAT | O_RDWR, 0o644)),
  );
  native.close(fd);
  const gone = client.lookup(1, 'gone').nodeid;
  const { fh } = client.open(gone, O_RDWR);
  both.same(
    'UNLINK of an open file',
    () => client.unlink(1, 'gone'),
    () => host.unlink('gone'),
  );
  assert.equal(client.write(gone, fh, 0, 'still here'), 10);
  assert.equal(client.read(gone, fh, 0, 100).toString(), 'still here');
  assert.equal(client.getattr(gone, fh).attr.nlink, 0);
  client.setattr(gone, { size: 5, fh });
  assert.equal(client.getattr(gone, fh).attr.size, 5);
}

/** FALLOCATE, COPY_FILE_RANGE, SYNCFS. */
function space(both: Both): void {
  const { client, host } = both;
  const nodeid = both.id('second');
  const fd = host.open('second', O_RDWR);
  const { fh } = client.open(nodeid, O_RDWR);
  const ro = client.open(nodeid, O_RDONLY);
  const roFd = host.open('second', O_RDONLY);
  for (const [mode, offset, length] of [
    [0, 0, 500_000],
    [FALLOC_FL_KEEP_SIZE, 600_000, 4096],
    [FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 8192],
    [FALLOC_FL_PUNCH_HOLE, 0, 4096],
    [0, 0, 0],
    [0, -1, 10],
    [0x4000, 0, 4096],
  ] as const)
    both.same(
      `FALLOCATE ${mode} ${offset} ${length}`,
      () => client.fallocate(nodeid, fh, offset, length, mode),
      () => native.fallocate(fd, mode, offset, length),
    );
  both.same(
    'FALLOCATE, open for reading',
    () => client.fallocate(nodeid, ro.fh, 0, 1),
    () => native.fallocate(roFd, 0, 0, 1),
  );
  both.same(
    'FALLOCATE, not open',
    () => client.fallocate(nodeid, 999, 0, 1),
    () => native.fallocate(-1, 0, 0, 1),
  );

  const to = both.id('named');
  const toFh = client.open(to, O_RDWR).fh;
  const toFd = host.open('named', O_RDWR);
  for (const [from, offset, length] of [
    [0, 2, 8000],
    [100, 0, 1],
    [1e9, 0, 10],
  ] as const) {
    const source = { nodeid, fh, offset: from };
    const target = { nodeid: to, fh: toFh, offset };
    const direct = (): number => native.copyFileRange(fd, from, toFd, offset, length);
    both.same(`COPY_FILE_RANGE ${from} ${offset} ${length}`, () => client.copyFileRange(source, target, length), direct);
    both.same(`COPY_FILE_RANGE_64 ${from} ${offset} ${length}`, () => Number(client.copyFileRange64(source, target, length)), direct);
  }
  both.same(
    'COPY_FILE_RANGE within overlapping parts',
    () => client.copyFileRange({ nodeid, fh, offset: 0 }, { nodeid, fh, offset: 10 }, 100),
    () => native.copyFileRange(fd, 0, fd, 10, 100),
  );
  both.same(
    'COPY_FILE_RANGE to a file open for reading',
    () => client.copyFileRange({ nodeid: to, fh: toFh, offset: 0 }, { nodeid, fh: ro.fh, offset: 0 }, 10),
    () => native.copyFileRange(toFd, 0, roFd, 0, 10),
  );
  both.same(
    'SYNCFS',
    () => client.syncfs(),
    () => 0,
  );
  for (const [file, handle] of [
    [nodeid, fh],
    [nodeid, ro.fh],
    [to, toFh],
  ] as const)
    client.release(file, handle);
  for (const descriptor of [fd, roFd, toFd]) native.close(descriptor);
}

/** OPENDIR, READDIR, READDIRPLUS, RELEASEDIR, FSYNCDIR. */
function directories(both: Both, share: string): void {
  const { client, host } = both;
  both.same(
    'OPENDIR of a file',
    () => client.opendir(both.id('file')),
    () => host.open('file', O_DIRECTORY),
  );
  for (let i = 0; i < 300; i++) {
    const { entry, open } = client.create(both.id('other'), `entry-${i}`, O_WRONLY);
    client.release(entry.nodeid, open.fh);
    native.close(host.open(`other/entry-${i}`, O_CREAT | O_WRONLY, 0o644));
  }
  const { fh } = client.opendir(both.id('other'));
  for (const size of [512, 4096, 32768]) {
    const listed = client.list(both.id('other'), size).map(({ name }) => name);
    assert.deepEqual(listed.sort(), ['.', '..', ...fs.readdirSync(join(share, 'other'))].sort());
    assert.deepEqual(listed.slice(2).sort(), fs.readdirSync(join(host.dir, 'other')).sort());
  }
  const plus = client.readdirplus(both.id('other'), fh, 0, 32768);
  const entry = plus.find(({ name }) => name === 'entry-7') ?? plus.find(({ name }) => name.startsWith('entry'));
  assert.equal(entry?.entry?.attr.ino, fs.statSync(join(share, 'other', entry?.name ?? ''), { bigint: true }).ino);
  assert.equal(entry?.entry?.nodeid, client.lookup(both.id('other'), entry?.name ?? '').nodeid);
  for (const { offset, name } of plus.slice(0, 20)) {
    const [next] = client.readdir(both.id('other'), fh, offset, 600);
    assert.equal(next?.name, plus[plus.findIndex((e) => e.name === name) + 1]?.name);
  }
  both.same(
    'READDIR without room for an entry',
    () => client.readdir(both.id('other'), fh, 0, 16),
    () => {
      const fd = host.open('other', O_DIRECTORY);
      const error = native.getdents64(fd, data, 16);
      native.close(fd);
      return error;
    },
  );
  both.same(
    'FSYNCDIR',
    () => client.fsyncdir(both.id('other'), fh),
    () => 0,
  );
  client.releasedir(both.id('other'), fh);
  for (const [what, call] of [
    ['RELEASEDIR', () => client.releasedir(both.id('other'), fh)],
    ['READDIR', () => client.readdir(both.id('other'), fh)],
    ['READDIRPLUS', () => client.readdirplus(both.id('other'), fh)],
    ['FSYNCDIR', () => client.fsyncdir(both.id('other'), fh)],
  ] as const)
    both.same(`${what}, not open`, call, () => native.getdents64(-1, data, 4096));
}

/** SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR. */
function xattrs(both: Both): void {
  const { client, host } = both;
  const set = (what: string, path: string, name: string, value: string | Buffer, flags = 0): unknown =>
    both.same(
      `SETXATTR ${what}`,
      () => client.setxattr(both.id(path), name, value, flags),
      () => host.setxattr(path, name, value, flags),
    );
  for (const path of ['file', 'dir']) {
    set('', path, 'user.one', 'value');
    set('an empty value', path, 'user.empty', '');
    set('CREATE, there', path, 'user.one', 'x', XATTR_CREATE);
    set('REPLACE, not there', path, 'user.two', 'x', XATTR_REPLACE);
    set('REPLACE', path, 'user.one', 'replaced', XATTR_REPLACE);
    set('trusted', path, 'trusted.mine', 'x');
    set('no such namespace', path, 'nowhere.x', 'x');
    set('a name too long', path, `user.${'n'.repeat(251)}`, 'x');
    set('a value too large', path, 'user.large', Buffer.alloc(65_537));
    set('flags that are none', path, 'user.one', 'x', 64);
  }
  set('user attribute of a symbolic link', 'symlink', 'user.x', 'x');
  set('trusted attribute of a symbolic link', 'symlink', 'trusted.x', 'x');
  set('user attribute of a device', 'renamed-null', 'user.x', 'x');

  const file = both.id('file');
  both.same(
    'GETXATTR',
    () => client.getxattr(file, 'user.one').toString(),
    () => host.getxattr('file', 'user.one'),
  );
  both.same(
    'GETXATTR, empty',
    () => client.getxattr(file, 'user.empty').toString(),
    () => host.getxattr('file', 'user.empty'),
  );
  both.same(
    'GETXATTR, length',
    () => client.getxattrSize(file, 'user.one'),
    () => host.getxattr('file', 'user.one', 0),
  );
  both.same(
    'GETXATTR, too little room',
    () => client.getxattr(file, 'user.one', 3),
    () => host.getxattr('file', 'user.one', 3),
  );
  both.same(
    'GETXATTR, not there',
    () => client.getxattr(file, 'user.none'),
    () => host.getxattr('file', 'user.none'),
  );
  both.same(
    'GETXATTR, no such namespace',
    () => client.getxattr(file, 'nowhere.x'),
    () => host.getxattr('file', 'nowhere.x'),
  );
  both.same(
    'LISTXATTR',
    () => client.listxattr(file),
    () => host.listxattr('file'),
  );
  both.same(
    'LISTXATTR, length',
    () => client.listxattrSize(file),
    () => host.listxattr('file', 0),
  );
  both.same(
    'LISTXATTR, too little room',
    () => client.listxattr(file, 5),
    () => host.listxattr('file', 5),
  );
  both.same(
    'LISTXATTR of a symbolic link',
    () => client.listxattr(both.id('symlink')),
    () => host.listxattr('symlink'),
  );
  both.same(
    'REMOVEXATTR',
    () => client.removexattr(file, 'user.one'),
    () => host.removexattr('file', 'user.one'),
  );
  both.same(
    'REMOVEXATTR, not there',
    () => client.removexattr(file, 'user.one'),
    () => host.removexattr('file', 'user.one'),
  );
  both.same(
    'REMOVEXATTR, no such namespace',
    () => client.removexattr(file, 'nowhere.x'),
    () => host.removexattr('file', 'nowhere.x'),
  );
  both.same(
    'LISTXATTR after it',
    () => client.listxattr(file),
    () => host.listxattr('file'),
  );
}

/** Requests that no system call answers: the guest does it itself, or there is no answer at all. */
function withoutCall(client: FuseClient): void {
  const { nodeid } = client.lookup(1, 'file');
  const { fh } = client.open(nodeid, O_RDWR);
  assert.equal(
    errnoOf(() => client.ioctl(nodeid, fh, 0x5401, new Uint8Array(0), 60)),
    -native.ioctl(native.openat(CWD, cString('/dev/null', nameA), O_RDONLY, 0), 0x5401, data),
  );
  const lock = { start: 0, end: 10, type: 1, pid: 1 };
  for (const request of [
    () => client.getlk(nodeid, fh, 1, lock),
    () => client.setlk(nodeid, fh, 1, lock),
    () => client.setlkw(nodeid, fh, 1, lock),
    () => client.bmap(nodeid, 0, 4096),
    () => client.poll(nodeid, fh, 1),
    () => client.fsnotify(nodeid, 1),
    () => client.request(Opcode.READ_NOTIFY, 0, [new Struct(8).bytes], 4096),
    () => client.request(Opcode.SETUPMAPPING, nodeid, [new Struct(40).bytes], 0),
    () => client.request(Opcode.REMOVEMAPPING, nodeid, [new Struct(20).u32(0, 1).bytes], 0),
    () => client.request(2000, nodeid, [], 100),
  ])
    assert.equal(errnoOf(request), ENOSYS, String(request));
  client.interrupt(12345n);
  client.oneWay(Opcode.NOTIFY_REPLY, nodeid, []);
  client.release(nodeid, fh);
  client.forget(nodeid, 1);
}
