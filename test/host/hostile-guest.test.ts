/**
 * A hostile guest against the daemon as it is shipped, in its default sandbox. After each attempt: the reply is an error (or the
 * queue has stopped, with one line in the log and the vring's error descriptor), the next good request is answered, here and on
 * another queue, descriptors and memory are as before, and nothing outside the share has changed.
 */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { Feature, features, type VhostUserFrontend } from 'vhost-user-ts';
import { native } from 'vhost-user-ts/native';
import { DescriptorFlag, describeRegion, MockMemory, type QueueDriver } from 'vhost-user-ts/testing';
import { Opcode } from '../../src/fuse/abi.js';
import { cName, type FuseClient, type Reply, Struct } from '../support/fuse-client.js';
import { assertServes, restartQueue, SECRET, submitFsync, Target } from '../support/hostile.js';

const { E2BIG, EACCES, EBADF, EINVAL, EIO, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOSYS, ENOTDIR, ENOTTY, ENXIO, EFBIG, ERANGE, ESTALE } =
  constants.errno;
const { NEXT, WRITE, INDIRECT } = DescriptorFlag;
const { O_RDWR } = fs.constants;
const MIB = 2 ** 20;
const GIB = 2 ** 30;
/** Two regions that touch, one apart, and one that is larger than 32 bits can say. */
const REGIONS = [
  { guestAddress: 0, size: 256 * MIB },
  { guestAddress: 256 * MIB, size: 64 * MIB },
  { guestAddress: 4 * GIB, size: 16 * MIB },
  { guestAddress: 8 * GIB, size: 10 * GIB },
];
/** Queues: hiprio, two of requests. */
const OTHER = 1;

function session(target: Target, options: Parameters<Target['daemon']['session']>[1] = {}): FuseClient {
  return target.daemon.session({}, { memory: new MockMemory(REGIONS), ...options });
}

/** A GETATTR of the root in guest memory, and room for its reply. */
interface Request {
  readonly at: number;
  readonly length: number;
  readonly out: number;
}

function placeRequest(client: FuseClient, opcode: number = Opcode.GETATTR, body: Uint8Array = Buffer.alloc(16), region = 0): Request {
  const { memory } = client.driver;
  const at = memory.allocate(4096, 4096, region);
  const out = memory.allocate(4096, 4096, region);
  const header = new Struct(40)
    .u32(0, 40 + body.length)
    .u32(4, opcode)
    .u64(8, 77)
    .u64(16, 1).bytes;
  memory.write(at, Buffer.concat([header, body]));
  return { at, length: header.length + body.length, out };
}

function setAvailIndex(queue: QueueDriver, index: number): void {
  queue.setAvailIndex(index);
  queue.forceKick();
}

type RingCase = [what: string, reason: RegExp, attack: (queue: QueueDriver, r: Request, memory: MockMemory) => void];

const direct =
  (...descriptors: [address: number | bigint, length: number, flags: number, next?: number][]) =>
  (queue: QueueDriver): void => {
    for (const [i, [address, length, flags, next]] of descriptors.entries())
      queue.setDescriptor(i, { address, length, flags, next: next ?? i + 1 });
    queue.sendRaw(0);
  };

/** A chain of one indirect descriptor over this table. */
function indirect(
  queue: QueueDriver,
  memory: MockMemory,
  table: Parameters<QueueDriver['writeTable']>[1],
  length = table.length * 16,
  flags: number = INDIRECT,
): void {
  const at = memory.allocate(Math.max(table.length, 1) * 16);
  queue.writeTable(at, table);
  queue.setDescriptor(0, { address: at, length, flags, next: 1 });
  queue.sendRaw(0);
}

const RING: RingCase[] = [
  ['a head beyond the table', /beyond the queue size/, (queue) => queue.sendRaw(queue.size)],
  ['a head of 65535', /beyond the queue size/, (queue) => queue.sendRaw(0xffff)],
  ['a descriptor that follows itself', /loops/, (queue, { at }) => direct([at, 40, NEXT, 0])(queue)],
  ['two that follow each other', /loops/, (queue, { at }) => direct([at, 20, NEXT, 1], [at, 20, NEXT, 0])(queue)],
  ['"next" beyond the table', /"next" beyond/, (queue, { at }) => direct([at, 40, NEXT, 40000])(queue)],
  ['an address in no region', /outside guest memory/, direct([2 * GIB, 40, 0])],
  ['an address behind the last region', /outside guest memory/, direct([1n << 60n, 40, 0])],
  ['an address of 64 ones', /outside guest memory/, direct([2n ** 64n - 1n, 40, 0])],
  ['a buffer that wraps 2^64', /outside guest memory/, direct([2n ** 64n - 4096n, 8192, WRITE])],
  ['a buffer that ends behind its region', /outside guest memory/, direct([320 * MIB - 20, 40, 0])],
  ['a buffer in two regions with a gap between', /outside guest memory/, direct([4 * GIB + 16 * MIB - 8, 40, 0])],
  ['a length of 2^32 - 1', /outside guest memory/, direct([0, 0xffffffff, 0])],
  ['more than 4 GiB in one chain', /more than 4 GiB/, direct([8 * GIB, 0xffffffff, NEXT], [8 * GIB, 0xffffffff, 0])],
  ['readable after writable', /readable descriptor after/, (queue, { at, out }) => direct([out, 120, WRITE | NEXT], [at, 56, 0])(queue)],
  [
    'a writable indirect table',
    /marked writable/,
    (queue, { at }, memory) => indirect(queue, memory, [{ address: at, length: 40 }], 16, INDIRECT | WRITE),
  ],
  [
    'an indirect descriptor with "next"',
    /with "next"/,
    (queue, { at }, memory) => indirect(queue, memory, [{ address: at, length: 40 }], 16, INDIRECT | NEXT),
  ],
  [
    'indirect in indirect',
    /inside an indirect table/,
    (queue, { at }, memory) => indirect(queue, memory, [{ address: at, length: 16, flags: INDIRECT }]),
  ],
  ['an empty indirect table', /empty or too large/, (queue, _r, memory) => indirect(queue, memory, [], 0)],
  [
    'an indirect table of 15 bytes',
    /multiple of 16/,
    (queue, { at }, memory) => indirect(queue, memory, [{ address: at, length: 40 }], 15),
  ],
  [
    'an indirect table of 17 bytes',
    /multiple of 16/,
    (queue, { at }, memory) => indirect(queue, memory, [{ address: at, length: 40 }], 17),
  ],
  [
    'an indirect table of 4 GiB',
    /too large/,
    (queue, { at }, memory) => indirect(queue, memory, [{ address: at, length: 40 }], 0xfffffff0),
  ],
  ['an indirect table in no region', /outside guest memory/, direct([2 * GIB, 16, INDIRECT])],
  ['an indirect table that ends behind its region', /outside guest memory/, direct([320 * MIB - 16, 32, INDIRECT])],
  [
    'a loop in an indirect table',
    /loops/,
    (queue, { at }, memory) => indirect(queue, memory, [{ address: at, length: 4, flags: NEXT, next: 0 }]),
  ],
  [
    '"next" beyond an indirect table',
    /"next" beyond/,
    (queue, { at }, memory) => indirect(queue, memory, [{ address: at, length: 4, flags: NEXT, next: 1 }]),
  ],
  ['avail.idx one more than the ring holds', /avail index jumps/, (queue) => setAvailIndex(queue, queue.deviceUsedIndex + queue.size + 1)],
  ['avail.idx half way round', /avail index jumps/, (queue) => setAvailIndex(queue, queue.deviceUsedIndex + 0x8000)],
  ['avail.idx one back', /avail index jumps/, (queue) => setAvailIndex(queue, queue.deviceUsedIndex - 1)],
];

