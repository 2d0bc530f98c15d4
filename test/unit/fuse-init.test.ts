/** FUSE_INIT: versions, and what each option makes of what the guest can do. */
import assert from 'node:assert/strict';
import { suite, test } from 'node:test';
import { KEPT, PENDING } from '../../src/fs/filesystem.js';
import { Errno, InitFlag, InitFlag2, InitOut, Opcode } from '../../src/fuse/abi.js';
import { DEFAULT_SERVER_OPTIONS, type InitRequest, negotiate, type ServerOptions, type Session } from '../../src/fuse/init.js';
import { type Chain, type FileEvents, FuseServer } from '../../src/fuse/server.js';
import { FakeFs, Guest, longs, request, words } from '../support/fuse-guest.js';

/** All that Linux 7.2 sends, on virtio-fs without DAX. */
const LINUX: InitRequest = { minor: 45, maxReadahead: 0x20000, flags: 0x7bfffffb | 0, flags2: 0x7fd };

function session(options: Partial<ServerOptions> = {}, request: Partial<InitRequest> = {}, warnings: string[] = []): Session {
  const result = negotiate({ ...LINUX, ...request }, { ...DEFAULT_SERVER_OPTIONS, ...options }, false, (line) => warnings.push(line));
  assert.notEqual(typeof result, 'number');
  return result as Session;
}

/** Names of the flags that are set. */
function names({ flags, flags2 }: Pick<Session, 'flags' | 'flags2'>): string[] {
  const set = Object.entries(InitFlag).filter(([, bit]) => (flags & bit) !== 0);
  const set2 = Object.entries(InitFlag2).filter(([, bit]) => (flags2 & bit) !== 0);
  return [...set, ...set2].map(([name]) => name);
}

const DEFAULT = [
  'ASYNC_READ',
  'ATOMIC_O_TRUNC',
  'BIG_WRITES',
  'AUTO_INVAL_DATA',
  'DO_READDIRPLUS',
  'READDIRPLUS_AUTO',
  'ASYNC_DIO',
  'PARALLEL_DIROPS',
  'MAX_PAGES',
  'CACHE_SYMLINKS',
  'SUBMOUNTS',
  'INIT_EXT',
  'CREATE_SUPP_GROUP',
  'ALLOW_IDMAP',
];

suite('flags', () => {
  test('without options', () => {
    assert.deepEqual(names(session()), DEFAULT);
  });

  test('nothing that the guest does not have', () => {
    assert.deepEqual(names(session({}, { flags: InitFlag.ASYNC_READ | InitFlag.BIG_WRITES, flags2: 0 })), ['ASYNC_READ', 'BIG_WRITES']);
  });

  const added = (options: Partial<ServerOptions>) => names(session(options)).filter((name) => !DEFAULT.includes(name));
  const gone = (options: Partial<ServerOptions>) => DEFAULT.filter((name) => !names(session(options)).includes(name));

  test('each option', () => {
    assert.deepEqual(gone({ readdirplus: false }), ['DO_READDIRPLUS', 'READDIRPLUS_AUTO']);
    assert.deepEqual(gone({ cacheSymlinks: false }), ['CACHE_SYMLINKS']);
    assert.deepEqual(gone({ announceSubmounts: false }), ['SUBMOUNTS']);
    assert.deepEqual(added({ writeback: true }), ['WRITEBACK_CACHE']);
    assert.deepEqual(added({ killprivV2: true }), ['HANDLE_KILLPRIV_V2']);
    assert.deepEqual(added({ posixAcl: 'auto' }), ['DONT_MASK', 'POSIX_ACL', 'SETXATTR_EXT']);
    assert.deepEqual(added({ posixAcl: 'always' }), ['DONT_MASK', 'POSIX_ACL', 'SETXATTR_EXT']);
    assert.deepEqual(added({ securityLabel: 'auto' }), ['SECURITY_CTX']);
    assert.deepEqual(added({ allowMmap: true }), ['DIRECT_IO_ALLOW_MMAP']);
    assert.deepEqual(added({ exportSupport: true }), ['EXPORT_SUPPORT']);
    assert.deepEqual(added({ posixLock: true }), ['POSIX_LOCKS']);
    assert.deepEqual(added({ flock: true }), ['FLOCK_LOCKS']);
  });

  test('what the file system is told', () => {
    const { posixAcl, dontMask, securityContext, killPrivV2, writebackCache, submounts, atomicOTrunc } = session({
      posixAcl: 'auto',
      securityLabel: 'auto',
      killprivV2: true,
      writeback: true,
    });
    assert.ok(posixAcl && dontMask && securityContext && killPrivV2 && writebackCache && submounts && atomicOTrunc);
  });

  test('a guest that cannot: a line for each option, and no flag', () => {
    const warnings: string[] = [];
    const options = { writeback: true, killprivV2: true, allowMmap: true };
    assert.deepEqual(names(session(options, { flags: 0, flags2: 0 }, warnings)), []);
    assert.deepEqual(
      warnings.map((line) => line.split(' ')[0]),
      ['--writeback', '--announce-submounts', '--killpriv-v2', '--allow-mmap'],
    );
  });

  test('ACLs without SETXATTR_EXT: not with auto, refused with always', () => {
    const flags = LINUX.flags & ~InitFlag.SETXATTR_EXT;
    assert.deepEqual(names(session({ posixAcl: 'auto' }, { flags })), DEFAULT);
    assert.equal(
      negotiate({ ...LINUX, flags }, { ...DEFAULT_SERVER_OPTIONS, posixAcl: 'always' }, false, () => undefined),
      -Errno.EPROTO,
    );
    assert.equal(
      negotiate({ ...LINUX, flags2: 0 }, { ...DEFAULT_SERVER_OPTIONS, securityLabel: 'always' }, false, () => undefined),
      -Errno.EPROTO,
    );
  });

  test('without MAX_PAGES writes are those of 32 pages', () => {
    assert.equal(session().maxWrite, 1 << 20);
    assert.equal(session({}, { flags: 0 }).maxWrite, 128 << 10);
  });
});

