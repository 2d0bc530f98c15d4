/**
 * What no guest kernel sends: each request gets an error reply (or none, where none is possible), the file system hears nothing of
 * it, and nothing is written but the reply.
 */
import assert from 'node:assert/strict';
import { beforeEach, suite, test } from 'node:test';
import fc from 'fast-check';
import { arena, native } from 'vhost-user-ts/native';
import { Errno, Opcode } from '../../src/fuse/abi.js';
import { DEFAULT_SERVER_OPTIONS } from '../../src/fuse/init.js';
import { buildOpcodes, OPCODES, type Operation, operationOf } from '../../src/fuse/opcodes.js';
import { describe, FuseServer, type RequestMetrics } from '../../src/fuse/server.js';
import { FakeFs, Guest, hex, longs, request, string, words } from '../support/fuse-guest.js';

const { EINVAL, EIO, ENAMETOOLONG, ENOENT, ENOSYS, ERANGE, E2BIG, EFBIG, ENXIO } = Errno;
const SECURITY = 1;
const GROUP = 4;

const fs = new FakeFs();
const counted = { requests: 0, malformed: 0, errno: 0, bytes: 0, slot: -1 };
const metrics: RequestMetrics = {
  batch: () => undefined,
  begin: () => ++counted.requests,
  end: (slot, _began, errno, bytes) => Object.assign(counted, { slot, errno, bytes }),
  malformed: () => {
    counted.malformed++;
  },
};
const server = new FuseServer(fs, { ...DEFAULT_SERVER_OPTIONS, securityLabel: 'auto' }, { metrics });
const guest = new Guest(server);

/** FUSE_INIT of a 7.`minor` guest that has every flag but SETXATTR_EXT and DONT_MASK, and these of flags2. */
const init = (minor = 45, flags2 = SECURITY | GROUP) =>
  request(Opcode.INIT, {}, words(7, minor, 0x20000, 0x53ffffbb, flags2), Buffer.alloc(44));

/** The errno of the reply, which must be an error and nothing else. */
function errno(bytes: Buffer, room = 4096): number {
  const reply = guest.send(bytes, room);
  assert.equal(reply.length, 16);
  assert.equal(reply.readUInt32LE(0), 16);
  return -reply.readInt32LE(4);
}

/** Expects an error before the file system was asked. */
function refused(bytes: Buffer, expected: number, room = 4096): void {
  assert.equal(errno(bytes, room), expected, bytes.toString('hex'));
  assert.deepEqual(fs.taken(), []);
}

/** A request that is fine: arguments of zeros, and names. */
function plain(operation: Operation, bytes = operation.bytes): Buffer {
  const names = [operation.first, operation.second].filter((kind) => kind !== 0).map(() => string('a'));
  return request(operation.opcode, {}, Buffer.alloc(bytes), ...names);
}

const answered = OPCODES.filter(({ opcode, noReply }) => opcode !== 0 && !noReply);

beforeEach(() => {
  fs.result = 0;
  fs.data = Buffer.alloc(0);
  fs.directory = [];
  guest.send(init());
  fs.taken();
});

suite('header', () => {
  test('shorter than 40 bytes', () => {
    for (const bytes of [16, 24, 39]) refused(request(Opcode.GETATTR, {}).subarray(0, bytes), EINVAL);
    assert.equal(guest.send(request(Opcode.GETATTR, { unique: 0x1122n << 40n }).subarray(0, 16)).readBigUInt64LE(8), 0x1122n << 40n);
    refused(Buffer.alloc(0), EINVAL);
  });

  test('a length that is not that of the chain', () => {
    for (const len of [0, 1, 39, 40, 47, 49, 57, 0xffffffff]) refused(request(Opcode.GETATTR, { len }, Buffer.alloc(16)), EINVAL);
  });

  test('no room for a header: no reply, and no effect', () => {
    for (const room of [0, 1, 15]) {
      assert.equal(guest.send(request(Opcode.MKDIR, {}, words(0o755, 0), string('a')), room).length, 0);
      assert.equal(guest.used, 0);
    }
    assert.deepEqual(fs.taken(), []);
  });

  test('unknown opcodes', () => {
    for (const opcode of [0, 7, 19, 54, 63, 64, 2047, 2050, 4096, 0x1a000000, 0xffffffff]) refused(request(opcode, {}), ENOSYS);
  });

  test('it is counted as malformed, with its errno', () => {
    const before = counted.malformed;
    refused(request(Opcode.GETATTR, {}), EINVAL);
    assert.equal(counted.malformed, before + 1);
    assert.equal(counted.errno, EINVAL);
    assert.equal(OPCODES[counted.slot]?.name, 'GETATTR');
  });
});

