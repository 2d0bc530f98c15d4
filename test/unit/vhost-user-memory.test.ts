/** Guest memory: from a peer's addresses to ours, and nowhere else. */
import assert from 'node:assert/strict';
import { afterEach, beforeEach, describe, it } from 'node:test';
import fc from 'fast-check';
import { GuestMemory, type RegionSpec } from 'vhost-user-ts';
import { arena, arenaAlloc, cString, native } from 'vhost-user-ts/native';
import { openFds } from '../support/vhost-user.js';

const GIB = 2 ** 30;
const PAGE = 4096;
const scratch = arenaAlloc(PAGE);

let memory: GuestMemory;
let fds: number[];

beforeEach(() => {
  memory = new GuestMemory(8);
  fds = [];
});

afterEach(() => {
  memory.clear();
  for (const fd of fds) native.close(fd);
});

function file(bytes: number): number {
  const fd = native.memfdCreate(cString('test'), bytes);
  assert.ok(fd >= 0);
  fds.push(fd);
  return fd;
}

function region(guestAddress: number, size: number, extra: Partial<RegionSpec> = {}): RegionSpec {
  return { guestAddress, size, userAddress: 0x7f00_0000_0000 + guestAddress, mmapOffset: 0, ...extra };
}

function add(guestAddress: number, size: number, extra: Partial<RegionSpec> = {}): number {
  const spec = region(guestAddress, size, extra);
  return memory.add(spec, file(spec.mmapOffset + size));
}

/** Writes text at one of our addresses, reads it back at another. */
function poke(address: number, text: string): void {
  arena.buffer.write(text, scratch, 'latin1');
  native.copy(address, native.arenaAddress() + scratch, text.length);
}

function peek(address: number, length: number): string {
  native.copy(native.arenaAddress() + scratch, address, length);
  return arena.buffer.toString('latin1', scratch, scratch + length);
}

describe('translation', () => {
  it('knows the first and the last byte of a region, and none beside them', () => {
    add(0x10_0000, 0x4000);
    assert.equal(memory.translate(0x10_0000 - 1), -1);
    const first = memory.translate(0x10_0000);
    assert.equal(memory.room, 0x4000);
    assert.equal(memory.translate(0x10_3fff), first + 0x3fff);
    assert.equal(memory.room, 1);
    assert.equal(memory.translate(0x10_4000), -1);
    assert.equal(memory.translate(0), -1);
    assert.equal(memory.translate(2 ** 64 - 1), -1);
  });

  it('does not run on from one region into the next', () => {
    add(0, PAGE);
    add(PAGE, PAGE);
    memory.translate(PAGE - 8);
    assert.equal(memory.room, 8);
  });

  it('an empty table translates nothing', () => {
    assert.equal(memory.translate(0), -1);
  });

  it('reaches every part of a region of more than 4 GiB', () => {
    add(4 * GIB, 9 * GIB);
    for (const offset of [0, 4 * GIB - 4, 4 * GIB, 8 * GIB + 123, 9 * GIB - 8]) {
      const address = memory.translate(4 * GIB + offset);
      poke(address, `at ${offset}`.slice(0, 4));
      assert.equal(memory.room, 9 * GIB - offset);
    }
    const view = memory.viewUser(0x7f00_0000_0000 + 4 * GIB + 8 * GIB + 123, 4);
    assert.equal(Buffer.from(view ?? new ArrayBuffer(0)).toString(), 'at 8');
    assert.equal(peek(memory.translate(4 * GIB + 9 * GIB - 8), 4), 'at 9');
  });

  it('keeps an offset into the file that is not a multiple of the page size', () => {
    const fd = file(3 * PAGE);
    assert.equal(memory.add(region(0, PAGE, { mmapOffset: PAGE }), fd), 0);
    assert.equal(memory.add(region(0x10_0000, 0x200, { mmapOffset: PAGE + 0x100 }), fd), 0);
    poke(memory.translate(0x100), 'same');
    assert.equal(peek(memory.translate(0x10_0000), 4), 'same');
    assert.equal(Buffer.from(memory.viewUser(0x7f00_0010_0000, 4) ?? new ArrayBuffer(0)).toString(), 'same');
  });

  it('agrees with a plain search through the table', () => {
    const layout: RegionSpec[] = [region(0, 2 * PAGE), region(2 * PAGE, PAGE), region(5 * PAGE, 3 * PAGE), region(2 ** 40, PAGE)];
    const bases = layout.map((spec) => {
      assert.equal(memory.add(spec, file(spec.size)), 0);
      return memory.translate(spec.guestAddress);
    });
    const near = fc.oneof(fc.nat(9 * PAGE), fc.integer({ min: 2 ** 40 - PAGE, max: 2 ** 40 + 2 * PAGE }), fc.maxSafeNat());
    fc.assert(
      fc.property(near, (address) => {
        const at = layout.findIndex((spec) => address >= spec.guestAddress && address < spec.guestAddress + spec.size);
        const found = layout[at];
        assert.equal(memory.translate(address), found === undefined ? -1 : (bases[at] as number) + address - found.guestAddress);
        if (found !== undefined) assert.equal(memory.room, found.guestAddress + found.size - address);
      }),
      { numRuns: 1000 },
    );
  });
});

