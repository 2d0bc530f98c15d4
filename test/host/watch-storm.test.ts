/** Many changes at once: nothing is lost without an OVERFLOW, memory stays bounded; and what an event costs. */
import assert from 'node:assert/strict';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { native } from 'vhost-user-ts/native';
import { Counter } from '../../src/watch/counters.js';
import { FS_CREATE, FS_EVENT_ON_CHILD } from '../../src/watch/mask.js';
import { Share } from '../support/watch-bench.js';
import { OVERFLOW } from '../support/watch-guest.js';

const ALL = 0x0800_0bce;
const FILES = 100_000;
const DIRECTORIES = 10_000;

/** A share with many watched directories. */
function storm(buffers: number, queueBytes?: number): Share {
  const share = new Share('/dev/shm', { buffers, ...(queueBytes === undefined ? {} : { queueBytes }) });
  for (let i = 0; i < DIRECTORIES; i++) {
    mkdirSync(join(share.root, `${i}`));
    const nodeid = share.nodes.look(join(share.root, `${i}`));
    assert.equal(share.fsnotify.watch(nodeid, share.nodes.generation(nodeid), ALL, 0, 0), 0);
  }
  return share;
}

/** Waits as the device thread would, and takes what comes, until the changes are made and read. */
async function run(share: Share, each: () => void): Promise<void> {
  let going = true;
  const done = share.changer.do({ op: 'storm', path: '.', files: FILES, directories: DIRECTORIES }).then(() => {
    going = false;
  });
  while (going) {
    share.fsnotify.drain();
    each();
    await new Promise((resolve) => setImmediate(resolve));
  }
  await done;
  while (share.fsnotify.drain());
  each();
}

test('100 000 files in 10 000 directories: every one, or one OVERFLOW', { timeout: 120_000 }, async (t) => {
  const share = storm(Number.POSITIVE_INFINITY);
  try {
    let creates = 0;
    let overflows = 0;
    await run(share, () => {
      for (const message of share.guest.take()) {
        for (const record of message.records) {
          if ((record.flags & OVERFLOW) !== 0) overflows++;
          else if (record.mask === FS_CREATE) creates++;
        }
      }
    });
    t.diagnostic(
      `${creates} creates, ${overflows} overflows, ${share.counters.get(Counter.messages)} messages, ${share.counters.get(Counter.records)} records`,
    );
    if (overflows === 0) assert.equal(creates, FILES);
    else assert.ok(creates < FILES);
  } finally {
    share.close();
  }
});

test('a guest that takes nothing: one OVERFLOW, bounded memory, and then it goes on', { timeout: 120_000 }, async (t) => {
  const share = storm(0, 256 << 10);
  try {
    global.gc?.();
    const before = process.memoryUsage();
    await run(share, () => undefined);
    const after = process.memoryUsage();
    t.diagnostic(`rss ${((after.rss - before.rss) / 1e6).toFixed(1)} MB more, ${share.counters.get(Counter.lost)} lost`);
    assert.ok(after.rss - before.rss < 100e6);
    share.guest.buffers = 10_000;
    share.fsnotify.buffersArrived();
    const records = share.guest.take().flatMap((message) => message.records);
    assert.equal(records.filter((record) => (record.flags & OVERFLOW) !== 0).length, 1);
    await share.changer.do({ op: 'write', path: '77/after' });
    assert.ok(
      share
        .messages()
        .flatMap((message) => message.records)
        .some((record) => record.name === 'after'),
    );
  } finally {
    share.close();
  }
});

test("the host's queue overflows: one OVERFLOW, and it goes on", { timeout: 120_000 }, async () => {
  const share = storm(Number.POSITIVE_INFINITY);
  try {
    await share.changer.do({ op: 'storm', path: '.', files: FILES, directories: DIRECTORIES });
    const records = share.messages().flatMap((message) => message.records);
    assert.equal(records.filter((record) => (record.flags & OVERFLOW) !== 0).length, 1);
    assert.equal(share.counters.get(Counter.hostOverflows), 1);
    await share.changer.do({ op: 'write', path: '9999/after' });
    const after = share.messages().flatMap((message) => message.records);
    assert.deepEqual(
      after.map((record) => record.name),
      ['after', 'after', 'after'],
    );
  } finally {
    share.close();
  }
});

/** The time of drains alone, of events that the host has queued before. */
async function cost(share: Share, d: number, invalidating: boolean): Promise<string> {
  const { fsnotify, counters, changer } = share;
  fsnotify.begin({ inodes: invalidating, entries: invalidating, negative: invalidating });
  assert.equal(fsnotify.watch(d, share.nodes.generation(d), ALL, 0, 0), 0);
  const events = counters.get(Counter.events);
  const records = counters.get(Counter.records);
  let took = 0;
  for (let round = 0; round < 12; round++) {
    await changer.do({ op: 'storm', path: '.', files: 10_000, directories: 1 });
    const from = native.monotonic();
    while (fsnotify.drain());
    took += native.monotonic() - from;
  }
  const n = counters.get(Counter.events) - events;
  return `${n} events, ${counters.get(Counter.records) - records} records: ${(took / n / 1000).toFixed(2)} µs an event, ${Math.round(n / (took / 1e9))} events/s`;
}

test('what an event costs', { timeout: 120_000 }, async (t) => {
  const share = new Share('/dev/shm');
  try {
    mkdirSync(join(share.root, '0'));
    const d = share.nodes.look(join(share.root, '0'));
    share.guest.keep = false;
    await share.changer.do({ op: 'storm', path: '.', files: 10_000, directories: 1 });
    t.diagnostic(`without invalidations: ${await cost(share, d, false)}`);
    t.diagnostic(`with invalidations: ${await cost(share, d, true)}`);
  } finally {
    share.close();
  }
});

test('latency from the write to the message', { timeout: 60_000 }, async (t) => {
  const share = new Share('/dev/shm');
  try {
    mkdirSync(join(share.root, 'd'));
    writeFileSync(join(share.root, 'd/f'), '');
    share.watch('d', (0x2 | FS_EVENT_ON_CHILD) >>> 0);
    share.nodes.look(join(share.root, 'd/f'));
    const times: number[] = [];
    const until = Date.now() + 2_000;
    const writing = share.changer.do({ op: 'appendMany', path: 'd/f', count: 20_000 });
    while (Date.now() < until && times.length < 5_000) {
      if (native.poll(share.fsnotify.fd, 1, 1) === 0) {
        await new Promise((resolve) => setImmediate(resolve));
        continue;
      }
      const from = native.monotonic();
      share.fsnotify.drain();
      times.push(native.monotonic() - from);
      share.guest.take();
    }
    await writing;
    times.sort((a, b) => a - b);
    const at = (q: number) => ((times[Math.floor(times.length * q)] ?? 0) / 1000).toFixed(1);
    t.diagnostic(`${times.length} drains with one event and its invalidation: ${at(0.5)} µs median, ${at(0.99)} µs 99 %`);
  } finally {
    share.close();
  }
});