suite('bodies', () => {
  test('arguments that are cut short', () => {
    for (const operation of OPCODES) {
      if (operation.bytes === 0) continue;
      const bytes = plain({ ...operation, first: 0, second: 0 }, operation.bytes - 4);
      if (operation.noReply) assert.equal(guest.send(bytes).length, 0);
      else refused(bytes, EINVAL);
      assert.deepEqual(fs.taken(), [], operation.name);
    }
  });

  test('a reply that does not fit is refused before anything happens', () => {
    for (const operation of answered) {
      if (operation.room === 0) continue;
      refused(plain(operation), EINVAL, 16 + operation.room - 1);
    }
  });

  test('a request cut at every byte', () => {
    const whole = request(Opcode.RENAME2, {}, longs(1, 0), string('from'), string('to'));
    for (let length = 40; length < whole.length; length++) {
      const cut = Buffer.from(whole.subarray(0, length));
      cut.writeUInt32LE(length, 0);
      refused(cut, EINVAL);
    }
  });

  test('in pieces of one byte it is the same request', () => {
    guest.send(request(Opcode.MKDIR, {}, words(0o755, 0o22), string('name')), 200, new Array(60).fill(1), new Array(250).fill(1));
    assert.deepEqual(fs.taken(), ['mkdir(1, "name", 493, 18)']);
    assert.equal(guest.used, 144);
  });

  test('longer than any request', () => {
    refused(request(Opcode.GETATTR, {}, Buffer.alloc(200_000)), E2BIG);
    assert.equal(guest.send(request(Opcode.BATCH_FORGET, {}, words(1, 0), Buffer.alloc(200_000))).length, 0);
  });

  test('numbers above 2^53 are nobody', () => {
    const nodeid = 2n ** 53n + 1n;
    guest.send(request(Opcode.GETATTR, { nodeid }, Buffer.alloc(16)));
    guest.send(request(Opcode.GETATTR, {}, words(1, 0), longs(2n ** 64n - 1n)));
    assert.deepEqual(fs.taken(), [`getattr(${2 ** 53 - 1}, -1, 0, 0)`, `getattr(1, ${2 ** 53 - 1}, 0, 0)`]);
  });

  test('a guest that changes a long request between two looks', () => {
    const gather = native.gather;
    const long = request(Opcode.SETXATTR, {}, words(1000, 0), string('user.a'), Buffer.alloc(1000));
    let looks = 0;
    const changing = (iov: number, count: number, destination: number, max: number): number => {
      const got = gather(iov, count, destination, max);
      if (++looks === 2) change(destination);
      return got;
    };
    let change: (at: number) => void = () => undefined;
    try {
      Object.assign(native, { gather: changing });
      const u32 = (at: number, value: number) => arena.buffer.writeUInt32LE(value, at);
      for (const alter of [
        (at: number) => u32(at, 48), // another length
        (at: number) => u32(at + 4, Opcode.WRITE), // another opcode
        (at: number) => u32(at + 40, 65536), // another size of the value
      ]) {
        looks = 0;
        change = alter;
        refused(long, EINVAL);
        assert.equal(looks, 2);
      }
    } finally {
      Object.assign(native, { gather });
    }
  });
});

