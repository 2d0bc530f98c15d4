/** The host's clock is set while a guest uses the daemon: an hour and decades ahead, a day and half a century back. */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { mkdtempSync } from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { VhostUserFrontend } from 'vhost-user-ts';
import { scrape, TestDaemon } from '../support/daemon.js';
import { errnoOf } from '../support/fuse-client.js';
import { assertServes, cpuSeconds, submitFsync } from '../support/hostile.js';
import { Disk, eventSession, LockHolder, makesEvent, setClock, watch } from '../support/virtual-host.js';

const { ESTALE } = constants.errno;
const { O_RDWR } = fs.constants;
const FLOCK = 1;
const ALL = { start: 0, end: (1n << 63n) - 1n, type: 1, pid: 100 };

/** How often threads of the daemon have gone to sleep. */
function sleeps(daemon: TestDaemon): number {
  const of = (tid: string) => Number(/^voluntary_ctxt_switches:\s+(\d+)/m.exec(daemon.proc(`task/${tid}/status`))?.[1]);
  return fs.readdirSync(`/proc/${daemon.inside}/task`).reduce((sum, tid) => sum + of(tid), 0);
}

/** Of the next half second, while nobody asks for anything. */
async function restless(daemon: TestDaemon): Promise<{ wakeups: number; seconds: number }> {
  const before = { wakeups: sleeps(daemon), seconds: cpuSeconds(daemon) };
  await sleep(500);
  return { wakeups: sleeps(daemon) - before.wakeups, seconds: cpuSeconds(daemon) - before.seconds };
}

test('requests, locks, events, timeouts, metrics and the log go on', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'clock-'));
  const share = join(folder, 'share');
  // ext4 gives the number of a deleted file to the next one.
  using disk = new Disk(join(folder, 'image'), 'clock');
  disk.mount(share);
  await using daemon = await TestDaemon.start(['--cache=notify', '--flock', '--metrics=unix:{folder}/metrics', '--log-format=json'], {
    share,
  });
  const client = eventSession(daemon);
  watch(client, 1);
  fs.writeFileSync(join(share, 'locked'), '');
  makesEvent(client, share, 'begin');
  const locked = client.lookup(1, 'locked').nodeid;
  const { fh } = client.open(locked, O_RDWR);
  const { entryValid, attrValid } = client.lookup(1, 'begin');
  assert.equal(entryValid, 86_400);
  let others = 0;
  const refused = () => daemon.lines.filter((line) => line.includes('refused a second client')).length;
  const anotherClient = () => VhostUserFrontend.connect(daemon.socket).close();
  const firstRefused = performance.now();
  for (; others < 14; others++) anotherClient();
  await daemon.until(() => refused() === 10);

  const began = { clock: Date.now(), monotonic: performance.now() };
  const elapsed = () => performance.now() - began.monotonic;
  const jumps = {
    'an hour ahead': () => (Date.now() + 3_600_000) / 1000,
    'a day back': () => (Date.now() - 86_400_000) / 1000,
    'to 1970': () => 3600,
    'to 2040': () => Date.UTC(2040, 0, 1) / 1000,
    'back to what it was': () => (began.clock + elapsed()) / 1000,
  };
  for (const [name, when] of Object.entries(jumps)) {
    const file = name.replaceAll(' ', '-');
    // Under way while it happens: a wait for a lock, and jobs of other threads.
    using holder = await LockHolder.start(join(share, 'locked'));
    const waits = client.submitSetlkw(locked, fh, 7, ALL, FLOCK);
    assert.ok(!client.settled(waits, 100));
    const quiet = await restless(daemon);
    const jobs = Array.from({ length: 8 }, () => submitFsync(client, locked, fh));

    const seconds = when();
    setClock(seconds);

    for (const one of jobs) assert.equal(client.wait(one).error, 0);
    const after = await restless(daemon);
    assert.ok(after.wakeups < quiet.wakeups + 100 && after.seconds < 0.25, JSON.stringify({ name, quiet, after }));
    assert.ok(!client.done(waits));
    const releasing = performance.now();
    await holder.release();
    assert.equal(client.wait(waits).error, 0);
    t.diagnostic(
      `${name}: ${quiet.wakeups} wakeups in the half second before, ${after.wakeups} after, lock after ${(performance.now() - releasing).toFixed(0)} ms`,
    );
    client.setlk(locked, fh, 7, { ...ALL, type: 2 }, FLOCK);

    // Files made now are of now, and another file of the same number is another file.
    const { entry, open } = client.create(1, file, O_RDWR);
    assert.equal(client.write(entry.nodeid, open.fh, 0, 'text'), 4);
    assert.equal(client.read(entry.nodeid, open.fh, 0, 10).toString(), 'text');
    const { attr } = client.getattr(entry.nodeid);
    assert.ok(Number(attr.mtime.sec) >= Math.trunc(seconds) && Number(attr.mtime.sec) < seconds + 120, `${attr.mtime.sec}`);
    client.release(entry.nodeid, open.fh);
    fs.writeFileSync(join(share, 'one'), 'one');
    const one = client.lookup(1, 'one');
    fs.rmSync(join(share, 'one'));
    fs.writeFileSync(join(share, 'another'), 'another');
    const another = client.lookup(1, 'another');
    assert.equal(another.attr.ino, one.attr.ino);
    assert.notEqual(another.nodeid, one.nodeid);
    assert.equal(
      errnoOf(() => client.getattr(one.nodeid)),
      ESTALE,
    );
    assert.deepEqual([another.attr.size, another.entryValid, another.attrValid], [7, entryValid, attrValid]);
    fs.rmSync(join(share, 'another'));
    makesEvent(client, share, `${file}-event`);

    const numbers = await scrape({ socketPath: join(daemon.folder, 'metrics') });
    const up = Date.now() / 1000 - (numbers.get('process_start_time_seconds') as number);
    assert.ok(up > 0 && up < performance.now() / 1000 + 60, `up for ${up} s`);
    assert.equal(numbers.get('virtiofsd_connected'), 1);

    const lines = daemon.lines.length;
    daemon.process.kill('SIGUSR1');
    await daemon.until(() => daemon.lines.length > lines, 30_000);
    const { time } = JSON.parse(daemon.lines.at(-1) as string) as { time: string };
    assert.ok(Math.abs(Date.parse(time) - Date.now()) < 120_000, `${time} in the log`);
    assertServes(client, [0]);
  }

  // Ten lines of a kind a minute, of a clock that nobody sets.
  for (; others < 28; others++) anotherClient();
  await daemon.until(() => daemon.lines.length > 0);
  assertServes(client, [0]);
  const windows = 1 + Math.floor((performance.now() - firstRefused) / 60_000);
  assert.ok(refused() <= 10 * windows, `${refused()} lines in ${windows} minutes`);
});