/** Rings that are wrong in ways that have no reply: chains come back empty, or the ring is garbage, and the device goes on. */
const ODD: [what: string, attack: (queue: QueueDriver, r: Request, memory: MockMemory) => void][] = [
  ['no room for a reply', (queue, { at, length }) => direct([at, length, 0])(queue)],
  ['one byte of room for a reply', (queue, { at, length, out }) => direct([at, length, NEXT], [out, 1, WRITE])(queue)],
  ['only room, no request', (queue, { out }) => direct([out, 4096, WRITE])(queue)],
  [
    'segments of no bytes, wherever they point',
    (queue, { at, length, out }) =>
      direct([1n << 62n, 0, NEXT], [at, length, NEXT], [2n ** 64n - 1n, 0, NEXT], [out, 120, WRITE | NEXT], [3 * GIB, 0, WRITE])(queue),
  ],
  ['nothing but a segment of no bytes', direct([0, 0, 0])],
  [
    'a request across two regions that touch',
    (queue, _r, memory) => {
      const bytes = new Struct(56).u32(0, 56).u32(4, Opcode.GETATTR).u64(8, 1).u64(16, 1).bytes;
      memory.write(256 * MIB - 20, bytes.subarray(0, 20));
      memory.write(256 * MIB, bytes.subarray(20));
      direct([256 * MIB - 20, 56, NEXT], [256 * MIB + 4096, 200, WRITE])(queue);
    },
  ],
  ['the reply over its own request', (queue, { at, length }) => direct([at, length, NEXT], [at, 4096, WRITE])(queue)],
  ['the reply over the descriptor table', (queue, { at, length }) => direct([at, length, NEXT], [queue.descriptors, 120, WRITE])(queue)],
  ['the reply over the avail ring', (queue, { at, length }) => direct([at, length, NEXT], [queue.avail, 120, WRITE])(queue)],
  ['the reply over the used ring', (queue, { at, length }) => direct([at, length, NEXT], [queue.used, 120, WRITE])(queue)],
  ['the used ring as a request', (queue, { out }) => direct([queue.used, 120, NEXT], [out, 120, WRITE])(queue)],
  [
    'the same head as often as the ring is long',
    (queue, { at, length, out }) => {
      queue.setDescriptor(0, { address: at, length, flags: NEXT, next: 1 });
      queue.setDescriptor(1, { address: out, length: 4096, flags: WRITE });
      for (let i = 0; i < queue.size; i++) queue.offer(0);
      queue.publish();
      queue.forceKick();
    },
  ],
];

/** Waits until the device has returned as much as was offered, or reported an error. */
async function settled(queue: QueueDriver): Promise<void> {
  const end = performance.now() + 1000;
  for (let last = -1; performance.now() < end; await sleep(2)) {
    const now = queue.deviceUsedIndex;
    if (now === last && now !== 0) return;
    last = now;
  }
}

