import assert from 'node:assert/strict';
import { test } from 'node:test';
import { SlotMap } from '../../src/fs/slotmap.js';

test('the lowest free slot is taken, and all can be', () => {
  const slots = 32 * 40;
  const map = new SlotMap(new Uint32Array(SlotMap.words(slots)), slots);
  for (let i = 0; i < slots; i++) assert.equal(map.take(), i);
  assert.equal(map.take(), -1);
  assert.equal(map.free(700), false);
  assert.equal(map.free(3), false);
  assert.equal(map.taken(3), false);
  assert.equal(map.taken(4), true);
  assert.equal(map.take(), 3);
  assert.equal(map.take(), 700);
  assert.equal(map.take(), -1);
});

test('free says when a group of 32 is empty', () => {
  const map = new SlotMap(new Uint32Array(SlotMap.words(1 << 20)), 1 << 20);
  for (let i = 0; i < 33; i++) map.take();
  for (let i = 1; i < 32; i++) assert.equal(map.free(i), false);
  assert.equal(map.free(0), true);
  assert.equal(map.free(32), true);
});

test('random takes and frees agree with a plain set', () => {
  const slots = 4096;
  const map = new SlotMap(new Uint32Array(SlotMap.words(slots)), slots);
  const taken = new Set<number>();
  let seed = 12345;
  const random = (n: number): number => {
    seed = (Math.imul(seed, 1103515245) + 12345) >>> 0;
    return (seed >>> 8) % n;
  };
  for (let step = 0; step < 50000; step++) {
    if (random(100) < 55) {
      const slot = map.take();
      let lowest = 0;
      while (taken.has(lowest)) lowest++;
      assert.equal(slot, lowest < slots ? lowest : -1);
      if (slot >= 0) taken.add(slot);
    } else {
      const slot = random(slots);
      if (taken.delete(slot)) map.free(slot);
    }
    if (taken.size > 600) {
      for (const slot of [...taken].slice(0, 500)) {
        taken.delete(slot);
        map.free(slot);
      }
    }
  }
});
