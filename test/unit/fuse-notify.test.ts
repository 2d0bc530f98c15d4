/** Notifications, byte by byte: fs/fuse/notify.c reads the first three kinds, the guest's fsnotify patch the fourth. */
import assert from 'node:assert/strict';
import { beforeEach, suite, test } from 'node:test';
import fc from 'fast-check';
import { arena, arenaAlloc, cString } from 'vhost-user-ts/native';
import { INVAL_ENTRY_EXPIRE_ONLY } from '../../src/fuse/abi.js';
import { type FileEvent, NOTIFY_BYTES, Notification, recordBytes } from '../../src/fuse/notify.js';
import { hex } from '../support/fuse-guest.js';

const at = arenaAlloc(2 * NOTIFY_BYTES);
const names = [arenaAlloc(256), arenaAlloc(256)];
const message = new Notification(at, NOTIFY_BYTES);

function event(fields: Partial<FileEvent>, name = '', place = 0): FileEvent {
  const nameLength = Buffer.byteLength(name);
  return {
    nodeid: 0x42,
    generation: 3,
    child: 0,
    childGeneration: 0,
    maskLow: 0x100,
    maskHigh: 0,
    cookie: 0,
    ...fields,
    name: nameLength === 0 ? 0 : cString(name, names[place]),
    nameLength,
  };
}

function golden(expected: string): void {
  assert.equal(arena.buffer.toString('hex', at, at + message.length), hex(expected).toString('hex'));
}

beforeEach(() => {
  arena.u8.fill(0xa5, at, at + 2 * NOTIFY_BYTES); // what an earlier message has left
});

suite('invalidations', () => {
  test('INVAL_INODE: attributes and all data', () => {
    message.invalInode(0x42, 0, 0);
    golden('28000000 02000000 0000000000000000  4200000000000000 0000000000000000 0000000000000000');
  });

  test('INVAL_INODE: attributes alone', () => {
    message.invalInode(0x1_0000_0042, -1, 0);
    golden('28000000 02000000 0000000000000000  4200000001000000 ffffffffffffffff 0000000000000000');
  });

  test('INVAL_ENTRY', () => {
    message.invalEntry(1, cString('name'), 4, 0);
    golden('25000000 03000000 0000000000000000  0100000000000000 04000000 00000000 6e616d6500');
    message.invalEntry(1, cString('name'), 4, INVAL_ENTRY_EXPIRE_ONLY);
    golden('25000000 03000000 0000000000000000  0100000000000000 04000000 01000000 6e616d6500');
  });

  test('DELETE', () => {
    message.delete(1, 0x42, cString('name'), 4);
    golden('2d000000 06000000 0000000000000000  0100000000000000 4200000000000000 04000000 00000000 6e616d6500');
  });
});

suite('event records', () => {
  test('on an object itself', () => {
    message.events();
    assert.ok(message.add(event({ maskLow: 0x4, maskHigh: 0 })));
    golden(`
      40000000 80000000 0000000000000000
      30000000 00000000 4200000000000000 0000000000000000 0400000000000000 03000000 00000000 00000000 00000000`);
  });

  test('on a child, with all fields', () => {
    message.events();
    assert.ok(message.add(event({ child: 0x1_0000_0043, childGeneration: 4, maskLow: 0x48000100, maskHigh: 1, cookie: 9 }, 'ab')));
    golden(`
      48000000 80000000 0000000000000000
      38000000 00000000 4200000000000000 4300000001000000 0001004801000000 03000000 04000000 09000000 02000000
      6162000000000000`);
  });

  test('several in one message', () => {
    message.events();
    assert.ok(message.add(event({ maskLow: 0x100 }, 'sevenby')));
    assert.ok(message.add(event({ maskLow: 0x8 }, 'eightbyt')));
    golden(`
      88000000 80000000 0000000000000000
      38000000 00000000 4200000000000000 0000000000000000 0001000000000000 03000000 00000000 00000000 07000000
      736576656e627900
      40000000 00000000 4200000000000000 0000000000000000 0800000000000000 03000000 00000000 00000000 08000000
      6569676874627974 0000000000000000`);
  });

  test('a rename: the source is PAIRED with the target', () => {
    message.events();
    assert.ok(message.addRename(event({ maskLow: 0x40 }, 'old'), event({ nodeid: 0x43, generation: 5, maskLow: 0x80 }, 'new', 1)));
    golden(`
      80000000 80000000 0000000000000000
      38000000 02000000 4200000000000000 0000000000000000 4000000000000000 03000000 00000000 00000000 03000000 6f6c640000000000
      38000000 00000000 4300000000000000 0000000000000000 8000000000000000 05000000 00000000 00000000 03000000 6e65770000000000`);
  });

  test('OVERFLOW: all else is zero', () => {
    message.events();
    assert.ok(message.addOverflow());
    golden(`40000000 80000000 0000000000000000  30000000 01000000 ${'00'.repeat(40)}`);
  });

  test('a rename with two longest names takes 624 bytes, and comes whole or not at all', () => {
    const longest = 'n'.repeat(255);
    const small = new Notification(at, 16 + 2 * 304);
    small.events();
    assert.ok(small.addRename(event({}, longest), event({}, longest, 1)));
    assert.equal(small.length, 624);
    const smaller = new Notification(at, 16 + 2 * 304 - 1);
    smaller.events();
    assert.ok(!smaller.addRename(event({}, longest), event({}, longest, 1)));
    assert.equal(smaller.length, 16);
    assert.equal(arena.buffer.readUInt32LE(at), 16);
  });

  test('what does not fit is left for the next message', () => {
    message.events();
    let taken = 0;
    while (message.add(event({}, 'file'))) taken++;
    assert.equal(taken, Math.floor((NOTIFY_BYTES - 16) / 56));
    assert.ok(!message.add(event({}, 'file')));
    assert.equal(message.length, 16 + taken * 56);
    assert.equal(arena.buffer.readUInt32LE(at + NOTIFY_BYTES), 0xa5a5a5a5);
  });

  test('any sequence can be walked record by record to the end', () => {
    fc.assert(
      fc.property(fc.array(fc.string({ unit: 'grapheme-ascii', maxLength: 255 }).map((name) => name.replaceAll('/', '_'))), (list) => {
        message.events();
        const taken = list.filter((name) => message.add(event({}, name)));
        const end = at + arena.buffer.readUInt32LE(at);
        const seen: string[] = [];
        let record = at + 16;
        while (record < end) {
          const bytes = arena.buffer.readUInt32LE(record);
          const nameLength = arena.buffer.readUInt32LE(record + 44);
          assert.equal(bytes, recordBytes(nameLength));
          assert.equal(bytes % 8, 0);
          assert.ok(arena.buffer.subarray(record + 48 + nameLength, record + bytes).every((byte) => byte === 0));
          seen.push(arena.buffer.toString('latin1', record + 48, record + 48 + nameLength));
          record += bytes;
        }
        assert.equal(record, end);
        assert.equal(end, at + message.length);
        assert.deepEqual(seen, taken);
      }),
      { numRuns: 200 },
    );
  });
});