describe('rings', () => {
  for (const eventIdx of [true, false]) {
    test(`each one that breaks the rules stops, and only it (${eventIdx ? 'EVENT_IDX' : 'flags'})`, { timeout: 120_000 }, async () => {
      // Of one kind of line ten a minute are written: a daemon for each nine cases.
      for (let from = 0; from < RING.length; from += 9) {
        await using target = await Target.start();
        const client = session(target, eventIdx ? {} : { features: ~features(0, Feature.LOG_ALL, Feature.EVENT_IDX) });
        const queue = client.driver.queues[1] as QueueDriver;
        assert.equal(queue.eventIdx, eventIdx);
        assertServes(client, [0, OTHER]);
        const baseline = await target.descriptors();
        const { memory } = target.daemon;
        for (const [what, reason, attack] of RING.slice(from, from + 9)) {
          const before = target.warnings().length;
          attack(queue, placeRequest(client), client.driver.memory);
          await target.daemon.until(() => queue.takeErrors() > 0);
          await target.daemon.until(() => target.warnings().length > before);
          const lines = target.warnings().slice(before);
          assert.equal(lines.length, 1, what);
          assert.match(lines[0] as string, /ERROR queue 1 stopped: /, what);
          assert.match(lines[0] as string, reason, what);
          // Kicks of a stopped queue change nothing, and nobody is told again.
          for (let i = 0; i < 10; i++) queue.forceKick();
          assertServes(client, [OTHER]);
          assert.equal(queue.takeErrors(), 0, what);
          restartQueue(client, 1);
          assertServes(client, [0, OTHER]);
          assert.equal(target.warnings().length, before + 1, what);
          assert.equal(await target.descriptors(baseline), baseline, what);
          target.assertMemory(memory);
        }
        client.close();
      }
    });
  }

  test('indirect descriptors that were not negotiated', async () => {
    await using target = await Target.start();
    const client = session(target, { features: ~features(0, Feature.LOG_ALL, Feature.INDIRECT_DESC) });
    const queue = client.driver.queues[1] as QueueDriver;
    indirect(queue, client.driver.memory, [{ address: 4096, length: 40 }]);
    await target.daemon.until(() => queue.takeErrors() > 0);
    assert.match(target.daemon.log, /without VIRTIO_F_INDIRECT_DESC/);
    restartQueue(client, 1);
    assertServes(client, [0, OTHER]);
  });

  test('what is only odd is served or comes back empty', { timeout: 60_000 }, async () => {
    await using target = await Target.start();
    const client = session(target);
    const queue = client.driver.queues[1] as QueueDriver;
    assertServes(client, [0, OTHER]);
    const baseline = await target.descriptors();
    const memory = target.daemon.memory;
    for (const [what, attack] of ODD) {
      attack(queue, placeRequest(client), client.driver.memory);
      await settled(queue);
      assertServes(client, [OTHER]);
      restartQueue(client, 1);
      assertServes(client, [0, OTHER]);
      assert.equal(await target.descriptors(baseline), baseline, what);
    }
    target.assertMemory(memory);
    assert.ok(target.warnings().length <= ODD.length);
  });

  test('a reset of the whole device heals, too', async () => {
    await using target = await Target.start();
    const client = session(target);
    const { driver } = client;
    for (const queue of driver.queues) queue.sendRaw(0xffff);
    await target.daemon.until(() => driver.queues.every((queue) => queue.takeErrors() > 0 || queue.index === 0 || true));
    driver.frontend.resetDevice();
    driver.setFeatures();
    for (const queue of driver.queues) {
      client.dropInFlight(queue);
      queue.reset();
      driver.placeQueue(queue);
      driver.frontend.setVringKick(queue.index, queue.kickFd);
      driver.frontend.setVringEnable(queue.index, true);
    }
    client.init();
    assertServes(client, [0, OTHER]);
  });

  test('a storm of bad rings logs a bounded number of lines', { timeout: 60_000 }, async () => {
    await using target = await Target.start();
    const client = session(target);
    const queue = client.driver.queues[1] as QueueDriver;
    const memory = target.daemon.memory;
    for (let i = 0; i < 500; i++) {
      queue.sendRaw(0xffff);
      restartQueue(client, 1);
    }
    assertServes(client, [0, OTHER]);
    assert.ok(target.warnings().length <= 12, `${target.warnings().length} lines`);
    target.assertMemory(memory);
  });
});

// --- requests ---

const u32s = (...values: number[]): Buffer => {
  const bytes = Buffer.alloc(values.length * 4);
  for (const [i, value] of values.entries()) bytes.writeUInt32LE(value >>> 0, i * 4);
  return bytes;
};
const u64s = (...values: (number | bigint)[]): Buffer => {
  const bytes = Buffer.alloc(values.length * 8);
  for (const [i, value] of values.entries()) bytes.writeBigUInt64LE(BigInt.asUintN(64, BigInt(value)), i * 8);
  return bytes;
};
const bytes = (text: string): Buffer => Buffer.from(text, 'latin1');

/** What the guest has: nodeids and handles of each kind, some of them gone. */
interface Known {
  file: number;
  dir: number;
  link: number;
  fh: number;
  dirFh: number;
  forgotten: number;
  released: number;
}

function know(client: FuseClient): Known {
  const file = client.lookup(1, 'file').nodeid;
  const dir = client.lookup(1, 'dir').nodeid;
  const link = client.lookup(1, 'link').nodeid;
  const forgotten = client.lookup(dir, 'inner').nodeid;
  client.forget(forgotten);
  const { fh: released } = client.open(file, O_RDWR);
  client.release(file, released);
  return { file, dir, link, forgotten, released, fh: client.open(file, O_RDWR).fh, dirFh: client.opendir(dir).fh };
}

type RequestCase = [what: string, errno: number | readonly number[], send: (client: FuseClient, k: Known) => Reply];

const call =
  (opcode: number, nodeid: number | bigint, body: readonly Uint8Array[], size = 4096, header = {}) =>
  (client: FuseClient) =>
    client.call(opcode, nodeid, body, size, header);
/** Bytes that are no request: their reply, if any. */
const raw =
  (content: Uint8Array, room = 4096) =>
  (client: FuseClient) =>
    client.wait(client.submitBytes(content, room));
const header = (length: number, opcode: number, nodeid = 1): Buffer =>
  new Struct(40).u32(0, length).u32(4, opcode).u64(8, 0x77).u64(16, nodeid).bytes;