describe('the front end’s own addresses', () => {
  it('give views, within one region only', () => {
    add(0, 2 * PAGE);
    add(2 * PAGE, PAGE);
    const view = memory.viewUser(0x7f00_0000_0000 + PAGE, PAGE);
    poke(memory.translate(PAGE), 'seen');
    assert.equal(Buffer.from(view ?? new ArrayBuffer(0), 0, 4).toString(), 'seen');
    assert.equal(memory.viewUser(0x7f00_0000_0000 + 2 * PAGE - 4, 8), undefined, 'across regions');
    assert.equal(memory.viewUser(0x7f00_0000_0000 + 3 * PAGE - 4, 8), undefined, 'over the end');
    assert.equal(memory.viewUser(0x7f00_0000_0000 - 4, 8), undefined, 'before the start');
    assert.equal(memory.viewUser(PAGE, 8), undefined, 'a guest address');
    add(0x2000_0000, PAGE, { mmapOffset: 8 });
    assert.equal(memory.viewUser(0x7f00_2000_0000, 64), undefined, 'what is aligned for the front end is not for us');
    add(0x3000_0000, PAGE, { mmapOffset: 8, userAddress: 0x7f00_3000_0008 });
    assert.notEqual(memory.viewUser(0x7f00_3000_0010, 64), undefined, 'the same page offset on both sides');
  });

  it('name guest addresses', () => {
    add(0x1000_0000, PAGE, { userAddress: 0x5000_0000 });
    assert.equal(memory.userToGuest(0x5000_0010), 0x1000_0010);
    assert.equal(memory.userToGuest(0x5000_1000), -1);
  });
});

