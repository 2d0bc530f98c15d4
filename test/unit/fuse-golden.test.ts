/**
 * Every opcode both ways: the bytes of a request as Linux sends it, what the file system is asked, and the bytes of the reply.
 * The numbers are those of struct fuse_* in include/uapi/linux/fuse.h (7.45), written by hand.
 */
import assert from 'node:assert/strict';
import { beforeEach, suite, test } from 'node:test';
import { arena } from 'vhost-user-ts/native';
import { PENDING } from '../../src/fs/filesystem.js';
import { Opcode } from '../../src/fuse/abi.js';
import { DEFAULT_SERVER_OPTIONS } from '../../src/fuse/init.js';
import { OPCODES } from '../../src/fuse/opcodes.js';
import { FuseServer } from '../../src/fuse/server.js';
import { FakeFs, Guest, hex } from '../support/fuse-guest.js';

const fs = new FakeFs();
const jobs = { lastJob: 3, capacity: 256, cancel: () => undefined };
const server = new FuseServer(
  fs,
  { ...DEFAULT_SERVER_OPTIONS, entryTimeout: 1.5, attrTimeout: 2.25, posixAcl: 'auto', securityLabel: 'auto' },
  { jobs },
);
const guest = new Guest(server);
const covered = new Set<number>();

/** A request header: length and opcode as given; unique 7, nodeid 0x42, uid 1000, gid 100, pid 4242. */
const header = (length: string, opcode: string, extensions = '0000') => `
  ${length} ${opcode} 0700000000000000 4200000000000000
  e8030000 64000000 92100000 ${extensions} 0000`;

const INIT = `
  68000000 1a000000 0100000000000000 0000000000000000 00000000 00000000 00000000 0000 0000
  07000000 2d000000  # 7.45
  00000200           # max_readahead 128 KiB
  fbffff73           # flags
  ff070000           # flags2
  ${'00000000'.repeat(11)}`;

const ATTR = `
  1122334455667708   # ino
  0000000001000000   # size 4 GiB
  0800000000000000   # blocks
  ffffffffffffffff   # atime -1
  0200000000000000   # mtime
  0300000000000000   # ctime
  0a000000 14000000 1e000000
  a4810000           # mode 100644
  02000000           # nlink
  e8030000 64000000  # uid, gid
  01083012           # rdev 8, 0x12301: minor's low byte, major, minor's high bits
  00100000           # blksize
  00000000           # flags
`;

const ENTRY = `
  4200000000000000 0700000000000000  # nodeid, generation
  0100000000000000 0200000000000000  # entry and attributes valid: 1.5 s, 2.25 s
  0065cd1d 80b2e60e
  ${ATTR}`;

const OPENED = '0500000000000000 02000000 00000000'; // fh 5, FOPEN_KEEP_CACHE

/** What statx(2) has left for the file system's `attr`. */
const STATX = `
  ff1f0000 00100000 0000000000000000  # mask with STATX_MNT_ID, which stays out of the reply
  02000000 e8030000 64000000 a481 0000
  1122334455667708 0000000001000000 0800000000000000 7408200000000000
  ffffffffffffffff 0a000000 00000000  # atime
  0900000000000000 28000000 00000000  # btime
  0300000000000000 1e000000 00000000  # ctime
  0200000000000000 14000000 00000000  # mtime
  08000000 01230100 fd000000 01000000 # rdev, dev
  ${'ee'.repeat(112)}`;

/** struct statfs of the host. */
const STATFS = `
  53ef000000000000 0010000000000000 0001000000000000 0002000000000000 0003000000000000
  0004000000000000 0005000000000000 0102030405060708 ff00000000000000 0010000000000000
  2000000000000000 ${'00'.repeat(32)}`;

function exchange(bytes: string, room = 4096): Buffer {
  const message = hex(bytes);
  covered.add(message.readUInt32LE(4));
  return guest.send(message, room);
}

/** Serves `bytes`, and expects one call and a successful reply with this body. */
function expect(bytes: string, call: string, body: string, room = 4096): void {
  const reply = exchange(bytes, room);
  assert.deepEqual(fs.taken(), call === '' ? [] : [call]);
  const expected = hex(body);
  const length = Buffer.alloc(4);
  length.writeUInt32LE(16 + expected.length);
  assert.equal(reply.toString('hex'), Buffer.concat([length, hex('00000000 0700000000000000'), expected]).toString('hex'));
}