const NAMED: [name: string, opcode: number, before: Buffer][] = [
  ['LOOKUP', Opcode.LOOKUP, Buffer.alloc(0)],
  ['UNLINK', Opcode.UNLINK, Buffer.alloc(0)],
  ['RMDIR', Opcode.RMDIR, Buffer.alloc(0)],
  ['MKDIR', Opcode.MKDIR, u32s(0o755, 0)],
  ['MKNOD', Opcode.MKNOD, u32s(0o100644, 0, 0, 0)],
  ['CREATE', Opcode.CREATE, u32s(0o102, 0o644, 0, 0)],
  ['LINK', Opcode.LINK, u64s(1)],
];
const NAMES: [what: string, name: Buffer, errno: number][] = [
  ['without NUL', bytes('name'), EINVAL],
  ['with a NUL inside', bytes('na\0me\0'), EINVAL],
  ['empty', bytes('\0'), EINVAL],
  ['no name at all', Buffer.alloc(0), EINVAL],
  ['"/"', bytes('/\0'), EINVAL],
  ['"../outside/made"', bytes('../outside/made\0'), EINVAL],
  ['"/etc/passwd"', bytes('/etc/passwd\0'), EINVAL],
  ['"dir/inner"', bytes('dir/inner\0'), EINVAL],
  ['256 bytes', bytes(`${'n'.repeat(256)}\0`), ENAMETOOLONG],
  ['4096 bytes', bytes(`${'n'.repeat(4096)}\0`), ENAMETOOLONG],
  ['60 000 bytes without NUL', Buffer.alloc(60_000, 'n'), ENAMETOOLONG],
];
/** Opcodes with a handle, as bodies that carry this fh. */
const HANDLED: [name: string, opcode: number, body: (fh: number | bigint) => Buffer][] = [
  ['READ', Opcode.READ, (fh) => Buffer.concat([u64s(fh, 0), u32s(16, 0, 0, 0, 0, 0)])],
  ['WRITE', Opcode.WRITE, (fh) => Buffer.concat([u64s(fh, 0), u32s(4, 0, 0, 0, 0, 0), bytes('evil')])],
  ['READDIR', Opcode.READDIR, (fh) => Buffer.concat([u64s(fh, 0), u32s(1024, 0, 0, 0, 0, 0)])],
  ['READDIRPLUS', Opcode.READDIRPLUS, (fh) => Buffer.concat([u64s(fh, 0), u32s(1024, 0, 0, 0, 0, 0)])],
  ['RELEASE', Opcode.RELEASE, (fh) => Buffer.concat([u64s(fh), u32s(0, 0), u64s(0)])],
  ['RELEASEDIR', Opcode.RELEASEDIR, (fh) => Buffer.concat([u64s(fh), u32s(0, 0), u64s(0)])],
  ['FLUSH', Opcode.FLUSH, (fh) => Buffer.concat([u64s(fh), u32s(0, 0), u64s(0)])],
  ['FSYNC', Opcode.FSYNC, (fh) => Buffer.concat([u64s(fh), u32s(0, 0)])],
  ['FSYNCDIR', Opcode.FSYNCDIR, (fh) => Buffer.concat([u64s(fh), u32s(0, 0)])],
  ['FALLOCATE', Opcode.FALLOCATE, (fh) => Buffer.concat([u64s(fh, 0, 4096), u32s(0, 0)])],
  ['LSEEK', Opcode.LSEEK, (fh) => Buffer.concat([u64s(fh, 0), u32s(0, 0)])],
  ['IOCTL', Opcode.IOCTL, (fh) => Buffer.concat([u64s(fh), u32s(0, 0x80086601), u64s(0), u32s(0, 8)])],
  ['COPY_FILE_RANGE', Opcode.COPY_FILE_RANGE, (fh) => u64s(fh, 0, 1, fh, 0, 100, 0)],
];
const FHS: [what: string, fh: bigint][] = [
  ['0', 0n],
  ['1', 1n],
  ['12345', 12345n],
  ['2^31', 2n ** 31n],
  ['2^53 - 1', 2n ** 53n - 1n],
  ['2^63', 2n ** 63n],
  ['2^64 - 1', 2n ** 64n - 1n],
];
/** Opcodes that need nothing but a nodeid, with what they say of a nodeid that is none. */
const NODED: [name: string, opcode: number, body: Buffer[]][] = [
  ['GETATTR', Opcode.GETATTR, [Buffer.alloc(16)]],
  ['SETATTR', Opcode.SETATTR, [Buffer.concat([u32s(1, 0), Buffer.alloc(80)])]],
  ['LOOKUP', Opcode.LOOKUP, [cName('file')]],
  ['OPEN', Opcode.OPEN, [u32s(2, 0)]],
  ['OPENDIR', Opcode.OPENDIR, [u32s(0, 0)]],
  ['READLINK', Opcode.READLINK, []],
  ['STATFS', Opcode.STATFS, []],
  ['ACCESS', Opcode.ACCESS, [u32s(4, 0)]],
  ['MKDIR', Opcode.MKDIR, [u32s(0o755, 0), cName('made')]],
  ['SYMLINK', Opcode.SYMLINK, [cName('made'), cName('target')]],
  ['UNLINK', Opcode.UNLINK, [cName('file')]],
  ['SYNCFS', Opcode.SYNCFS, [Buffer.alloc(8)]],
];
const NODEIDS: [what: string, nodeid: bigint][] = [
  ['0', 0n],
  ['2', 2n],
  ['9999', 9999n],
  ['2^24 + 1', 2n ** 24n + 1n],
  ['2^53 - 1', 2n ** 53n - 1n],
  ['2^63', 2n ** 63n],
  ['2^64 - 1', 2n ** 64n - 1n],
];