suite('names', () => {
  const named = [Opcode.UNLINK, Opcode.RMDIR, Opcode.LOOKUP];

  test('without NUL, with one inside, empty', () => {
    for (const opcode of named) {
      refused(request(opcode, {}), EINVAL);
      refused(request(opcode, {}, Buffer.from('abc')), EINVAL);
      refused(request(opcode, {}, Buffer.from('a\0c\0')), EINVAL);
      refused(request(opcode, {}, Buffer.from('\0')), EINVAL);
    }
  });

  test('slashes', () => {
    for (const name of ['/', '../x', 'a/b', 'a/']) for (const opcode of named) refused(request(opcode, {}, string(name)), EINVAL);
    refused(request(Opcode.RENAME, {}, longs(1), string('a'), string('../b')), EINVAL);
    refused(request(Opcode.LINK, {}, longs(2), string('/a')), EINVAL);
  });

  test('"." and ".." only in LOOKUP', () => {
    for (const name of ['.', '..']) {
      refused(request(Opcode.UNLINK, {}, string(name)), EINVAL);
      refused(request(Opcode.MKDIR, {}, words(0, 0), string(name)), EINVAL);
      refused(request(Opcode.RENAME2, {}, longs(1, 0), string('a'), string(name)), EINVAL);
      guest.send(request(Opcode.LOOKUP, {}, string(name)));
      assert.deepEqual(fs.taken(), [`lookup(1, "${name}")`]);
    }
    guest.send(request(Opcode.UNLINK, {}, string('...')));
    assert.deepEqual(fs.taken(), ['unlink(1, "...")']);
  });

  test('255 bytes are the longest', () => {
    const longest = 'n'.repeat(255);
    guest.send(request(Opcode.RENAME2, {}, longs(1, 0), string(longest), string(longest)));
    assert.deepEqual(fs.taken(), [`rename(1, "${longest}", 1, "${longest}", 0)`]);
    refused(request(Opcode.UNLINK, {}, string(`${longest}n`)), ENAMETOOLONG);
    refused(request(Opcode.RENAME, {}, longs(1), string('a'), string('n'.repeat(4095))), ENAMETOOLONG);
    refused(request(Opcode.UNLINK, {}, Buffer.alloc(100_000, 'n')), ENAMETOOLONG);
  });

  test('targets of links: 1 to 4095 bytes', () => {
    const longest = 't'.repeat(4095);
    guest.send(request(Opcode.SYMLINK, {}, string('a'), string(longest)));
    assert.deepEqual(fs.taken(), [`symlink(1, "a", "${longest}")`]);
    refused(request(Opcode.SYMLINK, {}, string('a'), string(`${longest}t`)), ENAMETOOLONG);
    refused(request(Opcode.SYMLINK, {}, string('a'), string('')), ENOENT);
    refused(request(Opcode.SYMLINK, {}, string('a')), EINVAL);
  });

  test('names of attributes: 1 to 255 bytes', () => {
    refused(request(Opcode.REMOVEXATTR, {}, string('')), ERANGE);
    refused(request(Opcode.REMOVEXATTR, {}, string('x'.repeat(256))), ERANGE);
    guest.send(request(Opcode.REMOVEXATTR, {}, string('user./')));
    assert.deepEqual(fs.taken(), ['removexattr(1, "user./")']);
  });

  test('in logs they are escaped', () => {
    let line = '';
    server.trace = (operation, q) => {
      line = describe(operation, q);
    };
    guest.send(request(Opcode.UNLINK, { nodeid: 5, unique: 2n ** 63n }, Buffer.from('a\n"\xff\x1b[2J\0', 'latin1')));
    server.trace = null;
    fs.taken();
    assert.equal(line, String.raw`UNLINK unique 9223372036854775808 nodeid 5 "a\n\"\xff\u001b[2J"`);
  });
});