suite('versions', () => {
  const fs = new FakeFs();
  const server = new FuseServer(fs, DEFAULT_SERVER_OPTIONS);
  const guest = new Guest(server);
  const init = (major: number, minor: number, ...rest: number[]) =>
    guest.send(request(Opcode.INIT, { nodeid: 0 }, words(major, minor, ...rest)));

  test('7.31, with the short structure', () => {
    const reply = init(7, 31, 0x1000, 0x00400001);
    assert.equal(reply.length, 16 + InitOut.bytes);
    assert.deepEqual([reply.readUInt32LE(16), reply.readUInt32LE(20), reply.readUInt32LE(24)], [7, 45, 0x1000]);
    assert.equal(server.session.minor, 31);
    assert.deepEqual(fs.taken(), ['init()']);
  });

  test('a newer minor version: ours counts', () => {
    init(7, 60, 0, 0x40000000, 0, ...new Array(20).fill(0));
    assert.equal(server.session.minor, 45);
  });

  test('older ones are refused, and the old session is over', () => {
    fs.taken();
    for (const [major, minor] of [
      [7, 30],
      [6, 99],
      [0, 0],
    ] as const)
      assert.equal(init(major, minor, 0, 0).readInt32LE(4), -Errno.EPROTO);
    assert.deepEqual(fs.taken(), ['destroy()']);
    assert.equal(guest.send(request(Opcode.STATFS, {})).readInt32LE(4), -Errno.EIO);
  });

  test('a newer major version is told ours, and asked again', () => {
    const reply = init(8, 0, 0, 0);
    assert.deepEqual([reply.readInt32LE(4), reply.readUInt32LE(16), reply.readUInt32LE(20)], [0, 7, 45]);
    assert.equal(guest.send(request(Opcode.STATFS, {})).readInt32LE(4), -Errno.EIO);
  });

  test('INIT_EXT without flags2', () => {
    assert.equal(init(7, 45, 0, InitFlag.INIT_EXT).readInt32LE(4), -Errno.EINVAL);
  });
});