beforeEach(() => {
  fs.result = 0;
  fs.data = Buffer.alloc(0);
  arena.u8.set(hex(STATX), fs.attr);
  arena.u8.set(hex(STATFS), fs.statfsBuffer);
  guest.send(hex(INIT));
  fs.taken();
});

suite('golden bytes', () => {
  test('INIT', () => {
    assert.equal(
      exchange(INIT).toString('hex'),
      hex(`
        50000000 00000000 0100000000000000
        07000000 2d000000 00000200
        69f0d460           # bits 0 3 5 6 12 13 14 15 18 20 22 29 30: no SUBMOUNTS, which this guest does not have
        ffff fdbf          # max_background, congestion_threshold
        00001000 01000000  # max_write 1 MiB, time_gran 1 ns
        0001 0000          # max_pages 256, map_alignment
        05010000           # SECURITY_CTX CREATE_SUPP_GROUP ALLOW_IDMAP
        ${'00'.repeat(28)}`).toString('hex'),
    );
    assert.deepEqual(fs.taken(), ['destroy()', 'init()']);
  });

  test('LOOKUP', () => {
    expect(`${header('2c000000', '01000000')} 61626300`, 'lookup(66, "abc")', ENTRY);
  });

  test('FORGET has no reply', () => {
    assert.equal(exchange(`${header('30000000', '02000000')} 0300000000000000`, 0).length, 0);
    assert.deepEqual(fs.taken(), ['forget(66, 3)']);
  });

  test('BATCH_FORGET has no reply', () => {
    const bytes = `${header('50000000', '2a000000')} 02000000 00000000
      4200000000000000 0100000000000000
      4300000001000000 0200000000000000`;
    assert.equal(exchange(bytes, 0).length, 0);
    assert.deepEqual(fs.taken(), ['forget(66, 1)', 'forget(4294967363, 2)']);
  });

  test('GETATTR', () => {
    const body = `0200000000000000 80b2e60e 00000000 ${ATTR}`;
    expect(`${header('38000000', '03000000')} 00000000 00000000 0000000000000000`, 'getattr(66, -1, 0, 0)', body);
    expect(`${header('38000000', '03000000')} 01000000 00000000 0500000000000000`, 'getattr(66, 5, 0, 0)', body);
  });

  test('STATX', () => {
    const body = `0200000000000000 80b2e60e 00000000 00000000000000000000000000000000
      ff0f0000 00100000 0000000000000000
      02000000 e8030000 64000000 a481 0000
      1122334455667708 0000000001000000 0800000000000000 7408200000000000
      ffffffffffffffff 0a000000 00000000
      0900000000000000 28000000 00000000
      0300000000000000 1e000000 00000000
      0200000000000000 14000000 00000000
      08000000 01230100 00000000 00000000
      ${'00'.repeat(112)}`;
    expect(`${header('40000000', '34000000')} 01000000 00000000 0500000000000000 00200000 ff0f0000`, 'getattr(66, 5, 8192, 4095)', body);
  });

  test('SETATTR', () => {
    expect(
      `${header('80000000', '04000000')}
        7d040000 00000000  # MODE GID SIZE ATIME MTIME FH CTIME
        0500000000000000 0010000000000000 0000000000000000
        feffffffffffffff 0400000000000000 0500000000000000  # atime -2, mtime, ctime
        01000000 02000000 03000000
        ed810000 00000000  # mode 100755
        ffffffff 64000000 00000000`,
      'setattr(66, {"valid":1149,"fh":5,"mode":33261,"uid":4294967295,"gid":100,"size":4096,"atime":-2,"atimeNsec":1,"mtime":4,"mtimeNsec":2,"ctime":5,"ctimeNsec":3})',
      `0200000000000000 80b2e60e 00000000 ${ATTR}`,
    );
  });

  test('READLINK', () => {
    fs.data = Buffer.from('../target');
    expect(header('28000000', '05000000'), 'readlink(66, 4080)', '2e2e2f746172676574');
  });

  test('SYMLINK: the name, then the target', () => {
    expect(`${header('30000000', '06000000')} 6c6e00 2f612f6200`, 'symlink(66, "ln", "/a/b")', ENTRY);
  });

  test('MKNOD', () => {
    expect(`${header('3a000000', '08000000')} a4610000 01080000 12000000 00000000 6100`, 'mknod(66, "a", 24996, 18, 2049)', ENTRY);
  });

  test('MKDIR', () => {
    expect(`${header('32000000', '09000000')} ed010000 12000000 6100`, 'mkdir(66, "a", 493, 18)', ENTRY);
  });

  test('MKDIR with a security context and a group', () => {
    const bytes = `${header('6a000000', '09000000', '0700')} ed010000 12000000 6100
      28000000 01000000  # fuse_secctx_header: 40 bytes, one context
      08000000 00000000  # fuse_secctx: 8 bytes of context
      73656375726974792e7300  # "security.s"
      7379735f753a6f00        # "sys_u:o"
      0000000000              # padding
      10000000 20000000 01000000 e7030000  # FUSE_EXT_GROUPS, 1 group, 999`;
    expect(bytes, 'mkdir(66, "a", 493, 18)', ENTRY);
    const { caller } = fs;
    assert.equal(caller.supplementaryGid, 999);
    assert.equal(caller.securityContextCount, 1);
    assert.equal(caller.securityContextBytes, 32);
    assert.equal(caller.securityContexts % 8, 0);
    const contexts = arena.buffer.subarray(caller.securityContexts, caller.securityContexts + caller.securityContextBytes);
    assert.equal(contexts.readUInt32LE(0), 8);
    assert.equal(contexts.toString('latin1', 8, 27), 'security.s\0sys_u:o\0');
  });

  test('UNLINK and RMDIR', () => {
    expect(`${header('2a000000', '0a000000')} 6100`, 'unlink(66, "a")', '');
    expect(`${header('2a000000', '0b000000')} 6100`, 'rmdir(66, "a")', '');
  });

  test('RENAME and RENAME2: the old name, then the new one', () => {
    expect(`${header('35000000', '0c000000')} 4300000000000000 6f00 6e6500`, 'rename(66, "o", 67, "ne", 0)', '');
    expect(`${header('3d000000', '2d000000')} 4300000000000000 02000000 00000000 6f00 6e6500`, 'rename(66, "o", 67, "ne", 2)', '');
  });

  test('LINK: the header names the directory, the body the file', () => {
    expect(`${header('32000000', '0d000000')} 4300000000000000 6100`, 'link(67, 66, "a")', ENTRY);
  });

  test('OPEN and OPENDIR', () => {
    expect(`${header('30000000', '0e000000')} 02820000 01000000`, 'open(66, 33282, true)', OPENED);
    expect(`${header('30000000', '1b000000')} 00800100 00000000`, 'opendir(66, 98304)', OPENED);
  });

  test('CREATE', () => {
    expect(
      `${header('3a000000', '23000000')} 42800000 a4810000 12000000 00000000 6100`,
      'create(66, "a", 32834, 33188, 18, false)',
      ENTRY + OPENED,
    );
  });

  test('TMPFILE, whose name is that of no entry', () => {
    expect(`${header('3a000000', '33000000')} 02804100 a4810000 12000000 00000000 2f00`, 'tmpfile(66, 4292610, 33188, 18)', ENTRY + OPENED);
  });

  test('READ: data that the file system has put behind the header', () => {
    fs.data = Buffer.from('hello');
    const bytes = `${header('50000000', '0f000000')} 0500000000000000 0010000000000000 00010000 00000000 0000000000000000 00000000 00000000`;
    expect(bytes, 'read(66, 5, 4096, 256)', '68656c6c6f');
  });

  test('WRITE: the payload is taken from the chain', () => {
    const bytes = `${header('55000000', '10000000')} 0500000000000000 0010000000000000 05000000 04000000 0000000000000000 01840000 00000000
      68656c6c6f`;
    expect(bytes, 'write(66, 5, 4096, 5, 1028)', '05000000 00000000'); // FUSE_WRITE_KILL_SUIDGID and O_APPEND
    assert.equal(fs.data.toString(), 'hello');
  });

  test('STATFS', () => {
    expect(
      header('28000000', '11000000'),
      'statfs(66)',
      `0001000000000000 0002000000000000 0003000000000000 0004000000000000 0005000000000000
       00100000 ff000000 00100000 00000000 ${'00'.repeat(24)}`,
    );
  });

  test('FLUSH, RELEASE, RELEASEDIR', () => {
    expect(`${header('40000000', '19000000')} 0500000000000000 00000000 00000000 1111111111111111`, 'flush(66, 5)', '');
    expect(`${header('40000000', '12000000')} 0500000000000000 02800000 00000000 0000000000000000`, 'release(66, 5)', '');
    expect(`${header('40000000', '1d000000')} 0500000000000000 00800000 00000000 0000000000000000`, 'releasedir(66, 5)', '');
  });

  test('FSYNC, FSYNCDIR', () => {
    expect(`${header('38000000', '14000000')} 0500000000000000 01000000 00000000`, 'fsync(66, 5, true)', '');
    expect(`${header('38000000', '1e000000')} 0500000000000000 00000000 00000000`, 'fsyncdir(66, 5, false)', '');
  });

  test('SYNCFS', () => {
    expect(`${header('30000000', '32000000')} 0000000000000000`, 'syncfs(66)', '');
  });

  test('ACCESS', () => {
    expect(`${header('30000000', '22000000')} 04000000 00000000`, 'access(66, 4)', '');
  });

  test('SETXATTR in the extended form', () => {
    const bytes = `${header('42000000', '15000000')} 03000000 01000000 01000000 00000000 757365722e6100 763d31`;
    expect(bytes, 'setxattr(66, "user.a", "v=1", 1, 1)', '');
  });

  test('GETXATTR', () => {
    fs.data = Buffer.from('value');
    expect(`${header('37000000', '16000000')} 40000000 00000000 757365722e6100`, 'getxattr(66, "user.a", 64)', '76616c7565');
    expect(`${header('37000000', '16000000')} 00000000 00000000 757365722e6100`, 'getxattr(66, "user.a", 0)', '05000000 00000000');
  });

  test('LISTXATTR', () => {
    fs.data = Buffer.from('user.a\0');
    expect(`${header('30000000', '17000000')} 40000000 00000000`, 'listxattr(66, 64)', '757365722e6100');
    expect(`${header('30000000', '17000000')} 00000000 00000000`, 'listxattr(66, 0)', '07000000 00000000');
  });

  test('REMOVEXATTR', () => {
    expect(`${header('2f000000', '18000000')} 757365722e6100`, 'removexattr(66, "user.a")', '');
  });

  test('READDIR', () => {
    fs.directory = [
      { name: 'a', ino: 0x8877665544332211n, type: 8, offset: 0x7fff_0000_0000_0001n, known: true },
      { name: 'eightlet', ino: 2n, type: 4, offset: 0x7fff_ffff_ffff_ffffn, known: true },
    ];
    expect(
      `${header('50000000', '1c000000')} 0500000000000000 01000000ffffff7f 00100000 00000000 0000000000000000 00000000 00000000`,
      'readdir(66, 5, 1, 2147483647, 4096, false)',
      `1122334455667788 010000000000ff7f 01000000 08000000 6100000000000000
       0200000000000000 ffffffffffffff7f 08000000 04000000 65696768746c6574`,
      4112,
    );
  });

  test('READDIRPLUS', () => {
    fs.directory = [
      { name: 'a', ino: 1n, type: 8, offset: 1n, known: true },
      { name: '..', ino: 2n, type: 4, offset: 2n, known: false },
    ];
    expect(
      `${header('50000000', '2c000000')} 0500000000000000 0000000000000000 00100000 00000000 0000000000000000 00000000 00000000`,
      'readdir(66, 5, 0, 0, 4096, true)',
      `${ENTRY} 0100000000000000 0100000000000000 01000000 08000000 6100000000000000
       ${'00'.repeat(128)} 0200000000000000 0200000000000000 02000000 04000000 2e2e000000000000`,
      4112,
    );
  });

  test('FALLOCATE', () => {
    expect(
      `${header('48000000', '2b000000')} 0500000000000000 0010000000000000 0000000001000000 01000000 00000000`,
      'fallocate(66, 5, 4096, 4294967296, 1)',
      '',
    );
  });

  test('LSEEK', () => {
    fs.result = 0x4000_0000; // a position may be the number that means PENDING elsewhere
    expect(
      `${header('40000000', '2e000000')} 0500000000000000 0010000000000000 03000000 00000000`,
      'lseek(66, 5, 4096, 3)',
      '0000004000000000',
    );
  });

  test('COPY_FILE_RANGE and COPY_FILE_RANGE_64', () => {
    const body = '0500000000000000 0010000000000000 4300000000000000 0600000000000000 0020000000000000 0000000001000000 0000000000000000';
    fs.result = 8192;
    expect(`${header('60000000', '2f000000')} ${body}`, 'copyFileRange(5, 4096, 67, 6, 8192, 1073737728)', '00200000 00000000');
    expect(`${header('60000000', '35000000')} ${body}`, 'copyFileRange(5, 4096, 67, 6, 8192, 1073737728)', '0020000000000000');
  });

  test('IOCTL', () => {
    fs.data = hex('aabbccdd');
    expect(
      `${header('4c000000', '27000000')} 0500000000000000 00000000 01660880 00000000ff7f0000 04000000 04000000 01020304`,
      'ioctl(66, 5, 2148034049, "01020304", 4)',
      '00000000 00000000 00000000 00000000 aabbccdd',
    );
  });

  test('DESTROY', () => {
    expect(header('28000000', '26000000'), 'destroy()', '');
  });

  test('INTERRUPT and NOTIFY_REPLY have no reply', () => {
    assert.equal(exchange(`${header('30000000', '24000000')} 0500000000000000`, 0).length, 0);
    assert.equal(exchange(header('28000000', '29000000'), 0).length, 0);
    assert.deepEqual(fs.taken(), ['interrupt(5, 0)']);
  });

  test('GETLK, SETLK, SETLKW and FLUSH where locks are shared', () => {
    const posix = new FakeFs();
    const sharing = new Guest(new FuseServer(posix, { ...DEFAULT_SERVER_OPTIONS, posixLock: true }, { jobs }));
    sharing.send(hex(INIT));
    posix.taken();
    const request = (opcode: string, flags: string) =>
      hex(
        `${header('58000000', opcode)} 0500000000000000 0100000002000000 0300000004000000 ffffffffffffff7f 01000000 92100000 ${flags} 00000000`,
      );
    const asked =
      '{"ownerLow":1,"ownerHigh":2,"startLow":3,"startHigh":4,"endLow":4294967295,"endHigh":2147483647,"type":1,"pid":4242,"flock":false,"uniqueLow":7,"uniqueHigh":0}';
    const reply = sharing.send(request('1f000000', '00000000'));
    assert.equal(reply.toString('hex'), '280000000000000007000000000000000300000004000000ffffffffffffff7f0100000092100000');
    assert.equal(sharing.send(request('20000000', '00000000')).toString('hex'), '10000000000000000700000000000000');
    posix.result = PENDING;
    assert.equal(sharing.send(request('21000000', '00000000')).length, 0);
    posix.result = 0;
    sharing.send(hex(`${header('40000000', '19000000')} 0500000000000000 00000000 00000000 1111111122222222`));
    assert.deepEqual(posix.taken(), [
      `getlk(66, 5, ${asked})`,
      `setlk(66, 5, ${asked}, false)`,
      `setlk(66, 5, ${asked}, true)`,
      'flush(66, 5)',
      'unlockOwner(66, 286331153, 572662306)',
    ]);
    // flock(2) was not agreed on.
    assert.equal(sharing.send(request('20000000', '01000000')).toString('hex'), '10000000daffffff0700000000000000');
  });

  test('what is not served is answered ENOSYS', () => {
    const lock = `0500000000000000 0100000000000000 0000000000000000 ffffffffffffff7f 01000000 92100000 00000000 00000000`;
    const requests = [
      `${header('58000000', '1f000000')} ${lock}`, // GETLK
      `${header('58000000', '20000000')} ${lock}`, // SETLK
      `${header('58000000', '21000000')} ${lock}`, // SETLKW
      `${header('38000000', '25000000')} 0000000000000000 00020000 00000000`, // BMAP
      `${header('40000000', '28000000')} 0500000000000000 0100000000000000 00000000 01000000`, // POLL
      `${header('50000000', '30000000')} ${'00'.repeat(40)}`, // SETUPMAPPING
      `${header('2c000000', '31000000')} 00000000`, // REMOVEMAPPING
      `${header('38000000', '00080000')} 0000000000000000 00000000 00000000`, // FSNOTIFY, not agreed on
      `${header('30000000', '01080000')} 00100000 00000000`, // READ_NOTIFY, not agreed on
      header('28000000', '36000000'), // 54, unknown
      header('28000000', '00100000'), // CUSE_INIT
    ];
    for (const bytes of requests) assert.equal(exchange(bytes).toString('hex'), '10000000daffffff0700000000000000');
    assert.deepEqual(fs.taken(), []);
  });

  test('every error is a header alone', () => {
    fs.result = -13;
    assert.equal(exchange(`${header('2c000000', '01000000')} 61626300`).toString('hex'), '10000000f3ffffff0700000000000000');
  });

  test('every opcode of the table was here', () => {
    const missing = OPCODES.filter(({ opcode }) => opcode !== 0 && !covered.has(opcode)).map(({ name }) => name);
    assert.deepEqual(missing, []);
    assert.equal(OPCODES.length - 1, Object.keys(Opcode).length);
  });
});