suite('sizes inside requests', () => {
  test('READ of more than the buffer', () => {
    const read = (size: number, offset: number | bigint = 0) => request(Opcode.READ, {}, longs(5, offset), words(size, 0, 0, 0, 0, 0));
    refused(read(4081), EINVAL);
    refused(read(0xffffffff), EINVAL);
    refused(read(16, 2n ** 63n), EINVAL);
    refused(read(16), EINVAL, 16);
    assert.deepEqual(fs.taken(), []);
    assert.equal(guest.send(read(16, 2n ** 62n)).length, 16); // behind the end of any file: no bytes, if it is open
    assert.deepEqual(fs.taken(), [`read(1, 5, ${2 ** 53 - 1}, 16)`]);
  });

  test('WRITE of another size than was sent', () => {
    const write = (size: number, bytes: number, offset: number | bigint = 0) =>
      request(Opcode.WRITE, {}, longs(5, offset), words(size, 0, 0, 0, 0, 0), Buffer.alloc(bytes));
    refused(write(6, 5), EINVAL);
    refused(write(4, 5), EINVAL);
    refused(write(0xffffffff, 5), EINVAL);
    refused(write(5, 5, 2n ** 63n), EINVAL);
    refused(write(5, 5, 2n ** 62n), EFBIG);
    refused(write((1 << 20) + 1, (1 << 20) + 1), EINVAL);
    guest.send(write(1 << 20, 1 << 20));
    assert.deepEqual(fs.taken(), ['write(1, 5, 0, 1048576, 0)']);
  });

  test('SETXATTR: the short form, and its size', () => {
    const set = (size: number, value: string) => request(Opcode.SETXATTR, {}, words(size, 0), string('user.a'), Buffer.from(value));
    guest.send(set(3, 'abc'));
    guest.send(set(0, ''));
    assert.deepEqual(fs.taken(), ['setxattr(1, "user.a", "abc", 0, 0)', 'setxattr(1, "user.a", "", 0, 0)']);
    refused(set(4, 'abc'), EINVAL);
    refused(set(2, 'abc'), EINVAL);
    refused(set(0xffffffff, 'abc'), E2BIG);
    const largest = Buffer.alloc(65536, 'v');
    guest.send(request(Opcode.SETXATTR, {}, words(65536, 0), string('user.a'), largest));
    assert.equal(fs.taken()[0]?.length, 65536 + 'setxattr(1, "user.a", "", 0, 0)'.length);
  });

  test('GETXATTR and LISTXATTR of more than the buffer', () => {
    refused(request(Opcode.GETXATTR, {}, words(65536, 0), string('user.a')), EINVAL);
    refused(request(Opcode.LISTXATTR, {}, words(4081, 0)), EINVAL);
    refused(request(Opcode.LISTXATTR, {}, words(0, 0)), EINVAL, 20);
    guest.send(request(Opcode.LISTXATTR, {}, words(0xffffffff, 0)), 16 + 65536);
    assert.deepEqual(fs.taken(), ['listxattr(1, 65536)']);
  });

  test('BATCH_FORGET of more than was sent', () => {
    for (const count of [2, 0x10000000, 0xffffffff]) {
      assert.equal(guest.send(request(Opcode.BATCH_FORGET, {}, words(count, 0), longs(5, 1)), 0).length, 0);
      assert.equal(guest.used, 0);
    }
    assert.deepEqual(fs.taken(), []);
  });

  test('IOCTL', () => {
    const ioctl = (inSize: number, outSize: number, data = '') =>
      request(Opcode.IOCTL, {}, longs(5), words(0, 0x6601), longs(0), words(inSize, outSize), hex(data));
    refused(ioctl(5, 0, '01020304'), EINVAL);
    refused(ioctl(0xffffffff, 0, '01020304'), EINVAL);
    refused(ioctl(0, 4096), EINVAL);
    refused(ioctl(0, 0xffffffff), EINVAL);
  });

  test('READDIR: no entry fits, or not all of them', () => {
    const readdir = (opcode: number, size: number) => request(opcode, {}, longs(5, 0), words(size, 0, 0, 0, 0, 0));
    const entry = { ino: 1n, type: 8, offset: 1n, known: true };
    fs.directory = [
      { ...entry, name: 'a' },
      { ...entry, name: 'n'.repeat(255) },
    ];
    assert.equal(errno(readdir(Opcode.READDIR, 31)), EINVAL);
    assert.equal(guest.send(readdir(Opcode.READDIR, 32)).length, 16 + 32);
    assert.equal(guest.send(readdir(Opcode.READDIR, 4080)).length, 16 + 32 + 280);
    assert.equal(errno(readdir(Opcode.READDIRPLUS, 159)), EINVAL);
    assert.equal(guest.send(readdir(Opcode.READDIRPLUS, 160)).length, 16 + 160);
    fs.directory = [];
    assert.equal(guest.send(readdir(Opcode.READDIR, 31)).length, 16); // the end
    fs.taken();
    refused(readdir(Opcode.READDIR, 4081), EINVAL);
  });

  test('offsets and lengths up to the largest there are', () => {
    const end = 2n ** 63n - 1n;
    const fallocate = (offset: bigint, length: bigint, mode: number) =>
      request(Opcode.FALLOCATE, {}, longs(5, offset, length), words(mode, 0));
    refused(fallocate(0n, end, 0), EFBIG);
    refused(fallocate(end, 1n, 3), EFBIG);
    refused(fallocate(0n, 0n, 0), EINVAL);
    refused(fallocate(2n ** 63n, 1n, 0), EINVAL);
    guest.send(fallocate(4096n, end - 4096n, 3));
    assert.deepEqual(fs.taken(), [`fallocate(1, 5, 4096, ${2 ** 53 - 1 - 4096}, 3)`]);

    const lseek = (offset: bigint, whence: number) => request(Opcode.LSEEK, {}, longs(5, offset), words(whence, 0));
    refused(lseek(end, 3), ENXIO);
    refused(lseek(end, 0), EINVAL);
    guest.send(lseek(-1n, 3));
    assert.deepEqual(fs.taken(), ['lseek(1, 5, -1, 3)']);

    const copy = (from: bigint, to: bigint, length: bigint, flags = 0n) =>
      request(Opcode.COPY_FILE_RANGE, {}, longs(5, from, 1, 6, to, length, flags));
    refused(copy(0n, end, 1n), EFBIG);
    refused(copy(0n, 2n ** 63n, 1n), EINVAL);
    refused(copy(0n, 0n, 1n, 1n), EINVAL);
    assert.equal(guest.send(copy(end, 0n, 1n)).readUInt32LE(16), 0);
    assert.deepEqual(fs.taken(), [`copyFileRange(5, ${2 ** 53 - 1}, 1, 6, 0, 1)`]);
    guest.send(copy(0n, 0n, end));
    assert.deepEqual(fs.taken(), [`copyFileRange(5, 0, 1, 6, 0, ${2 ** 30 - 4096})`]);

    const truncate = (size: bigint) => request(Opcode.SETATTR, {}, words(8, 0), longs(0, size, 0, 0, 0, 0), Buffer.alloc(32));
    refused(truncate(end), EFBIG);
    refused(truncate(2n ** 63n), EINVAL);
  });
});