const REQUESTS: RequestCase[] = [
  // headers
  ['a request of 0 bytes', EINVAL, raw(Buffer.alloc(1))],
  ['a header of 39 bytes', EINVAL, raw(header(39, Opcode.STATFS).subarray(0, 39))],
  ['header.len 0', EINVAL, raw(header(0, Opcode.STATFS))],
  ['header.len of one byte less', EINVAL, raw(header(39, Opcode.STATFS))],
  ['header.len of one byte more', EINVAL, raw(header(41, Opcode.STATFS))],
  ['header.len 2^32 - 1', EINVAL, raw(header(0xffffffff, Opcode.STATFS))],
  ['200 000 bytes of GETATTR', E2BIG, raw(Buffer.concat([header(200_040, Opcode.GETATTR), Buffer.alloc(200_000)]))],
  ...[0, 7, 19, 55, 63, 64, 2047, 4095, 4096, 0x1a000000, 0xffffffff].map(
    (opcode): RequestCase => [`opcode ${opcode}`, [ENOSYS, EINVAL], (client) => client.call(opcode, 1, [], 4096)],
  ),
  ['NOTIFY_REPLY, which has no reply', 0, call(Opcode.NOTIFY_REPLY, 1, [Buffer.alloc(64)])],
  ['CUSE_INIT', ENOSYS, raw(header(40, 4096))],
  // names
  ...NAMED.flatMap(([operation, opcode, before]) =>
    NAMES.map(([what, name, errno]): RequestCase => [`${operation}: a name ${what}`, errno, call(opcode, 1, [before, name])]),
  ),
  ...['.', '..'].flatMap((name): RequestCase[] =>
    NAMED.filter(([operation]) => operation !== 'LOOKUP').map(([operation, opcode, before]) => [
      `${operation} "${name}"`,
      EINVAL,
      call(opcode, 1, [before, cName(name)]),
    ]),
  ),
  ['RENAME to "../outside/secret"', EINVAL, call(Opcode.RENAME, 1, [u64s(1), cName('file'), cName('../outside/secret')])],
  ['RENAME of ".."', EINVAL, call(Opcode.RENAME, 1, [u64s(1), cName('..'), cName('new')])],
  ['RENAME2 with one name', EINVAL, call(Opcode.RENAME2, 1, [u64s(1, 0), cName('file')])],
  ['RENAME2 with flags of 2^32 - 1', EINVAL, call(Opcode.RENAME2, 1, [u64s(1), u32s(0xffffffff, 0), cName('file'), cName('new')])],
  ['SYMLINK with a target of 4096 bytes', ENAMETOOLONG, call(Opcode.SYMLINK, 1, [cName('new'), cName('t'.repeat(4096))])],
  ['SYMLINK without a target', EINVAL, call(Opcode.SYMLINK, 1, [cName('new')])],
  ['LOOKUP below a link that leads out', ENOTDIR, (client, k) => client.call(Opcode.LOOKUP, k.link, [cName('secret')], 4096)],
  ['OPEN of a link that leads out', ELOOP, (client, k) => client.call(Opcode.OPEN, k.link, [u32s(0, 0)], 16)],
  ['OPEN of a directory', EISDIR, (client, k) => client.call(Opcode.OPEN, k.dir, [u32s(0, 0)], 16)],
  ['OPENDIR of a file', ENOTDIR, (client, k) => client.call(Opcode.OPENDIR, k.file, [u32s(0, 0)], 16)],
  // nodeids and handles
  ...NODED.flatMap(([operation, opcode, body]) =>
    NODEIDS.map(([what, nodeid]): RequestCase => [`${operation}: nodeid ${what}`, [ENOENT, ESTALE], call(opcode, nodeid, body)]),
  ),
  ...NODED.map(
    ([operation, opcode, body]): RequestCase => [
      `${operation} after FORGET`,
      [ENOENT, ESTALE],
      (client, k) => client.call(opcode, k.forgotten, body, 4096),
    ],
  ),
  ...HANDLED.flatMap(([operation, opcode, body]) => [
    ...FHS.map(
      ([what, fh]): RequestCase => [
        `${operation}: fh ${what}`,
        [EBADF, EINVAL],
        (client, k) => client.call(opcode, k.file, [body(fh)], 4096),
      ],
    ),
    [
      `${operation} after RELEASE`,
      EBADF,
      (client: FuseClient, k: Known) => client.call(opcode, k.file, [body(k.released)], 4096),
    ] as RequestCase,
    [
      `${operation}: fh of another inode`,
      operation === 'COPY_FILE_RANGE' ? EBADF : [EBADF, ENOTTY],
      (client: FuseClient, k: Known) =>
        client.call(
          opcode,
          operation.endsWith('DIR') || operation === 'READDIRPLUS' ? k.file : k.dir,
          [body(operation.includes('DIR') ? k.dirFh : k.fh)],
          4096,
        ),
    ] as RequestCase,
    [
      `${operation}: fh of another kind`,
      operation === 'IOCTL' ? [0, ENOTTY] : operation === 'FLUSH' ? 0 : EBADF,
      (client: FuseClient, k: Known) => {
        const directory = operation.includes('DIR');
        return client.call(opcode, directory ? k.file : k.dir, [body(directory ? k.fh : k.dirFh)], 4096);
      },
    ] as RequestCase,
  ]),
  // sizes
  [
    'READ of 2^32 - 1 bytes',
    EINVAL,
    (client, k) => client.call(Opcode.READ, k.file, [Buffer.concat([u64s(k.fh, 0), u32s(0xffffffff, 0, 0, 0, 0, 0)])], 4096),
  ],
  [
    'READ of one byte more than there is room',
    EINVAL,
    (client, k) => client.call(Opcode.READ, k.file, [Buffer.concat([u64s(k.fh, 0), u32s(4097, 0, 0, 0, 0, 0)])], 4096),
  ],
  [
    'READ at 2^63',
    EINVAL,
    (client, k) => client.call(Opcode.READ, k.file, [Buffer.concat([u64s(k.fh, 2n ** 63n), u32s(16, 0, 0, 0, 0, 0)])], 4096),
  ],
  [
    'WRITE of more than was sent',
    EINVAL,
    (client, k) => client.call(Opcode.WRITE, k.file, [Buffer.concat([u64s(k.fh, 0), u32s(5000, 0, 0, 0, 0, 0), bytes('evil')])], 8),
  ],
  [
    'WRITE at 2^62',
    EFBIG,
    (client, k) => client.call(Opcode.WRITE, k.file, [Buffer.concat([u64s(k.fh, 2n ** 62n), u32s(4, 0, 0, 0, 0, 0), bytes('evil')])], 8),
  ],
  [
    'WRITE at 2^64 - 1',
    EINVAL,
    (client, k) =>
      client.call(Opcode.WRITE, k.file, [Buffer.concat([u64s(k.fh, 2n ** 64n - 1n), u32s(4, 0, 0, 0, 0, 0), bytes('evil')])], 8),
  ],
  [
    'READDIR at an offset that no entry has',
    0,
    (client, k) => client.call(Opcode.READDIR, k.dir, [Buffer.concat([u64s(k.dirFh, 0x1234567890n), u32s(4096, 0, 0, 0, 0, 0)])], 4096),
  ],
  [
    'READDIR at 2^64 - 1',
    [0, EINVAL],
    (client, k) => client.call(Opcode.READDIR, k.dir, [Buffer.concat([u64s(k.dirFh, 2n ** 64n - 1n), u32s(4096, 0, 0, 0, 0, 0)])], 4096),
  ],
  [
    'READDIR of 2^32 - 1 bytes',
    EINVAL,
    (client, k) => client.call(Opcode.READDIR, k.dir, [Buffer.concat([u64s(k.dirFh, 0), u32s(0xffffffff, 0, 0, 0, 0, 0)])], 4096),
  ],
  ['SETXATTR of 2^32 - 1 bytes', [E2BIG, ENOSYS], call(Opcode.SETXATTR, 1, [u32s(0xffffffff, 0), cName('user.a'), bytes('v')])],
  ['SETXATTR of more than was sent', [EINVAL, ENOSYS], call(Opcode.SETXATTR, 1, [u32s(100, 0), cName('user.a'), bytes('v')])],
  ['SETXATTR with less size than was sent', [EINVAL, ENOSYS], call(Opcode.SETXATTR, 1, [u32s(1, 0), cName('user.a'), bytes('vvvv')])],
  [
    'SETXATTR with a name of 256 bytes',
    [ERANGE, ENOSYS],
    call(Opcode.SETXATTR, 1, [u32s(1, 0), cName('user.'.padEnd(256, 'a')), bytes('v')]),
  ],
  ['GETXATTR of 2^32 - 1 bytes', [EINVAL, ENOSYS], call(Opcode.GETXATTR, 1, [u32s(0xffffffff, 0), cName('user.a')])],
  ['LISTXATTR of 2^32 - 1 bytes', [EINVAL, ENOSYS], call(Opcode.LISTXATTR, 1, [u32s(0xffffffff, 0)])],
  [
    'FALLOCATE beyond 2^63',
    [EINVAL, EFBIG],
    (client, k) => client.call(Opcode.FALLOCATE, k.file, [Buffer.concat([u64s(k.fh, 2n ** 63n - 1n, 2n ** 63n - 1n), u32s(0, 0)])], 0),
  ],
  [
    'LSEEK with whence 77',
    [EINVAL, ENXIO],
    (client, k) => client.call(Opcode.LSEEK, k.file, [Buffer.concat([u64s(k.fh, 0), u32s(77, 0)])], 8),
  ],
  [
    'COPY_FILE_RANGE with flags',
    EINVAL,
    (client, k) => client.call(Opcode.COPY_FILE_RANGE, k.file, [u64s(k.fh, 0, k.file, k.fh, 0, 1, 99)], 8),
  ],
  [
    'IOCTL in_size of 2^32 - 1',
    EINVAL,
    (client, k) => client.call(Opcode.IOCTL, k.file, [Buffer.concat([u64s(k.fh), u32s(0, 0x6601), u64s(0), u32s(0xffffffff, 0)])], 4096),
  ],
  [
    'IOCTL out_size of 2^32 - 1',
    EINVAL,
    (client, k) => client.call(Opcode.IOCTL, k.file, [Buffer.concat([u64s(k.fh), u32s(0, 0x6601), u64s(0), u32s(0, 0xffffffff)])], 4096),
  ],
  ['BMAP', ENOSYS, call(Opcode.BMAP, 1, [Buffer.alloc(16)])],
  ['POLL', ENOSYS, call(Opcode.POLL, 1, [Buffer.alloc(24)])],
  [
    'extensions that end behind the request',
    EINVAL,
    (client) => client.call(Opcode.MKDIR, 1, [u32s(0o755, 0), cName('made')], 4096, { extensionWords: 8000 }),
  ],
  ['INIT of a version before 7', [EIO, constants.errno.EPROTO], (client) => client.call(Opcode.INIT, 0, [u32s(6, 0, 0, 0)], 64)],
];

