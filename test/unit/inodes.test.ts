import assert from 'node:assert/strict';
import { test } from 'node:test';
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import { Block } from '../../src/fs/block.js';
import { Inode, InodeStore, ROOT_NODEID, SHIFT } from '../../src/fs/inodes.js';

const ENOENT = -2;
const ESTALE = -116;
const REG = 0x8000;
const DIR = 0x4000;

const at = arenaAlloc(64);

/** A struct file_handle in the arena. */
function handle(type: number, ...words: number[]): number {
  arena.u32[at >> 2] = words.length * 4;
  arena.u32[(at >> 2) + 1] = type;
  words.forEach((word, i) => {
    arena.u32[(at >> 2) + 2 + i] = word;
  });
  return at;
}

function store(): { block: Block; inodes: InodeStore } {
  const block = new Block();
  const inodes = new InodeStore(block);
  assert.equal(inodes.nodeid(inodes.insert(2, 0, 0, DIR)), ROOT_NODEID);
  return { block, inodes };
}

test('an inode is found by nodeid, number and handle', () => {
  const { block, inodes } = store();
  const slot = inodes.insert(77, 5, 3, REG);
  inodes.setHandle(slot, handle(1, 77, 4711));
  assert.equal(inodes.find(inodes.nodeid(slot)), slot);
  assert.equal(inodes.byIno(77, 5, 3), slot);
  assert.equal(inodes.byIno(77, 5, 2), 0);
  assert.equal(inodes.byIno(77, 0, 3), 0);
  assert.equal(inodes.byHandle(handle(1, 77, 4711)), slot);
  assert.equal(inodes.byHandle(handle(2, 77, 4711)), 0);
  assert.equal(inodes.byHandle(handle(1, 77, 4711, 0)), 0);
  assert.ok(Number.isSafeInteger(inodes.nodeid(slot)));
  block.close();
});

test('the same handle on two mounts: both are found', () => {
  const { block, inodes } = store();
  const a = inodes.insert(77, 0, 0, REG);
  const b = inodes.insert(77, 0, 1, REG);
  inodes.setHandle(a, handle(1, 77, 4711));
  inodes.setHandle(b, handle(1, 77, 4711));
  const first = inodes.byHandle(handle(1, 77, 4711));
  const second = inodes.nextByHandle(first);
  assert.deepEqual([first, second].sort(), [a, b]);
  assert.equal(inodes.nextByHandle(second), 0);
  block.close();
});

test('nodeids that were never given out, were forgotten, or name another inode by now', () => {
  const { block, inodes } = store();
  const slot = inodes.insert(10, 0, 0, REG);
  const old = inodes.nodeid(slot);
  for (const nodeid of [0, 3, 2 ** 24 + 3, 2 ** 52, Number.MAX_SAFE_INTEGER, 2 ** 63, 2 ** 64])
    assert.equal(inodes.find(nodeid), ENOENT, String(nodeid));
  assert.equal(inodes.find(2), ESTALE);
  assert.equal(inodes.find(2 ** 24 + 1), ESTALE);
  inodes.remove(slot);
  assert.equal(inodes.find(old), ENOENT);
  assert.equal(inodes.byIno(10, 0, 0), 0);
  const again = inodes.insert(10, 0, 0, REG);
  assert.equal(again, slot);
  assert.notEqual(inodes.nodeid(again), old);
  assert.equal(inodes.find(old), ESTALE);
  block.close();
});

test('a retired inode keeps its nodeid and leaves its number to another one', () => {
  const { block, inodes } = store();
  const slot = inodes.insert(10, 0, 0, REG);
  inodes.setHandle(slot, handle(1, 10, 1));
  inodes.retire(slot);
  assert.equal(inodes.byIno(10, 0, 0), 0);
  assert.equal(inodes.byHandle(handle(1, 10, 1)), 0);
  assert.equal(inodes.find(inodes.nodeid(slot)), slot);
  const other = inodes.insert(10, 0, 0, REG);
  assert.equal(inodes.byIno(10, 0, 0), other);
  inodes.remove(slot);
  assert.equal(inodes.byIno(10, 0, 0), other);
  block.close();
});

test('random insertions and removals agree with a Map, while the index grows and shrinks', () => {
  const { block, inodes } = store();
  const expected = new Map<number, number>();
  let seed = 1;
  const random = (n: number): number => {
    seed = (Math.imul(seed, 1103515245) + 12345) >>> 0;
    return (seed >>> 8) % n;
  };
  for (let round = 0; round < 3; round++) {
    const grow = round !== 1;
    for (let i = 0; i < 30000; i++) {
      const ino = random(40000) + 3;
      const have = expected.get(ino);
      if (have === undefined) {
        if (!grow && i % 20 !== 0) continue;
        const slot = inodes.insert(ino, 1, 0, REG);
        inodes.setHandle(slot, handle(1, ino, ino ^ 0x5555));
        expected.set(ino, slot);
      } else if (!grow || i % 5 === 0) {
        inodes.remove(have);
        expected.delete(ino);
      }
    }
    for (let ino = 3; ino < 40003; ino++) {
      assert.equal(inodes.byIno(ino, 1, 0), expected.get(ino) ?? 0);
      assert.equal(inodes.byHandle(handle(1, ino, ino ^ 0x5555)), expected.get(ino) ?? 0);
    }
    assert.equal(inodes.size, expected.size + 1);
  }
  block.close();
});

test('a second process takes the store up from its memfd', () => {
  const { block, inodes } = store();
  const slot = inodes.insert(99, 1, 2, REG);
  inodes.setHandle(slot, handle(0x81, 99, 1, 7));
  inodes.f64[((slot << SHIFT) + Inode.nlookup) >> 1] = 3;
  const nodeid = inodes.nodeid(slot);
  const fd = native.dup(block.fd);
  block.close();
  const next = new Block(fd);
  assert.equal(next.inherited, true);
  const again = new InodeStore(next);
  assert.equal(again.size, 2);
  assert.equal(again.find(nodeid), slot);
  assert.equal(again.byHandle(handle(0x81, 99, 1, 7)), slot);
  assert.equal(again.f64[((slot << SHIFT) + Inode.nlookup) >> 1], 3);
  const fresh = again.insert(5, 0, 0, REG);
  assert.notEqual(fresh, slot);
  assert.ok(again.nodeid(fresh) > nodeid);
  next.close();
});

test('a block of another layout version is refused', () => {
  const block = new Block();
  block.header[1] = 999;
  const fd = native.dup(block.fd);
  block.close();
  assert.throws(() => new Block(fd), /layout version 999/);
  native.close(fd);
});