suite('extensions of create-type requests', () => {
  const mkdir = (extensions: Buffer, totalExtlen = extensions.length / 8) =>
    request(Opcode.MKDIR, { totalExtlen }, words(0o755, 0), string('a'), extensions);
  const group = words(16, 32, 1, 999);
  const context = Buffer.concat([words(32, 1), words(4, 0), Buffer.from('s.x\0ctx\0'), Buffer.alloc(8)]);

  test('both kinds, in both orders, and neither', () => {
    for (const extensions of [Buffer.alloc(0), group, context, Buffer.concat([context, group]), Buffer.concat([group, context])]) {
      guest.send(mkdir(extensions));
      assert.deepEqual(fs.taken(), ['mkdir(1, "a", 493, 0)']);
      assert.equal(fs.caller.supplementaryGid, extensions.includes(group) ? 999 : -1);
      assert.equal(fs.caller.securityContextCount, extensions.includes(context) ? 1 : 0);
    }
    guest.send(mkdir(words(8, 0))); // a header that says "no context"
    assert.equal(fs.caller.securityContexts, 0);
    fs.taken();
  });

  test('they do not stay for the next request', () => {
    guest.send(mkdir(Buffer.concat([context, group])));
    guest.send(request(Opcode.MKDIR, {}, words(0o755, 0), string('a')));
    assert.equal(fs.caller.supplementaryGid, -1);
    assert.equal(fs.caller.securityContexts, 0);
    assert.equal(fs.caller.securityContextCount, 0);
    fs.taken();
  });

  test('a total length that is not theirs', () => {
    refused(mkdir(group, 1), EINVAL);
    refused(mkdir(group, 0), EINVAL);
    refused(mkdir(Buffer.alloc(0), 2), EINVAL);
  });

  test('sizes that contradict each other', () => {
    refused(mkdir(words(0, 32)), EINVAL);
    refused(mkdir(words(7, 32)), EINVAL);
    refused(mkdir(words(24, 32, 1, 999)), EINVAL);
    refused(mkdir(words(0xffffffff, 1)), EINVAL);
    refused(mkdir(words(8, 1)), EINVAL); // one context promised, none there
    refused(mkdir(words(16, 1, 0xffffffff, 0)), EINVAL);
    refused(mkdir(Buffer.concat([words(24, 1, 9, 0), Buffer.from('s\0ctxctx')])), EINVAL); // 9 bytes, 6 there
    refused(mkdir(Buffer.concat([words(24, 1, 0, 0), Buffer.from('no NUL..')])), EINVAL);
  });

  test('twice, unknown, several groups', () => {
    refused(mkdir(Buffer.concat([group, group])), EINVAL);
    refused(mkdir(Buffer.concat([context, context])), EINVAL);
    refused(mkdir(words(8, 33)), EINVAL);
    refused(mkdir(words(24, 32, 2, 1, 2, 0)), EINVAL);
    refused(mkdir(words(16, 32, 0, 0)), EINVAL);
  });

  test('not agreed on', () => {
    guest.send(init(45, GROUP));
    fs.taken();
    refused(mkdir(context), EINVAL);
    guest.send(init(45, SECURITY));
    fs.taken();
    refused(mkdir(group), EINVAL);
    guest.send(init(45, 0));
    fs.taken();
    refused(mkdir(words(8, 0)), EINVAL);
  });

  test('before 7.38 there is no total length', () => {
    guest.send(init(36, SECURITY));
    guest.send(mkdir(context, 0));
    assert.equal(fs.caller.securityContextCount, 1);
  });
});