/** Requests that are no use to ask for an error before INIT. */
const NO_ERROR: number[] = [Opcode.INIT, Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY];

describe('requests', () => {
  test(`each of ${REQUESTS.length} malformed ones gets its error, and nothing has happened`, { timeout: 180_000 }, async () => {
    await using target = await Target.start(['--xattr']);
    const { daemon } = target;
    const client = session(target);
    const k = know(client);
    // INIT of another version ends the session: last, so that what is known stays known.
    const tree = fs.readdirSync(daemon.share, { recursive: true }).sort();
    const baseline = await target.descriptors();
    const memory = daemon.memory;
    const wrong: string[] = [];
    for (const [what, expected, send] of REQUESTS) {
      const reply = send(client, k);
      const allowed = typeof expected === 'number' ? [expected] : expected;
      if (!allowed.includes(-reply.error)) wrong.push(`${what}: errno ${-reply.error} instead of ${allowed}`);
      if (reply.error !== 0) assert.equal(reply.body.length, 0, what);
      assert.doesNotMatch(reply.body.toString('latin1'), new RegExp(SECRET), what);
      if (what.startsWith('INIT')) client.init();
      assertServes(client, [0, OTHER]);
      assert.equal(await target.descriptors(baseline), what.startsWith('INIT') ? await target.descriptors() : baseline, what);
    }
    assert.deepEqual(wrong, []);
    assert.deepEqual(fs.readdirSync(daemon.share, { recursive: true }).sort(), tree);
    assert.equal(fs.readFileSync(join(daemon.share, 'file'), 'utf8'), 'content');
    target.assertMemory(memory);
    assert.ok(target.warnings().length <= 10, target.warnings().join('\n'));
  });

  test('forgetting what one does not have, more than one has, and the root', async () => {
    await using target = await Target.start();
    const client = session(target);
    const { nodeid } = client.lookup(1, 'file');
    client.forget(1, 2n ** 64n - 1n);
    client.forget(999_999, 5);
    client.forget(nodeid, 2n ** 64n - 1n);
    client.forget(nodeid);
    client.batchForget(Array.from({ length: 500 }, (_, i) => ({ nodeid: i, nlookup: 2n ** 64n - 1n })));
    for (const count of [0, 1, 100, 0xffffffff]) client.oneWay(Opcode.BATCH_FORGET, 0, [u32s(count, 0)]);
    client.oneWay(Opcode.FORGET, 0, []);
    client.oneWay(Opcode.INTERRUPT, 0, [u64s(2n ** 64n - 1n)]);
    client.oneWay(Opcode.INTERRUPT, 0, []);
    assertServes(client, [0, OTHER]);
    assert.ok(client.lookup(1, 'file').nodeid !== nodeid);
  });

  test('requests before INIT, INIT twice, requests after DESTROY', async () => {
    await using target = await Target.start();
    const client = target.daemon.connect({ memory: new MockMemory(REGIONS) });
    const baseline = await target.descriptors();
    for (const opcode of Object.values(Opcode).filter((code) => !NO_ERROR.includes(code))) {
      const { error } = client.call(opcode, 1, [Buffer.alloc(128)], 4096);
      assert.ok(error < 0, `opcode ${opcode} before INIT`);
    }
    client.forget(5);
    for (let i = 0; i < 50; i++) {
      client.init();
      const { nodeid } = client.lookup(1, 'file');
      client.open(nodeid, O_RDWR);
      client.opendir(1);
    }
    client.init();
    assertServes(client, [0, OTHER]);
    client.destroy();
    assert.equal(-client.call(Opcode.GETATTR, 1, [Buffer.alloc(16)], 128).error, EIO);
    assert.ok((await target.descriptors(baseline)) <= baseline + 1);
    client.init();
    assertServes(client);
  });

  test('devices, FIFOs and sockets are made and never opened', async () => {
    await using target = await Target.start();
    const client = session(target);
    for (const [name, mode, rdev] of [
      ['fifo', 0o010666, 0],
      ['socket', 0o140666, 0],
      ['null', 0o020666, 0x103],
      ['disk', 0o060666, 0x801],
    ] as const) {
      const { error, body } = client.call(Opcode.MKNOD, 1, [u32s(mode, rdev, 0, 0), cName(name)], 128);
      if (error !== 0) continue; // an ordinary user may not make devices
      const nodeid = body.readBigUInt64LE(0);
      for (const flags of [0, 1, 2]) assert.equal(-client.call(Opcode.OPEN, nodeid, [u32s(flags, 0)], 16).error, EACCES, name);
    }
    assertServes(client);
  });

  test('guest memory rewritten by another thread while requests are served', { timeout: 120_000 }, async () => {
    await using target = await Target.start();
    const { daemon } = target;
    const client = session(target);
    const { driver } = client;
    const { memory } = driver;
    const queue = driver.queues[1] as QueueDriver;
    const requests = [
      placeRequest(client),
      placeRequest(client, Opcode.LOOKUP, cName('file')),
      placeRequest(client, Opcode.MKDIR, Buffer.concat([u32s(0o755, 0), cName('made')])),
      placeRequest(client, Opcode.RENAME2, Buffer.concat([u64s(1, 0), cName('file'), cName('dir')])),
      placeRequest(client, Opcode.SYMLINK, Buffer.concat([cName('made-link'), cName('../outside')])),
      placeRequest(client, Opcode.SETXATTR, Buffer.concat([u32s(2000, 0, 0, 0), cName('user.a'), Buffer.alloc(2000)])),
      placeRequest(client, Opcode.WRITE, Buffer.concat([u64s(5, 0), u32s(2000, 0, 0, 0, 0, 0), Buffer.alloc(2000)])),
      placeRequest(client, Opcode.BATCH_FORGET, Buffer.concat([u32s(10, 0), Buffer.alloc(160)])),
    ];
    const first = requests[0] as Request;
    const last = requests.at(-1) as Request;
    const stop = new Int32Array(new SharedArrayBuffer(4));
    const worker = new Worker(fileURLToPath(new URL('../support/rewriter-thread.js', import.meta.url)), {
      workerData: {
        mapping: memory.regions[0]?.mapping,
        stop,
        parts: [
          { offset: first.at, length: last.out - first.at },
          { offset: queue.descriptors, length: 16 * queue.size },
          { offset: queue.avail, length: 4 * Math.floor((6 + 2 * queue.size) / 4) },
        ],
      },
    });
    const rewritten = new Promise<number>((done) => worker.on('message', done));
    await new Promise((online) => worker.on('online', online));
    const before = daemon.memory;
    let restarts = 0;
    let sent = 0;
    let rounds = 0;
    const seconds = Number(process.env['HOSTILE_SECONDS'] ?? 5);
    for (const end = performance.now() + seconds * 1000; performance.now() < end; ) {
      for (let i = 0; i < 32; i++) {
        const { at, length, out } = requests[(sent * 7 + i) % requests.length] as Request;
        const head = (i * 2) % queue.size;
        queue.setDescriptor(head, { address: at, length, flags: NEXT, next: head + 1 });
        queue.setDescriptor(head + 1, { address: out, length: 4096, flags: WRITE });
        queue.offer(head);
      }
      const from = queue.deviceUsedIndex;
      queue.publish();
      queue.forceKick();
      const returned = () => (queue.deviceUsedIndex - from) & 0xffff;
      for (const late = performance.now() + 20; returned() < 32 && performance.now() < late; ) {
        if (native.poll(queue.errorFd, 1, 0) > 0) break;
      }
      // Not all of them are back: another thread has made the ring one that must be started anew.
      const stuck = returned() !== 32 && native.poll(queue.errorFd, 1, 0) === 0;
      sent += Math.min(returned(), 32);
      rounds++;
      if (rounds % 64 === 0) assertServes(client, [OTHER]);
      if (queue.takeErrors() > 0 || stuck) {
        restarts++;
        restartQueue(client, 1);
      }
    }
    Atomics.store(stop, 0, 1);
    await rewritten;
    await worker.terminate();
    restartQueue(client, 1);
    assertServes(client, [0, OTHER]);
    console.log(`${sent} requests were served in ${seconds} s while memory changed, ${restarts} times the queue had to be restarted`);
    assert.ok(sent > 1000 && restarts > 0);
    assert.ok(target.warnings().length < 30);
    target.assertMemory(before);
  });
});