suite('file events', () => {
  const calls: string[] = [];
  let lent: Chain | undefined;
  const events: FileEvents = {
    supportedLow: 0xffff,
    supportedHigh: 0,
    begin: () => void calls.push('begin'),
    end: () => void calls.push('end'),
    watch: (...args) => {
      calls.push(`watch(${args.join(', ')})`);
      return args[2] === 0xdead ? -95 : 0;
    },
    lend: (chain, low, high, size, flags) => {
      lent = { ...chain };
      calls.push(`lend(${[low, high, size, flags].join(', ')})`);
      return flags === 0 ? KEPT : 0;
    },
  };
  const fs = new FakeFs();
  const server = new FuseServer(fs, DEFAULT_SERVER_OPTIONS, { events });
  const guest = new Guest(server);
  const init = (flags2: number) => guest.send(request(Opcode.INIT, {}, words(7, 45, 0, InitFlag.INIT_EXT, flags2)));

  test('are offered when the guest asks', () => {
    const reply = init(InitFlag2.HAS_FSNOTIFY);
    assert.equal(reply.readUInt32LE(16 + InitOut.flags2), 1 << 28);
    assert.deepEqual(calls.splice(0), ['begin']);
  });

  test('a watch', () => {
    const reply = guest.send(request(Opcode.FSNOTIFY, { nodeid: 9 }, longs(0x0800_0002_0000_0100n), words(3, 1)));
    assert.deepEqual(calls.splice(0), [`watch(9, 3, ${0x100}, ${0x0800_0002}, 1)`]);
    assert.equal(reply.toString('hex', 16), '0001000002000008ffff000000000000');
    assert.equal(guest.send(request(Opcode.FSNOTIFY, {}, longs(0xdead), words(3, 0))).readInt32LE(4), -95);
    calls.splice(0);
  });

  test('a lent buffer stays, the stop request does not', () => {
    assert.equal(guest.send(request(Opcode.READ_NOTIFY, { unique: 2n ** 40n + 5n }, words(4096, 0))).length, 0);
    assert.equal(guest.used, PENDING);
    assert.equal(server.pendingJob, -1);
    assert.equal(lent?.writableBytes, 4096);
    assert.equal(guest.send(request(Opcode.READ_NOTIFY, {}, words(4096, 1))).length, 16);
    assert.deepEqual(calls.splice(0), ['lend(5, 256, 4096, 0)', 'lend(7, 0, 4096, 1)']);
  });

  test('end with the session, before the file system lets go', () => {
    fs.taken();
    fs.destroy = () => void calls.push('destroy');
    guest.send(request(Opcode.DESTROY, {}));
    assert.deepEqual(calls.splice(0), ['end', 'destroy']);
  });

  test('a guest that has not asked gets none', () => {
    init(0);
    assert.equal(guest.send(request(Opcode.FSNOTIFY, {}, longs(1), words(0, 0))).readInt32LE(4), -Errno.ENOSYS);
    assert.equal(guest.send(request(Opcode.READ_NOTIFY, {}, words(4096, 0))).readInt32LE(4), -Errno.ENOSYS);
    assert.deepEqual(calls.splice(0), []);
  });
});

suite('timeouts', () => {
  test('a missing name is remembered for as long as the option says', () => {
    const fs = new FakeFs();
    const guest = new Guest(new FuseServer(fs, { ...DEFAULT_SERVER_OPTIONS, negativeTimeout: 0.5 }));
    guest.send(request(Opcode.INIT, {}, words(7, 45, 0, 0)));
    fs.result = -Errno.ENOENT;
    const reply = guest.send(request(Opcode.LOOKUP, {}, Buffer.from('a\0')));
    assert.equal(reply.length, 16 + 128);
    assert.equal(reply.readInt32LE(4), 0);
    assert.equal(reply.toString('hex', 16), `${'00'.repeat(32)}0065cd1d${'00'.repeat(92)}`);
    fs.result = -Errno.EIO;
    assert.equal(guest.send(request(Opcode.LOOKUP, {}, Buffer.from('a\0'))).readInt32LE(4), -Errno.EIO);
  });

  test('not at all by default', () => {
    const fs = new FakeFs();
    const guest = new Guest(new FuseServer(fs, DEFAULT_SERVER_OPTIONS));
    guest.send(request(Opcode.INIT, {}, words(7, 45, 0, 0)));
    fs.result = -Errno.ENOENT;
    assert.equal(guest.send(request(Opcode.LOOKUP, {}, Buffer.from('a\0'))).readInt32LE(4), -Errno.ENOENT);
  });
});
