/** The host sleeps and wakes while a guest uses the daemon. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import { Opcode } from '../../src/fuse/abi.js';
import { scrape, TestDaemon } from '../support/daemon.js';
import { type FuseClient, type Pending, readIn, Struct } from '../support/fuse-client.js';
import { assertServes, submitFsync } from '../support/hostile.js';
import { eventSession, hears, LockHolder, makesEvent, suspend, watch } from '../support/virtual-host.js';

const { O_RDWR } = fs.constants;
const FLOCK = 1;
const ALL = { start: 0, end: (1n << 63n) - 1n, type: 1, pid: 100 };
const ROUNDS = ['freeze', 'mem', 'freeze'] as const;
const NIGHT = 8 * 3600;

/** Requests of all kinds at once: the loop's own, and jobs of other threads. */
function submitSome(client: FuseClient, nodeid: number, fh: number, text: Buffer): Pending[] {
  const body = new Struct(40).u64(0, fh).u64(8, 0).u32(16, text.length);
  return [
    client.submit(Opcode.GETATTR, nodeid, [Buffer.alloc(16)], 128),
    client.submit(Opcode.WRITE, nodeid, [body.bytes, text], 8),
    submitFsync(client, nodeid, fh),
    client.submit(Opcode.READ, nodeid, [readIn(fh, 0, text.length, {})], text.length),
    client.submit(Opcode.LOOKUP, 1, [Buffer.from('file\0')], 128),
  ];
}

test('suspended and woken, with requests under way, a lock waited for and a watch', async (t) => {
  await using daemon = await TestDaemon.start(['--cache=notify', '--flock', '--metrics=unix:{folder}/metrics']);
  const { share } = daemon;
  for (const name of ['file', 'locked']) fs.writeFileSync(join(share, name), '');
  const client = eventSession(daemon);
  watch(client, 1);
  makesEvent(client, share, 'begin');
  const { nodeid } = client.lookup(1, 'file');
  const { fh } = client.open(nodeid, O_RDWR);
  const locked = client.lookup(1, 'locked').nodeid;
  const lock = client.open(locked, O_RDWR).fh;
  const text = Buffer.alloc(65_536, 'text');
  let answered = 0;
  for (const [round, state] of ROUNDS.entries()) {
    using holder = await LockHolder.start(join(share, 'locked'));
    const waits = client.submitSetlkw(locked, lock, 7, ALL, FLOCK);
    execFileSync('touch', [join(share, `before-${round}`)]);
    const before = answered;
    let slept = 0;
    let asleep = true;
    const over = suspend(state, NIGHT).finally(() => {
      asleep = false;
    });
    for (let last = performance.now(); asleep; await turn()) {
      const pending = Array.from({ length: 6 }, () => submitSome(client, nodeid, fh, text)).flat();
      for (const one of pending) {
        const { error, body } = client.wait(one);
        assert.equal(error, 0);
        if (one.opcode === Opcode.READ && body.length > 0) assert.ok(body.equals(text));
      }
      answered += pending.length;
      const now = performance.now();
      slept = Math.max(slept, now - last);
      last = now;
    }
    await over;
    if (state === 'freeze') assert.ok(slept > 1500, `asleep for ${slept} ms`);
    assert.ok(!client.done(waits));
    await holder.release();
    assert.equal(client.wait(waits).error, 0);
    client.setlk(locked, lock, 7, { ...ALL, type: 2 }, FLOCK);
    hears(client, `before-${round}`);
    makesEvent(client, share, `after-${round}`);
    assertServes(client, [0]);
    const numbers = await scrape({ socketPath: join(daemon.folder, 'metrics') });
    const up = Date.now() / 1000 - (numbers.get('process_start_time_seconds') as number);
    assert.ok(up > 0 && up < performance.now() / 1000 + 60, `up for ${up} s`);
    t.diagnostic(`${state}: ${answered - before} requests answered around it, the longest pause ${slept.toFixed(0)} ms`);
  }
  assert.deepEqual(
    daemon.lines.filter((line) => / (WARN|ERROR) /.test(line)),
    [],
  );
});