// --- memory under requests ---

/** The front end's half of a queue that lies in a region of its own. */
async function withJobs(run: (target: Target, client: FuseClient, frontend: VhostUserFrontend) => Promise<void>): Promise<void> {
  await using target = await Target.start([], {
    wrapper: ['strace', '-D', '-f', '-qq', '-o', '/dev/null', '-e', 'trace=fsync', '-e', 'inject=fsync:delay_enter=300000'],
  });
  const client = session(target);
  await run(target, client, client.driver.frontend);
}

describe('memory', () => {
  test('regions removed while requests are out: their rings stop, their replies go nowhere', async () => {
    await withJobs(async (target, client, frontend) => {
      const { entry, open } = client.create(1, 'made', O_RDWR);
      client.getattr(entry.nodeid);
      const baseline = await target.descriptors();
      for (let i = 0; i < 8; i++) submitFsync(client, entry.nodeid, open.fh);
      const { memory } = client.driver;
      for (const region of memory.regions) frontend.remMemReg(describeRegion(region));
      const { queues } = client.driver;
      await target.daemon.until(() => queues.every((queue) => queue.takeErrors() > 0));
      // Kicks of rings that are nowhere.
      for (const queue of queues) for (let i = 0; i < 10; i++) queue.forceKick();
      for (const region of memory.regions) frontend.addMemReg(describeRegion(region), region.fd);
      for (const queue of queues) restartQueue(client, queue.index);
      assertServes(client, [0, OTHER]);
      assert.equal(client.getattr(entry.nodeid).attr.size, 0);
      assert.equal(await target.descriptors(baseline), baseline);
    });
  });

  test('memory tables replaced and rings moved while requests are out', async () => {
    await withJobs(async (target, client, frontend) => {
      const { entry, open } = client.create(1, 'made', O_RDWR);
      const { memory, queues } = client.driver;
      const pending = [1, 2, 3].map(() => submitFsync(client, entry.nodeid, open.fh));
      frontend.setMemTable(memory.table(), memory.fds()); // the same memory, mapped anew
      for (const one of pending) assert.equal(client.wait(one, 10_000).error, 0);
      assertServes(client, [0, OTHER]);
      // The ring's address changes under it: what is there is not a ring.
      const queue = queues[1] as QueueDriver;
      submitFsync(client, entry.nodeid, open.fh);
      const elsewhere = memory.allocate(64 << 10, 4096, 1);
      const user = (address: number) => memory.userAddress(address);
      frontend.setVringAddr({
        index: 1,
        flags: 0,
        descriptor: user(elsewhere),
        available: user(elsewhere + 8192),
        used: user(elsewhere + 16384),
        log: 0n,
      });
      queue.forceKick();
      assertServes(client, [OTHER]);
      assert.throws(() => frontend.setVringAddr({ index: 1, flags: 0, descriptor: 16n, available: 16n, used: 16n, log: 0n }));
      queue.forceKick();
      assertServes(client, [OTHER]);
      restartQueue(client, 1);
      assertServes(client, [0, OTHER]);
      assert.match(target.daemon.log, /refused/);
    });
  });

  for (const [what, keep] of [
    ['ring, table, request and room', 0],
    ['request and room', 1],
  ] as const) {
    test(`a memory file truncated under the device: ${what}`, { timeout: 60_000 }, async () => {
      await using target = await Target.start();
      const client = session(target);
      const { driver } = client;
      const lost = driver.memory.regions[keep === 0 ? 0 : 1] as (typeof driver.memory.regions)[number];
      const queue = driver.queues[1] as QueueDriver;
      const r = placeRequest(client, Opcode.GETATTR, Buffer.alloc(16), keep);
      // Written through /proc, since our own mapping would get the same signal.
      if (keep === 1) {
        queue.setDescriptor(0, { address: r.at, length: r.length, flags: NEXT, next: 1 });
        queue.setDescriptor(1, { address: r.out, length: 120, flags: WRITE });
        queue.offer(0);
        queue.publish();
      }
      fs.truncateSync(`/proc/self/fd/${lost.fd}`, 0);
      queue.forceKick();
      await target.daemon.until(() => queue.takeErrors() > 0);
      assert.match(target.daemon.log, /ERROR queue 1 stopped: /);
      assert.match(target.daemon.log, /ERROR queue \d stopped: its memory was truncated by the front end/);
      // A front end that does this is broken; the next one is served.
      await target.daemon.disconnect(client);
      assertServes(target.daemon.session());
    });
  }
});