describe('the table', () => {
  it('refuses what overlaps, wraps, is empty or does not lie in its file', () => {
    assert.equal(add(0x10_0000, 0x4000), 0);
    for (const [guestAddress, size] of [
      [0x10_0000, 0x4000],
      [0x10_3000, 0x4000],
      [0xf_d000, 0x4000],
      [0x10_1000, 0x1000],
    ] as const) {
      assert.ok(add(guestAddress, size) < 0, `${guestAddress.toString(16)} + ${size.toString(16)}`);
    }
    const fd = file(PAGE);
    assert.ok(memory.add(region(0, 0), fd) < 0);
    assert.ok(memory.add(region(0, 2 * PAGE), fd) < 0);
    assert.ok(memory.add(region(0, PAGE, { mmapOffset: PAGE }), fd) < 0);
    assert.ok(memory.add(region(2 ** 53 - PAGE + 1, PAGE), fd) < 0);
    assert.ok(memory.add(region(0, PAGE, { userAddress: 2 ** 53 - 1 }), fd) < 0);
    assert.ok(memory.add(region(0, PAGE), -1) < 0);
    assert.equal(memory.regionCount, 1);
    assert.equal(add(0x10_4000, PAGE), 0, 'right behind it is fine');
  });

  it('takes no more regions than it said', () => {
    for (let i = 0; i < 8; i++) assert.equal(add(i * PAGE, PAGE), 0);
    assert.ok(add(8 * PAGE, PAGE) < 0);
  });

  it('removes exactly what was added', () => {
    add(0, PAGE);
    assert.ok(memory.remove(region(0, 2 * PAGE)) < 0);
    assert.ok(memory.remove(region(PAGE, PAGE)) < 0);
    assert.ok(memory.remove(region(0, PAGE, { userAddress: 5 })) < 0);
    const { generation } = memory;
    assert.equal(memory.remove(region(0, PAGE)), 0);
    assert.equal(memory.translate(0), -1);
    assert.notEqual(memory.generation, generation, 'whoever keeps addresses can see it');
  });

  it('detaches the views of a region that goes', () => {
    add(0, PAGE);
    const view = memory.viewUser(0x7f00_0000_0000, 64) as ArrayBuffer;
    memory.remove(region(0, PAGE));
    assert.equal(view.byteLength, 0);
  });

  it('keeps pinned mappings until nobody needs them', () => {
    add(0, PAGE);
    const address = memory.translate(0);
    memory.pin();
    memory.pin();
    memory.remove(region(0, PAGE));
    poke(address, 'in flight');
    assert.equal(peek(address, 9), 'in flight');
    assert.equal(memory.translate(0), -1);
    memory.unpin();
    assert.equal(peek(address, 9), 'in flight');
    memory.unpin();
  });

  it('keeps no descriptor', () => {
    const fd = file(PAGE);
    const before = openFds();
    for (let i = 0; i < 8; i++) memory.add(region(i * PAGE, PAGE), fd);
    assert.equal(openFds(), before);
  });

  it('survives a file that shrinks under it, and says so', () => {
    const fd = file(4 * PAGE);
    memory.add(region(0, 4 * PAGE), fd);
    const address = memory.translate(2 * PAGE);
    assert.equal(memory.broken, false);
    assert.equal(native.ftruncate(fd, PAGE), 0);
    assert.equal(peek(address, 4), '\0\0\0\0');
    assert.equal(memory.broken, true);
    const view = Buffer.from(memory.viewUser(0x7f00_0000_0000 + 3 * PAGE, 4) ?? new ArrayBuffer(0));
    assert.equal(view[0], 0, 'also from JavaScript');
  });
});

describe('the dirty log', () => {
  function setLog(bytes: number): Buffer {
    const fd = file(PAGE);
    assert.equal(memory.setLog(fd, 0, bytes), 0);
    memory.setLogging(true);
    const map = native.regionMap(fd, 0, PAGE, 1);
    return Buffer.from(native.regionBuffer(map, 0, PAGE));
  }

  it('has one bit for each page touched', () => {
    const bits = setLog(16);
    memory.markDirty(0, 1);
    memory.markDirty(3 * PAGE - 1, 2);
    memory.markDirty(8 * PAGE, PAGE);
    memory.markDirty(20 * PAGE, 0);
    assert.deepEqual([...bits.subarray(0, 4)], [0b1101, 0b1, 0, 0]);
  });

  it('ends where the front end said', () => {
    const bits = setLog(2);
    memory.markDirty(15 * PAGE, 10 * PAGE);
    memory.markDirty(2 ** 52, PAGE);
    assert.deepEqual([...bits.subarray(0, 4)], [0, 0x80, 0, 0]);
  });

  it('is kept only while logging is on', () => {
    setLog(2);
    assert.equal(memory.logging, true);
    memory.setLogging(false);
    assert.equal(memory.logging, false);
    memory.setLogging(true);
    memory.setLog(-1, 0, 0);
    assert.equal(memory.logging, false);
    memory.markDirty(0, 1);
  });
});