suite('session', () => {
  test('nothing before INIT', () => {
    const fresh = new Guest(new FuseServer(fs, DEFAULT_SERVER_OPTIONS));
    for (const operation of OPCODES) {
      if (operation.opcode === Opcode.INIT) continue;
      const reply = fresh.send(plain(operation));
      if (operation.noReply) assert.equal(reply.length, 0);
      else assert.equal(reply.readInt32LE(4), -EIO, operation.name);
    }
    assert.deepEqual(fs.taken(), []);
  });

  test('a second INIT is a new session', () => {
    guest.send(init());
    assert.deepEqual(fs.taken(), ['destroy()', 'init()']);
  });

  test('DESTROY ends it, and so does a reset', () => {
    const destroyed = new FuseServer(fs, DEFAULT_SERVER_OPTIONS);
    const other = new Guest(destroyed);
    for (const end of [() => other.send(request(Opcode.DESTROY, {})), () => destroyed.reset()]) {
      other.send(init());
      end();
      assert.deepEqual(fs.taken(), ['init()', 'destroy()']);
      assert.equal(other.send(request(Opcode.STATFS, {})).readInt32LE(4), -EIO);
      destroyed.reset();
      assert.deepEqual(fs.taken(), []);
    }
  });
});

test('the table checks itself', () => {
  const handler = () => 0;
  const row = { opcode: 1, name: 'A', bytes: 0, handler };
  assert.throws(() => buildOpcodes([row, { ...row, name: 'B' }]), /opcode 1 is there twice/);
  assert.throws(() => buildOpcodes([row, { ...row, opcode: 2 }]), /there twice/);
  assert.throws(() => buildOpcodes([{ ...row, name: 'a b' }]), /no label/);
  assert.throws(() => buildOpcodes([{ ...row, bytes: 3 }]), /whole words/);
  assert.throws(() => buildOpcodes([{ ...row, second: 1 }]), /without a first/);
});

suite('random requests', () => {
  const opcode = fc.oneof(fc.constantFrom(...OPCODES.map((operation) => operation.opcode)), fc.nat(64), fc.integer());
  const word = fc.oneof(fc.nat(64), fc.constantFrom(0xffffffff, 0x7fffffff, 0x80000000, 4096, 65536, 65537), fc.integer());
  const body = fc.oneof(
    fc.array(word, { maxLength: 40 }).map((values) => words(...values)),
    fc.uint8Array({ maxLength: 2000 }).map((bytes) => Buffer.from(bytes)),
    fc
      .tuple(fc.array(word, { maxLength: 4 }), fc.array(fc.string({ maxLength: 12 }), { maxLength: 4 }))
      .map(([values, names]) => Buffer.concat([words(...values), ...names.map(string)])),
  );
  const cuts = fc.array(fc.nat(100), { maxLength: 8 });

  test('never throw, never write elsewhere, and always get a well-formed reply', () => {
    fc.assert(
      fc.property(
        opcode,
        body,
        fc.nat(600),
        cuts,
        cuts,
        fc.nat(0xffff),
        fc.constantFrom(31, 36, 38, 45),
        (op, bytes, room, readable, writable, ext, minor) => {
          if (server.session.minor !== minor) guest.send(init(minor));
          const reply = guest.send(request(op, { totalExtlen: ext % 16, unique: 99 }, bytes), room, readable, writable);
          fs.taken();
          assert.equal(reply.length, guest.used);
          if (reply.length === 0) {
            assert.ok(room < 16 || operationOf(op >>> 0).noReply);
            return;
          }
          assert.ok(reply.length >= 16 && reply.length <= room);
          assert.equal(reply.readUInt32LE(0), reply.length);
          assert.equal(reply.readBigUInt64LE(8), 99n);
          const error = reply.readInt32LE(4);
          assert.ok(error <= 0 && error > -4096);
          assert.ok(error === 0 || reply.length === 16);
        },
      ),
      { numRuns: 3000 },
    );
  });

  test('bytes that are no request at all', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), cuts, (bytes, readable) => {
        const reply = guest.send(Buffer.from(bytes), 64, readable);
        fs.taken();
        assert.equal(reply.length, 16);
        assert.ok(reply.readInt32LE(4) < 0);
      }),
      { numRuns: 500 },
    );
  });
});
