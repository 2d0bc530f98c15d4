/** A million inodes: what each costs, and that looking one up does not become slower. */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { test } from 'node:test';
import { arena, arenaAlloc } from 'vhost-user-ts/native';
import { Block } from '../../src/fs/block.js';
import { InodeStore } from '../../src/fs/inodes.js';

const at = arenaAlloc(64);

function resident(): number {
  const status = fs.readFileSync('/proc/self/status', 'utf8');
  return Number(/^VmRSS:\s+(\d+) kB/m.exec(status)?.[1]) * 1024;
}

test('a million inodes cost at most 300 bytes each and a flat look-up', { timeout: 120000 }, () => {
  const block = new Block();
  const inodes = new InodeStore(block);
  inodes.insert(2, 0, 0, 0x4000);
  const word = at >> 2;
  arena.u32[word] = 8;
  arena.u32[word + 1] = 1;
  const add = (from: number, to: number): void => {
    for (let i = from; i < to; i++) {
      arena.u32[word + 2] = i;
      arena.u32[word + 3] = Math.imul(i, 2654435761) >>> 0;
      inodes.setHandle(inodes.insert(i, 0, 0, 0x8000), at);
    }
  };
  let seed = 1;
  const lookups = (n: number): number => {
    let sum = 0;
    const start = process.hrtime.bigint();
    for (let i = 0; i < 500000; i++) {
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
      sum += inodes.byIno(3 + (seed % (n - 3)), 0, 0) > 0 ? 1 : 0;
    }
    const ns = Number(process.hrtime.bigint() - start) / 500000;
    assert.equal(sum, 500000);
    return ns;
  };
  add(3, 10000);
  lookups(10000);
  const small = lookups(10000);
  const heap = process.memoryUsage().heapUsed;
  const before = resident();
  let slowest = 0;
  for (let i = 10000; i < 1000000; i += 1000) {
    const start = process.hrtime.bigint();
    add(i, i + 1000);
    slowest = Math.max(slowest, Number(process.hrtime.bigint() - start) / 1e6);
  }
  const bytes = (resident() - before) / 990000;
  const large = lookups(1000000);
  const heapGrowth = (process.memoryUsage().heapUsed - heap) / 990000;
  console.log(
    `${bytes.toFixed(0)} bytes an inode (JavaScript heap ${heapGrowth.toFixed(1)}); look-up ${small.toFixed(0)} ns among 10^4, ${large.toFixed(0)} ns among 10^6 (random, out of cache); slowest 1000 insertions ${slowest.toFixed(1)} ms`,
  );
  assert.ok(bytes < 300, `${bytes} bytes an inode`);
  assert.ok(large < 2000, `${large} ns`);
  block.close();
});
