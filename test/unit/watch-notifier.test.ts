/** The queue of notifications: order, packing, coalescing, overflow, hand-over; no host events are needed. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { arenaAlloc, cString } from 'vhost-user-ts/native';
import { Counter, Counters } from '../../src/watch/counters.js';
import { Notifier, type NotifierOptions } from '../../src/watch/notifier.js';
import { DELETE, FSNOTIFY, INVAL_ENTRY, INVAL_INODE, OVERFLOW, PAIRED, TestGuest } from '../support/watch-guest.js';

const CREATE = 0x100;
const NAME = arenaAlloc(512);
const TO = arenaAlloc(512);

class Bench {
  readonly counters = new Counters();
  readonly notifier: Notifier;
  readonly guest: TestGuest;

  constructor(buffers = 0, options: NotifierOptions = {}, guest = new TestGuest(buffers)) {
    this.notifier = new Notifier(this.counters, options);
    this.guest = guest;
    this.notifier.attach(guest);
    this.notifier.batch();
  }

  record(name: string, mask = CREATE, nodeid = 5, cookie = 0): void {
    this.notifier.record(mask, nodeid, 1, 0, 0, cookie, cString(name, NAME), Buffer.byteLength(name));
  }

  rename(from: string, to: string): void {
    this.notifier.rename(0x40, 5, 1, cString(from, NAME), from.length, 0x80, 6, 1, cString(to, TO), to.length, 9, 1);
  }

  invalEntry(name: string): void {
    this.notifier.invalEntry(5, cString(name, NAME), name.length);
  }

  deleteEntry(name: string): void {
    this.notifier.deleteEntry(5, 9, cString(name, NAME), name.length);
  }

  give(buffers: number): void {
    this.guest.buffers += buffers;
    this.notifier.pump();
  }

  /** What came, one word a record. */
  take(): string[] {
    return this.guest.take().flatMap((message) => {
      if (message.code === INVAL_INODE) return [`inode ${message.nodeid} ${message.offset}`];
      if (message.code === INVAL_ENTRY) return [`entry ${message.name}`];
      if (message.code === DELETE) return [`delete ${message.name}`];
      assert.equal(message.code, FSNOTIFY);
      return message.records.map((record) =>
        (record.flags & OVERFLOW) !== 0 ? 'OVERFLOW' : (record.flags & PAIRED) !== 0 ? `${record.name} →` : record.name,
      );
    });
  }
}

test('records are packed into one message, in order', () => {
  const bench = new Bench(1);
  for (let i = 0; i < 50; i++) bench.record(`f${i}`);
  bench.notifier.pump();
  assert.equal(bench.guest.messages.length, 1);
  assert.equal(bench.guest.flushes, 1);
  assert.deepEqual(
    bench.take(),
    Array.from({ length: 50 }, (_, i) => `f${i}`),
  );
  assert.equal(bench.notifier.pending, false);
});

test('without buffers everything waits, and goes when they come', () => {
  const bench = new Bench(0);
  const names = Array.from({ length: 500 }, (_, i) => `f${i}`);
  for (const name of names) bench.record(name);
  bench.notifier.pump();
  assert.deepEqual(bench.take(), []);
  const got: string[] = [];
  for (let i = 0; i < 100 && bench.notifier.pending; i++) {
    bench.give(1);
    assert.equal(bench.guest.messages.length, 1);
    got.push(...bench.take());
  }
  assert.deepEqual(got, names);
});

test('a rename is never torn apart by the end of a message', () => {
  const long = 'r'.repeat(255);
  for (let fill = 0; fill < 64; fill++) {
    const bench = new Bench(Number.POSITIVE_INFINITY);
    for (let i = 0; i < fill; i++) bench.record(`${i}`);
    bench.rename(long, long);
    bench.notifier.pump();
    const paired = bench.guest.messages.flatMap((message) => message.records.filter((record) => record.flags === PAIRED));
    assert.equal(paired.length, 1);
    bench.notifier.free();
  }
});