suite('replies that come later', () => {
  const pending = (bytes: string, readable: number[] = [], writable: number[] = []) => {
    fs.result = PENDING;
    jobs.lastJob = 77;
    assert.equal(guest.send(hex(bytes), 4096, readable, writable).length, 0);
    assert.equal(guest.used, PENDING);
    assert.equal(server.pendingJob, 77);
    fs.taken();
  };

  test('READ', () => {
    pending(`${header('50000000', '0f000000')} 0500000000000000 0010000000000000 00010000 00000000 0000000000000000 00000000 00000000`);
    const reply = guest.complete(77, 5); // the offload thread would have put the 5 bytes there by now
    assert.equal(guest.used, 21);
    assert.deepEqual(fs.taken(), ['completed(77)']);
    assert.equal(reply.toString('hex', 0, 16), '15000000000000000700000000000000');
  });

  test('WRITE, with a reply that lies in single bytes', () => {
    const bytes = `${header('55000000', '10000000')} 0500000000000000 0010000000000000 05000000 00000000 0000000000000000 00000000 00000000 68656c6c6f`;
    pending(bytes, [], new Array(30).fill(1));
    assert.equal(guest.complete(77, 5).toString('hex'), '1800000000000000070000000000000005000000' + '00000000');
  });

  test('FSYNC and its error', () => {
    const bytes = `${header('38000000', '14000000')} 0500000000000000 01000000 00000000`;
    pending(bytes);
    assert.equal(guest.complete(77, 0).toString('hex'), '10000000000000000700000000000000');
    pending(bytes);
    assert.equal(guest.complete(77, -5).toString('hex'), '10000000fbffffff0700000000000000');
  });

  test('COPY_FILE_RANGE_64', () => {
    pending(`${header('60000000', '35000000')} ${'05'.padEnd(16, '0').repeat(6)} 0000000000000000`);
    assert.equal(guest.complete(77, 4096).toString('hex'), '1800000000000000070000000000000000100000' + '00000000');
  });

  test('two at once keep their places', () => {
    fs.result = PENDING;
    const first = new Guest(server);
    jobs.lastJob = 1;
    first.send(hex(`${header('38000000', '14000000')} 0500000000000000 01000000 00000000`));
    jobs.lastJob = 200;
    const second = hex(`${header('48000000', '2b000000')} 0500000000000000 0010000000000000 0000000001000000 01000000 00000000`);
    second.writeUInt32LE(9, 8);
    guest.send(second);
    assert.equal(guest.complete(200, 0).toString('hex'), '10000000000000000900000000000000');
  });
});
