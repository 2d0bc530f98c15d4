import assert from 'node:assert/strict';
import { test } from 'node:test';
import { arenaAlloc, cString } from 'vhost-user-ts/native';
import { Echoes } from '../../src/watch/echo.js';
import { WatchTable } from '../../src/watch/table.js';

test('watches come and go as in a Map', () => {
  const table = new WatchTable();
  const model = new Map<number, number>();
  let seed = 1;
  const random = (n: number) => {
    seed = (Math.imul(seed, 1103515245) + 12345) >>> 0;
    return Math.floor((seed / 2 ** 32) * n);
  };
  for (let i = 0; i < 50_000; i++) {
    // Nodeids of the store: generations in the high bits, few slots.
    const nodeid = random(40) * 2 ** 24 + random(50) + 1;
    const slot = table.find(nodeid);
    assert.equal(slot === 0, !model.has(nodeid));
    if (slot === 0) {
      const added = table.add(nodeid, 3, true);
      table.setMask(added, 1 + random(0xfff));
      model.set(nodeid, table.mask[added] as number);
    } else if (random(2) === 0) {
      assert.equal(table.mask[slot], model.get(nodeid));
      table.remove(slot);
      model.delete(nodeid);
    }
    assert.equal(table.watches, model.size);
  }
  for (const [nodeid, mask] of model) assert.equal(table.mask[table.find(nodeid)], mask);
  table.clear();
  assert.equal(table.watches, 0);
  for (const nodeid of model.keys()) assert.equal(table.find(nodeid), 0);
});

test('echoes: until the queue was read empty, and while a job is out', () => {
  const echoes = new Echoes();
  const name = cString('name', arenaAlloc(64));
  echoes.object(7, 0x2);
  echoes.entry(5, 0x100, name, 4);
  assert.equal(echoes.isObject(7, 0x2), true);
  assert.equal(echoes.isObject(7, 0x4), false);
  assert.equal(echoes.isObject(8, 0x2), false);
  assert.equal(echoes.isEntry(5, 0x100, name, 4), true);
  assert.equal(echoes.isEntry(5, 0x100, name, 3), false);
  assert.equal(echoes.isEntry(6, 0x100, name, 4), false);
  echoes.drained();
  assert.equal(echoes.isObject(7, 0x2), false);
  assert.equal(echoes.isEntry(5, 0x100, name, 4), false);
  echoes.begin(9, 0x2);
  echoes.begin(9, 0x2);
  echoes.drained();
  assert.equal(echoes.isObject(9, 0x2), true);
  echoes.end(9);
  echoes.end(9);
  assert.equal(echoes.isObject(9, 0x2), true, 'until the next drain');
  echoes.drained();
  assert.equal(echoes.isObject(9, 0x2), false);
  for (let i = 1; i < 5_000; i++) echoes.object(i, 0x4);
  for (let i = 1; i < 5_000; i++) assert.equal(echoes.isObject(i, 0x4), true);
  assert.equal(echoes.isObject(5_000, 0x4), false);
});