test('identical neighbours are one, renames and half renames stay', () => {
  const bench = new Bench(Number.POSITIVE_INFINITY);
  bench.record('a', 2);
  bench.record('a', 2);
  bench.record('b', 2);
  bench.record('a', 2);
  bench.record('a', 4);
  bench.rename('x', 'y');
  bench.rename('x', 'y');
  bench.record('h', 0x40, 5, 77);
  bench.record('h', 0x40, 5, 77);
  bench.notifier.pump();
  assert.deepEqual(bench.take(), ['a', 'b', 'a', 'a', 'x →', 'y', 'x →', 'y', 'h', 'h']);
  assert.equal(bench.counters.get(Counter.coalesced), 1);
  // What the guest has already is no neighbour.
  bench.record('a', 2);
  bench.notifier.pump();
  bench.record('a', 2);
  bench.notifier.pump();
  assert.deepEqual(bench.take(), ['a', 'a']);
});

test('invalidations overtake events, once each', () => {
  const bench = new Bench(0);
  bench.record('a');
  bench.notifier.invalInode(7, false);
  bench.notifier.invalInode(7, false);
  bench.notifier.invalInode(7, true);
  bench.notifier.invalInode(7, false);
  bench.invalEntry('a');
  bench.invalEntry('a');
  bench.record('b');
  bench.give(10);
  assert.deepEqual(bench.take(), ['inode 7 -1', 'inode 7 0', 'entry a', 'a', 'b']);
  assert.equal(bench.counters.get(Counter.invalidationsSaved), 3);
  // The same batch, though the guest has taken it; then another one.
  bench.notifier.invalInode(7, true);
  bench.notifier.batch();
  bench.notifier.invalInode(7, true);
  bench.invalEntry('a');
  bench.give(10);
  assert.deepEqual(bench.take(), ['inode 7 0', 'entry a']);
});

test('what still waits is not sent again by a later batch', () => {
  const bench = new Bench(0);
  for (let i = 0; i < 5; i++) {
    bench.notifier.batch();
    bench.notifier.invalInode(7, true);
    bench.invalEntry('e');
  }
  bench.give(10);
  assert.deepEqual(bench.take(), ['inode 7 0', 'entry e']);
});

test('DELETE keeps its place among events, and no later INVAL_ENTRY overtakes it', () => {
  const bench = new Bench(0);
  bench.record('before');
  bench.deleteEntry('n');
  bench.record('after');
  bench.invalEntry('n');
  bench.record('last');
  bench.give(10);
  assert.deepEqual(bench.take(), ['before', 'delete n', 'after', 'entry n', 'last']);
  // And when it is gone they overtake again.
  bench.record('r');
  bench.invalEntry('n');
  bench.give(10);
  assert.deepEqual(bench.take(), ['entry n', 'r']);
});

test('a full queue: the oldest stay, then exactly one OVERFLOW, and marks are set again before it', () => {
  const bench = new Bench(0, { queueBytes: 64 << 10 });
  let rearmed = 0;
  bench.notifier.onOverflow = () => rearmed++;
  for (let i = 0; i < 10_000; i++) bench.record(`f${i}`);
  assert.equal(rearmed, 0);
  bench.give(1_000);
  const got = bench.take();
  assert.equal(got.filter((name) => name === 'OVERFLOW').length, 1);
  assert.equal(rearmed, 1);
  const at = got.indexOf('OVERFLOW');
  assert.ok(at > 300, `${at} records kept`);
  assert.deepEqual(
    got.slice(0, at),
    Array.from({ length: at }, (_, i) => `f${i}`),
  );
  // Those behind it are the youngest, in order.
  const after = got.slice(at + 1).map((name) => Number(name.slice(1)));
  assert.deepEqual(
    after,
    [...after].sort((a, b) => a - b),
  );
  assert.equal(after.at(-1), 9_999);
  assert.equal(bench.counters.get(Counter.queueOverflows), 1);
  assert.equal(bench.counters.get(Counter.overflowsSent), 1);
  // A second loss is said again.
  for (let i = 0; i < 10_000; i++) bench.record(`g${i}`);
  bench.give(1_000);
  assert.equal(bench.take().filter((name) => name === 'OVERFLOW').length, 1);
  assert.equal(rearmed, 2);
});

test('the host overflows while one waits already: one record', () => {
  const bench = new Bench(0);
  bench.record('a');
  bench.notifier.overflow();
  bench.record('b');
  bench.notifier.overflow();
  bench.record('b');
  bench.give(10);
  assert.deepEqual(bench.take(), ['a', 'OVERFLOW', 'b']);
  bench.notifier.overflow();
  bench.give(10);
  assert.deepEqual(bench.take(), ['OVERFLOW']);
});

test('an overflow that finds a full message', () => {
  for (let fill = 50; fill < 75; fill++) {
    const bench = new Bench(0);
    for (let i = 0; i < fill; i++) bench.record(`${i}`);
    bench.notifier.overflow();
    bench.give(10);
    assert.deepEqual(bench.take().at(-1), 'OVERFLOW');
    bench.notifier.free();
  }
});

test('invalidations that find no room are an overflow', () => {
  const bench = new Bench(0, { queueBytes: 16 << 10 });
  for (let i = 2; i < 1_000; i++) bench.notifier.invalInode(i, true);
  bench.give(2_000);
  const got = bench.take();
  assert.equal(got.filter((name) => name === 'OVERFLOW').length, 1);
  assert.equal(got.at(-1), 'OVERFLOW');
});

test('deletes that find no room are an overflow', () => {
  const bench = new Bench(0, { queueBytes: 16 << 10 });
  for (let i = 0; i < 1_000; i++) bench.deleteEntry(`d${i}`);
  bench.give(2_000);
  const got = bench.take();
  assert.equal(got.filter((name) => name === 'OVERFLOW').length, 1);
  assert.equal(got.at(-1), 'OVERFLOW');
  bench.invalEntry('x');
  bench.record('y');
  bench.give(10);
  assert.deepEqual(bench.take(), ['entry x', 'y'], 'no delete is thought to wait');
});

test('a guest that gives no buffers for too long gets an OVERFLOW in place of old news', async () => {
  const bench = new Bench(0, { starveMs: 20 });
  bench.record('a');
  bench.notifier.invalInode(9, true);
  bench.notifier.pump();
  await new Promise((resolve) => setTimeout(resolve, 40));
  bench.notifier.batch();
  bench.record('b');
  bench.give(10);
  assert.deepEqual(bench.take(), ['OVERFLOW', 'b']);
});

test('the end of a session leaves nothing', () => {
  const bench = new Bench(0);
  bench.record('a');
  bench.notifier.invalInode(3, true);
  bench.deleteEntry('d');
  bench.notifier.overflow();
  bench.notifier.reset();
  assert.equal(bench.notifier.pending, false);
  bench.notifier.invalInode(3, true);
  bench.record('b');
  bench.give(10);
  assert.deepEqual(bench.take(), ['inode 3 0', 'b']);
});

test('a buffer that is too small comes back unused', () => {
  const bench = new Bench(0, {}, new TestGuest(2, 0, 40));
  bench.record('a');
  bench.notifier.pump();
  assert.equal(bench.guest.buffers, 0);
  bench.guest.bytes = 4096;
  bench.give(1);
  assert.deepEqual(bench.take(), ['a']);
});

test('a carrier with a header of its own', () => {
  const bench = new Bench(0, {}, new TestGuest(1, 16));
  bench.record('a');
  bench.notifier.pump();
  assert.deepEqual(bench.take(), ['a']);
});

test('many turns of the ring, with a slow guest', () => {
  const bench = new Bench(0, { queueBytes: 16 << 10 });
  const sent: string[] = [];
  const got: string[] = [];
  for (let i = 0; i < 5_000; i++) {
    const name = 'x'.repeat(1 + ((i * 37) % 200)) + i;
    bench.record(name);
    sent.push(name);
    if (i % 7 === 0) bench.deleteEntry(`d${i}`);
    if (i % 3 === 0) bench.give(1);
    got.push(...bench.take().filter((line) => !line.startsWith('delete')));
  }
  bench.give(1_000);
  got.push(...bench.take().filter((line) => !line.startsWith('delete')));
  assert.deepEqual(got, sent);
});
